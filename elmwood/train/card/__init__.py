"""How a step is computed on a GPU: attention by document, compiled layers, and the share of the card's peak that this reaches."""
