"""Experts as the experts of one mixture model, in standard architectures (BTX, arXiv:2403.07816)."""
