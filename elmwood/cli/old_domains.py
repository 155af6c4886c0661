"""Old names, until the modules that import them have moved."""

from elmwood.cli.text import print_corpus as say_read

__all__ = ["say_read"]
