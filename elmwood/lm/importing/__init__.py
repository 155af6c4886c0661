"""Models of others as seeds: what is understood, what is rewritten, what is refused."""
