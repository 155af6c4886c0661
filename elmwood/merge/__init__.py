"""Experts -> one checkpoint, one adapter or one mixture: merge rules as sums of states, streamed. `moe/trial` and `export` import torch."""
