"""Adapters over one seed: their settings, a bank of them over one base model, and mixtures of low-rank changes."""
