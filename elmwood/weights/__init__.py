"""Weights on disk: streamed safetensors files, experts as deltas from their seed, sums that do not depend on order. Free of torch."""
