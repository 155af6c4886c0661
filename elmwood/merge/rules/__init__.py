"""Merge rules: each one function, or a few, and one row in the table."""
