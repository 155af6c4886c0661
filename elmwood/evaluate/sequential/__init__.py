"""Sequential tests by betting on blocks of held-out text, with error budgets: they stop as soon as the answer is known."""
