"""Text: read it, clean it of duplicates, split off the holdout, turn it into tokens. Free of torch."""
