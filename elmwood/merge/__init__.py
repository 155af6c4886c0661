"""Experts -> one checkpoint: merge rules as sums of states, streamed. Everything but `statistics` is free of torch."""
