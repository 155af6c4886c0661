"""One candidate as a language model.

T tokens, V vocabulary, W windows
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from elmwood.corpus.tokens import Windows
from elmwood.engine import Progress, silent
from elmwood.lm.experts import Expected, Experts, Text


class OneLM:
    """One expert, or the seed alone, as an LM (see interface.py)."""

    def __init__(self, experts: Experts, e: int, name: str):
        self.experts, self.e, self.name = experts, e, name
        self.context, self.vocabulary, self.separator = experts.seed.context, experts.seed.vocabulary, experts.seed.separator
        self.stops = experts.stops

    def score(self, tokens_BT: Any) -> Tensor:
        return self.experts.score(self.e, tokens_BT)

    def score_windows(self, windows: Windows, wanted_W: Any, progress: Progress = silent) -> Tensor:
        total = int(windows.length_W[wanted_W].sum())
        return self.experts.score_windows(self.e, windows, wanted_W, lambda done: progress("score", done, total, "tokens"))

    def fill(self, folder: Path, wanted: Callable[[str], bool]) -> None:
        self.experts.fill(self.e, folder, wanted)

    def start(self) -> "OneText":
        return OneText(self.name)

    def extend(self, tokens_T: Sequence[int], cache: "OneText") -> tuple[Tensor, "OneText"]:
        logp_AV, _ = self.experts.extend([self.e], tokens_T, cache)
        return logp_AV[0].cpu(), cache

    def read(self, tokens_T: Sequence[int], text: "OneText") -> Expected:
        logp_AV, _ = self.experts.extend([self.e], tokens_T, text)
        return Expected({self.e: 1.0}, {self.e: logp_AV[0]})

    def hear(self, token: int, loglik: Mapping[int, float], text: "OneText") -> Expected:
        text.tokens.append(token)
        return Expected({self.e: 1.0}, {})


class OneText(Text):
    """A text that one expert reads."""

    def __init__(self, name: str):
        super().__init__()
        self.shares = {name: 1.0}
