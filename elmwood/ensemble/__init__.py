"""Ensembles of experts, as language models, and text from any of them."""
