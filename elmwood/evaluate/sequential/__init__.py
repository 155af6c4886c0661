"""Tests that stop as soon as they know: betting on blocks of held-out text, with error budgets."""
