"""Folders and files that other tools read: transformers checkpoints, PEFT adapters, GGUF."""
