"""One language model grown out of many small experts."""

__version__ = "0.1.0"
