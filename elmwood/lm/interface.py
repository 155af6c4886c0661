"""The interface of any model or combination of models to evaluation, serving and generation.

B rows, T tokens, V vocabulary
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from elmwood.corpus.tokens import Windows
from elmwood.engine import Progress, silent


class Cache(Protocol):
    """What a model remembers of one growing text."""

    tokens: list[int]  # so far
    shares: Mapping[str, float]  # of the models that predict the next token, by name; they sum to one


class LM(Protocol):
    """A language model. All log-probabilities are natural logarithms, float32."""

    context: int  # largest number of tokens
    vocabulary: int
    separator: int  # the token before each document; a text begins with it
    stops: frozenset[int]  # tokens that end a text

    def score(self, tokens_BT: Any) -> Tensor:
        """log p(x_t | x_<t) for rows of token ids [B, T] (a tensor or an array), on the CPU; column 0, which is given, is 0.
        The last token of a row is not read, so a row has `context` + 1 tokens at most."""
        ...

    def score_windows(self, windows: Windows, wanted_W: Any, progress: Progress = silent) -> Tensor:
        """log p of the scored tokens of the wanted windows (ascending), in order [n], on the CPU. `windows` has all windows of their
        documents, for the router of an ensemble looks at the document before a window."""
        ...

    def start(self) -> Any:
        """The cache of an empty text."""
        ...

    def extend(self, tokens_T: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
        """Add tokens to a text: log-probabilities [V] of the token after them, on the CPU, and the cache (changed in place)."""
        ...
