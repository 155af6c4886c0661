"""Old names, until the modules that import them have moved."""

from typing import Any

from elmwood.records import Recipe
from elmwood.study.training import checked as _checked
from elmwood.study.training import default_rate, llama, shards

__all__ = ["checked", "default_rate", "llama", "shards"]


def checked(**fields: Any) -> Recipe:
    """A recipe. Raises BadInput, by the name of the option."""
    return _checked(Recipe, "train", **fields)
