"""Language models: seeds, adapters, and many experts over one base."""
