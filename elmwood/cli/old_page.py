"""Old names, until the modules that import them have moved."""

from elmwood.study.page import render as page

__all__ = ["page"]
