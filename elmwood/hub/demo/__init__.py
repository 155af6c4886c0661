"""The community in a box: a hub on this machine, a verifier, and five volunteers, two of whom are dishonest."""
