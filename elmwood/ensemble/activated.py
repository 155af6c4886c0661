"""Experts that act from the end of a prompt on, so that its keys and values are the seed's, read once for all of them (activated LoRA,
arXiv:2504.12397). Ordinary LoRA experts keep most of their gain when they are read so (docs/log/modes.md).

Shapes: C candidates (experts by digest, the seed last), A of them active, B rows, T tokens, W windows, N scored tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache

from elmwood.corpus.tokens import Windows
from elmwood.domains.route import Routing, Signals, candidates, remember, router_of, weights
from elmwood.engine import Progress, silent
from elmwood.ensemble.forest import open_forest, score_rows
from elmwood.errors import BadInput
from elmwood.lm.experts import BASE, Body, Experts, Text
from elmwood.records import Ensemble
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

TOKENS = 2048  # in one batch, padding included


class ActivatedText(Text):
    """A text whose candidates were found at the end of its prompt."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.shares: dict[str, float] = {}
        self.active: list[int] = []  # empty until the prompt is read
        self.dist2_1E: Floats | None = None  # at the end of the prompt
        self.memory_C = np.zeros(count)  # of the tokens after the prompt, nats


class ActivatedLM:
    """A sparse ensemble of LoRA experts that act from the last token of the prompt on: the seed reads all before it.

    The prompt is what the first `extend` of a text brings. Candidates are those of its end, and stay; a router with a memory weighs them by
    what they say after it. As with WeightsLM a row is scored as if its text were continued anew at every block: tokens b … b + block - 1 as
    after the prompt x_<b; those of the first block as after the first token.
    """

    def __init__(self, ensemble: Ensemble, store: Store, device: torch.device | str | None = None):
        """Raises ForeignExpert, UnknownName, BadInput where an expert is no adapter, or the seed keeps more than keys and values."""
        self.routing, self.experts, self.router, self.names = open_forest(ensemble, store, device)
        check_anew(self.routing)
        self.experts.adapters_only()
        self.memory = router_of(self.routing).memory is not None
        seed, self.stops, self.block = self.experts.seed, self.experts.stops, ensemble.block
        self.context, self.vocabulary, self.separator = seed.context, seed.vocabulary, seed.separator
        with torch.inference_mode():
            if not self.experts.cache(BASE, Text()).layers:
                raise BadInput(f"{seed.name} keeps more of a text than keys and values, which experts could share: mix outputs instead")

    # ---- one text

    def start(self) -> ActivatedText:
        return ActivatedText(len(self.experts))

    def extend(self, tokens_T: Sequence[int], cache: ActivatedText) -> tuple[Tensor, ActivatedText]:
        """Log-probabilities [V] of the token after these."""
        experts, text, seed = self.experts, cache, len(self.experts) - 1
        experts.check(tokens_T, len(text.tokens) + len(tokens_T))
        prompt = not text.active
        if prompt:
            text.dist2_1E = self.router.push(tokens_T)
            text.active = np.flatnonzero(candidates(self._signals(text), self.routing)[0]).tolist()
            if len(tokens_T) > 1:
                logp_1V, _ = experts.extend([seed], tokens_T[:-1], text)
                branch(experts, seed, logp_1V[0], text.active, text)
                tokens_T = tokens_T[-1:]
        logp_AV, news = experts.follow(text.active, tokens_T, text)
        if self.memory and not prompt:
            left_U = self.routing.fading ** np.arange(len(tokens_T) - 1, -1, -1)
            for c, (_, loglik_U) in zip(text.active, news, strict=True):
                text.memory_C[c] = text.memory_C[c] * self.routing.fading ** len(tokens_T) + left_U @ loglik_U.numpy()
        weight_A = weights(self._signals(text), self.routing)[0, text.active]
        text.shares = {self.names[c]: float(weight) for c, weight in zip(text.active, weight_A, strict=True) if weight}
        return torch.logsumexp(logp_AV + torch.from_numpy(weight_A).to(logp_AV.device).log()[:, None], 0).float().cpu(), text

    def _signals(self, text: ActivatedText) -> Signals:
        return Signals(text.dist2_1E, text.memory_C[None])

    # ---- many texts

    def score(self, tokens_BT: Any) -> Tensor:
        """log p(x_t | x_<t) [B, T], float32 on the CPU; each row is a document of its own."""
        return score_rows(self.score_windows, tokens_BT)

    @torch.inference_mode()
    def score_windows(self, windows: Windows, wanted_W: Ints, progress: Progress = silent) -> Tensor:
        """log p of the scored tokens of some windows (ascending), in order [n] float32 on the CPU: the seed reads each window, and each
        candidate of a block its tokens. A router looks at the whole document before a block, and remembers what of it the window scores."""
        here_W = np.isin(windows.document_W, windows.document_W[wanted_W])
        wanted_W = np.flatnonzero(np.isin(np.flatnonzero(here_W), wanted_W))
        windows = Windows(*(part[here_W] for part in windows))
        window_N, token_N = np.nonzero(windows.scored_WL)
        end_W = np.cumsum(windows.count_W)
        begin_W = end_W - windows.length_W  # what is known before token l of window w: row begin_W[w] + l
        first_N = np.maximum(1, token_N - token_N % self.block)
        dist2_NE, shape = self.router.distances(windows), (len(window_N), len(self.experts))
        if dist2_NE is not None:
            dist2_NE = dist2_NE[begin_W[window_N] + first_N]
        live_NC = candidates(Signals(dist2_NE, np.broadcast_to(0.0, shape)), self.routing)
        loglik_NC, total, done = np.zeros(shape, np.float32), int(windows.length_W[wanted_W].sum()), 0
        progress("score", 0, total, "tokens")
        for batch in windows.batches(wanted_W, TOKENS):
            tokens_BL = torch.as_tensor(windows.rows_WL[batch, : int(windows.length_W[batch].max())], dtype=torch.long)
            spans = [slice(end_W[w] - windows.count_W[w], end_W[w]) for w in batch]
            self._read(
                tokens_BL, int(windows.score_from_W[batch[0]]), [live_NC[span] for span in spans], [loglik_NC[span] for span in spans]
            )
            done += int(windows.length_W[batch].sum())
            progress("score", done, total, "tokens")
        block_N = np.cumsum(np.diff(window_N * windows.rows_WL.shape[1] + first_N, prepend=-1) != 0)
        memory_NC = remember(loglik_NC, self.routing.fading, block_N) if self.memory else None
        weight_NC = weights(Signals(dist2_NE, memory_NC), self.routing)
        mixed_N = torch.logsumexp(torch.from_numpy(weight_NC).log() + torch.from_numpy(loglik_NC), 1).float()
        return mixed_N[np.isin(window_N, wanted_W)]

    def _read(self, tokens_BL: Tensor, since: int, live_B: Sequence[NDArray[np.bool_]], loglik_B: Sequence[Floats]) -> None:
        """Write down what each live candidate gives the tokens of some windows from `since` on, [n, C] of each window."""
        experts, members = whole(self.experts)
        experts.check(tokens_BL.flatten(), tokens_BL.shape[1] - 1)
        tokens_BL, body = tokens_BL.to(experts.device), experts.body(BASE)
        kept: Any = DynamicCache()
        seed, length = len(experts) - 1, tokens_BL.shape[1]
        said_BL = read_on(experts, body, seed, tokens_BL, kept)
        for loglik_nC, row_L in zip(loglik_B, said_BL[:, since - 1 :].cpu().numpy(), strict=True):
            loglik_nC[:, -1] = row_L[: len(loglik_nC)]
        for first, end in self._blocks(since, length):
            begin, skip = max(first, since), max(first, since) - since
            for c in range(len(members) - 1):
                rows = [b for b, live_nC in enumerate(live_B) if live_nC[skip : end - since, c].any()]
                if rows:
                    past = DynamicCache()
                    for number, layer in enumerate(kept.layers):
                        past.update(layer.keys[rows, :, : first - 1], layer.values[rows, :, : first - 1], number)
                    said_BU = read_on(experts, body, members[c], tokens_BL[rows, first - 1 : end], past)[:, begin - first :].cpu().numpy()
                    for b, row_U in zip(rows, said_BU, strict=True):
                        mine_n = loglik_B[b][skip : end - since, c]
                        mine_n[:] = row_U[: len(mine_n)]

    def _blocks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The blocks of a row that end after `begin`, without its first token, which is given."""
        for first in range(begin - begin % self.block, end, self.block):
            if max(1, first) < min(first + self.block, end):
                yield max(1, first), min(first + self.block, end)


def check_anew(routing: Routing) -> None:
    """Raises BadInput."""
    if not routing.chooses_anew:
        raise BadInput("activated experts are chosen once for a prompt: leave out every, shortlist, margin, sure and far")


def whole(experts: Any) -> tuple[Experts, Sequence[int]]:
    """All experts, and which of them these are."""
    return getattr(experts, "whole", experts), getattr(experts, "members", range(len(experts)))


def branch(experts: Any, e: int, logp_V: Tensor, others: Sequence[int], text: Text) -> None:
    """Let candidates over the shared base read on from where another is, as if they had read what it has and expected the same."""
    every, members = whole(experts)
    others = [members[c] for c in others if c != e]
    number = [every.places[c][1] for c in (members[e], *others)]
    every.cache(BASE, text).copy(number[0], number[1:])
    text.next |= dict.fromkeys((members[e], *others), logp_V)


def read_on(experts: Experts, body: Body, e: int, tokens_BU: Tensor, past: DynamicCache) -> Tensor:
    """log p of the tokens after the first of each row under a candidate, after what is kept [B, U - 1]; what it reads is kept too."""
    if body.bank:
        body.bank.select([experts.places[e][1]])
    logits_BUV = body.model(input_ids=tokens_BU[:, :-1], cache=past, use_cache=True).logits
    return torch.log_softmax(logits_BUV.float(), -1).gather(-1, tokens_BU[:, 1:, None])[..., 0]
