"""The routes of a hub. Each reads a message, and calls one action inside a write or one query; errors are problem+json."""
