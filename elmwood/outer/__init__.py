"""Outer steps: deltas in few bytes, what is let in, how they become the next version, and the rules of a round. Free of torch."""
