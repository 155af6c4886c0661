"""Adapters summed for each prompt: one pass, whatever their number.

Shapes: C candidates (experts by digest, the seed last), B rows, T tokens, W windows, N scored tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmwood.corpus.tokens import Windows
from elmwood.domains.route import Signals, router_of, weights
from elmwood.engine import Progress, silent
from elmwood.ensemble.forest import open_forest, score_rows
from elmwood.errors import BadInput
from elmwood.lm.experts import Text
from elmwood.records import Ensemble
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

TOKENS = 8192  # in one batch, padding included


class PromptText(Text):
    """A text that is read with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: dict[str, float] = {}
        self.weight_C: Floats | None = None  # None until the prompt is read


class WeightsLM:
    """LoRA experts summed into one adapter for each prompt, by its router's weights; one pass, whatever their number.

    theta = seed + sum over e of w_e(prompt) delta_e: not the mixture of probabilities, but its first-order neighbour in weights. The
    prompt is what the first `extend` of a text brings; its weights stay until the text ends. A row is scored as if its text were
    continued anew at every block: tokens b … b + block - 1 as after the prompt x_<b, read under that prompt's weights; those of the first
    block as after the first token. So `score` says what `extend` would.
    """

    def __init__(self, ensemble: Ensemble, store: Store, device: torch.device | str | None = None):
        """Raises ForeignExpert, UnknownName, BadInput where an expert is no adapter or the router has a memory."""
        self.routing, self.experts, self.router, self.names = open_forest(ensemble, store, device)
        if router_of(self.routing).memory:
            raise BadInput(f"router {ensemble.router!r} runs experts to weigh them, and mixing weights runs none: choose 'centroid'")
        if not self.routing.chooses_anew:
            raise BadInput("mixing weights chooses experts once for a prompt: leave out every, shortlist, margin, sure and far")
        self.experts.adapters_only()
        seed, self.stops, self.block = self.experts.seed, self.experts.stops, ensemble.block
        self.context, self.vocabulary, self.separator = seed.context, seed.vocabulary, seed.separator

    def score(self, tokens_BT: Any) -> Tensor:
        """log p(x_t | x_<t) [B, T], float32 on the CPU; each row is a document of its own."""
        return score_rows(self.score_windows, tokens_BT)

    def score_windows(self, windows: Windows, wanted_W: Ints, progress: Progress = silent) -> Tensor:
        """log p of the scored tokens of some windows (ascending), in order [n] float32 on the CPU: one pass for each block, over all of
        the window that comes before its end. The prompt of a block is the whole document before it."""
        here_W = np.isin(windows.document_W, windows.document_W[wanted_W])
        wanted_W = np.flatnonzero(np.isin(np.flatnonzero(here_W), wanted_W))
        windows = Windows(*(part[here_W] for part in windows))
        weight_NC = weights(Signals(self.router.distances(windows)), self.routing)
        end_W = np.cumsum(windows.count_W)
        begin_W = end_W - windows.length_W  # the weights of token l of window w: row begin_W[w] + l
        loglik_WL = np.zeros(windows.rows_WL.shape, np.float32)
        total, done = int(windows.length_W[wanted_W].sum()), 0
        progress("score", 0, total, "tokens")
        for batch in windows.batches(wanted_W, TOKENS):
            longest = int(windows.length_W[batch].max())
            for first, end in self._blocks(int(windows.score_from_W[batch].min()), longest):
                weight_BC = weight_NC[np.minimum(begin_W[batch] + first, end_W[batch] - 1)]
                loglik_WL[batch, first:end] = self.experts.score_mixed(weight_BC, windows.rows_WL[batch, :end], end - first)
            done += int(windows.length_W[batch].sum())
            progress("score", done, total, "tokens")
        return torch.from_numpy(loglik_WL[wanted_W][windows.scored_WL[wanted_W]])

    def _blocks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The blocks of a row that end after `begin`, without its first token, which is given."""
        for first in range(begin - begin % self.block, end, self.block):
            if max(1, first) < min(first + self.block, end):
                yield max(1, first), min(first + self.block, end)

    def start(self) -> PromptText:
        return PromptText()

    def extend(self, tokens_T: Sequence[int], cache: PromptText) -> tuple[Tensor, PromptText]:
        self.experts.check(tokens_T, len(cache.tokens) + len(tokens_T))
        if cache.weight_C is None:
            cache.weight_C = weights(Signals(self.router.push(tokens_T)), self.routing)[0]
            cache.shares = {self.names[c]: float(cache.weight_C[c]) for c in np.flatnonzero(cache.weight_C)}
        return self.experts.extend_mixed(cache.weight_C, tokens_T, cache).cpu(), cache
