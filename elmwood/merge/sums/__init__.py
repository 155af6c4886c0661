"""Sums of experts under a rule, streamed from their files in pieces."""
