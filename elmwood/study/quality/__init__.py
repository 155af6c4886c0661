"""What models are worth on held-out text: columns, losses, tables, contests, admission and the choice of merges."""
