"""A sparse mixture of experts' next-token probabilities (c-BTM, arXiv:2303.14177), and the function that opens every model.

Shapes: C candidates (experts by digest, the seed last), A of them active, B rows, T tokens, W windows, N scored tokens of several
documents, V vocabulary.

p(x_t | x_<t) = sum over c of w_c(x_<t) p_c(x_t | x_<t). Only candidates that may have weight are run. A router with a memory weighs a
candidate by what it said of the text so far, all of it: one that joins late reads what it missed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmwood.corpus.tokens import Windows
from elmwood.domains.route import Signals, candidates, places, remember, router_of, searches, weights
from elmwood.engine import Progress, silent
from elmwood.ensemble.activated import ActivatedLM
from elmwood.ensemble.bounded import BoundedLM
from elmwood.ensemble.forest import open_forest, score_rows
from elmwood.ensemble.one import OneLM
from elmwood.ensemble.prompt_weights import WeightsLM
from elmwood.ensemble.text_router import Walk, sure_of, weigh
from elmwood.errors import UnknownName
from elmwood.lm.experts import Expected, Experts, Text
from elmwood.lm.interface import LM
from elmwood.records import Ensemble, Expert, Merged, Mixture, Record, Seed
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]


class MixedText(Text):
    """A text that an ensemble reads."""

    def __init__(self, walk: Walk | None, count: int) -> None:
        super().__init__()
        self.shares: dict[str, float] = {}
        self.walk = walk  # none where the router looks at no distances
        self.alone: int | None = None  # the candidate that is so until the next search
        self.memory_C = np.zeros(count)  # up to the last token that each candidate has read, nats


class Weighed(NamedTuple):
    """The wanted windows, and of their scored tokens the weights of the candidates [n, C] float64 and their log-likelihoods [n, C]."""

    windows: Windows
    weight_nC: Floats
    loglik_nC: Floats


class EnsembleLM:
    """A sparse ensemble as an LM (see elmwood/lm/interface.py)."""

    def __init__(self, ensemble: Ensemble, store: Store, device: torch.device | str | None = None):
        """Raises ForeignExpert, UnknownName."""
        self.routing, self.experts, self.router, self.names = open_forest(ensemble, store, device)
        self.memory = router_of(self.routing).memory is not None
        seed, self.stops = self.experts.seed, self.experts.stops
        self.context, self.vocabulary, self.separator = seed.context, seed.vocabulary, seed.separator

    def score(self, tokens_BT: Any) -> Tensor:
        """log p(x_t | x_<t) [B, T], float32 on the CPU; each row is a document of its own."""
        return score_rows(self.score_windows, tokens_BT)

    def score_windows(self, windows: Windows, wanted_W: Ints, progress: Progress = silent) -> Tensor:
        """log p of the scored tokens of some windows (ascending), in order [n] float32 on the CPU.

        Models read a window, routers the whole document so far: distances are of all its text, and the memory is of every token as it
        was scored, once. So a router with a memory has candidates read the windows before those that are wanted as well, as far back as it
        reaches.
        """
        weighed = self.weigh(windows, wanted_W, progress)
        return torch.logsumexp(torch.from_numpy(weighed.weight_nC).log() + torch.from_numpy(weighed.loglik_nC), 1).float()

    def weigh(self, windows: Windows, wanted_W: Ints, progress: Progress = silent) -> "Weighed":
        """The weight of each candidate at each scored token of some windows, and what it gave the token."""
        reached_W = _leading_to(np.isin(np.arange(len(windows.rows_WL)), wanted_W)[:, None], windows, np.inf)[:, 0]
        asked_W = np.isin(np.flatnonzero(reached_W), wanted_W)
        windows = Windows(*(part[reached_W] for part in windows))
        window_N = np.repeat(np.arange(len(asked_W)), windows.count_W)
        wanted_N = np.repeat(asked_W, windows.count_W)
        dist2_NE, shape = self.router.distances(windows), (len(window_N), len(self.experts))
        document_N = windows.document_W[window_N]
        place_N = places(document_N)
        live_NC = candidates(Signals(dist2_NE, np.broadcast_to(0.0, shape), place_N), self.routing) & wanted_N[:, None]
        read_WC = np.column_stack([np.bincount(window_N, live_N, len(asked_W)) > 0 for live_N in live_NC.T])
        if self.memory:
            read_WC = _leading_to(read_WC, windows, self.routing.reach + (self.routing.every if self.routing.sure else 0))
        size = float(windows.length_W[asked_W].sum())  # passes of several candidates over a token count as one
        passes = max(float((windows.length_W @ read_WC).sum()), 1.0)
        loglik_NC = self.experts.score_each(windows, read_WC, lambda done: progress("score", size * done / passes, size, "tokens"))
        memory_NC = remember(loglik_NC, self.routing.fading, document_N) if self.memory else None
        weight_nC = weights(Signals(dist2_NE, memory_NC, place_N), self.routing)[wanted_N]
        return Weighed(Windows(*(part[asked_W] for part in windows)), weight_nC, loglik_NC[wanted_N])

    def start(self) -> MixedText:
        return MixedText(self.router.start(), len(self.experts))

    def extend(self, tokens_T: Sequence[int], cache: MixedText) -> tuple[Tensor, MixedText]:
        """Log-probabilities [V] of the token after these, from the candidates of the text so far."""
        weight, logp = self.read(tokens_T, cache)
        logp_AV, weight_A = torch.stack(list(logp.values())), torch.tensor(list(weight.values()), dtype=torch.float64)
        return torch.logsumexp(logp_AV + weight_A.to(logp_AV.device).log()[:, None], 0).float().cpu(), cache

    def read(self, tokens_T: Sequence[int], text: MixedText) -> Expected:
        """As `extend`, candidate by candidate."""
        begin = len(text.tokens)
        self.experts.check(tokens_T, begin + len(tokens_T))
        if self.routing.sure:  # the candidates of the last search, and what they have said by then, decide who is alone
            asked_T = np.flatnonzero(searches(np.arange(begin, begin + len(tokens_T)), self.routing.every))
            first = int(asked_T[-1]) if len(asked_T) else 0
            if first:
                self._expect(tokens_T[:first], [], tokens_T[:first], text)
                tokens_T = tokens_T[first:]
        return self._expect(tokens_T, [], tokens_T, text)

    def hear(self, token: int, loglik: Mapping[int, float], text: MixedText) -> Expected:
        """Add a token that some candidates have read, or are reading, and gave this log-likelihood; those that join read all there is."""
        text.tokens.append(token)
        if self.memory:
            for c, nats in loglik.items():
                text.memory_C[c] = text.memory_C[c] * self.routing.fading + nats
        return self._expect([token], list(loglik), None, text)

    def _expect(self, said_T: Sequence[int], ready: Sequence[int], unread_T: Sequence[int] | None, text: MixedText) -> Expected:
        """The text has grown by some tokens: let its candidates read those, but for the ones that are ready, and weigh them all."""
        near = self.router.follow(text.walk, said_T, self.routing) if text.walk else None
        decides = self.routing.sure is not None and near is not None and near.place == text.walk.searched.place  # type: ignore[union-attr]
        if decides:
            text.alone = None if self.memory else sure_of(*weigh(near, text.memory_C, self.routing), self.routing)
        active = weigh(near, text.memory_C, self.routing)[0] if text.alone is None else [text.alone]
        joined = [c for c in active if c not in ready]
        logp_AV = torch.empty(0)
        if joined:
            logp_AV = self._follow(joined, unread_T, text) if self.memory else self.experts.extend(joined, unread_T, text)[0]
        weight_A = weigh(near, text.memory_C, self.routing)[1] if text.alone is None else [1.0]
        if decides and self.memory:
            text.alone = sure_of(active, weight_A, self.routing)
        text.shares = {self.names[c]: weight for c, weight in zip(active, weight_A, strict=True) if weight}
        return Expected(dict(zip(active, weight_A, strict=True)), dict(zip(joined, logp_AV, strict=True)))

    def _follow(self, active: Sequence[int], tokens_T: Sequence[int] | None, text: MixedText) -> Tensor:
        """Let candidates read on, and update their memory."""
        logp_AV, news = self.experts.follow(active, tokens_T, text)
        for c, (first, loglik_U) in zip(active, news, strict=True):
            left_U = self.routing.fading ** np.arange(len(loglik_U) - 1, -1, -1)
            before = text.memory_C[c] * self.routing.fading ** len(loglik_U) if first else 0.0
            text.memory_C[c] = before + left_U @ loglik_U.numpy()
        return logp_AV


def _leading_to(flag_WX: Bools, windows: Windows, reach: float) -> Bools:
    """The windows with a flag, and those that end less than `reach` tokens before one of their document [W, X]."""
    end_W = np.cumsum(windows.count_W)
    found_WX, next_X = flag_WX.copy(), np.full(flag_WX.shape[1], np.inf)  # where the next window with a flag begins
    for w in reversed(range(len(flag_WX))):
        if w + 1 == len(flag_WX) or windows.document_W[w + 1] != windows.document_W[w]:
            next_X[:] = np.inf
        found_WX[w] |= next_X - end_W[w] < reach
        next_X[flag_WX[w]] = end_W[w] - windows.count_W[w]
    return found_WX


def open_model(record: Record, store: Store, device: torch.device | str | None = None) -> LM:
    """A model's record as an LM: the one place that looks at what kind of model it is. Raises UnknownName."""
    match record:
        case Seed():
            return OneLM(Experts(record, [], store, device), 0, "seed")
        case Expert() | Merged() | Mixture():
            return OneLM(Experts(store.load(record.seed, Seed), [record], store, device), 0, record.digest[:8])
        case Ensemble():
            if record.mixing == "weights":
                return WeightsLM(record, store, device)
            if record.mixing == "activated":
                return ActivatedLM(record, store, device)
            mixture = EnsembleLM(record, store, device)
            return mixture if record.is_sum else BoundedLM(mixture, record)
    raise UnknownName(
        f"a {record.kind} is not a model; a seed, an expert, a merge, a mixture or an ensemble is: `elmwood show` lists what there is"
    )
