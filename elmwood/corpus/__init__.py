"""Text: read documents, drop duplicates, split off the holdout, make tokens. Without torch."""
