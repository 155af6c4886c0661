"""What a training run will take, before it starts: memory from formulas, time from measured speeds."""
