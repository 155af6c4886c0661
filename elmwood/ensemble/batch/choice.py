"""A model whose router may choose from some of its candidates only: forced and excluded experts, over the same weights in memory."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from elmwood.corpus.tokens import Windows
from elmwood.ensemble.activated import ActivatedLM
from elmwood.ensemble.bounded import BoundedLM
from elmwood.ensemble.mixture import EnsembleLM
from elmwood.ensemble.one import OneLM
from elmwood.ensemble.prompt_weights import WeightsLM
from elmwood.ensemble.text_router import TextRouter
from elmwood.errors import BadInput
from elmwood.lm.experts import Experts

SEED = "seed"


def allowed(known: Sequence[str], only: Collection[str], without: Collection[str]) -> list[str]:
    """Which candidates (digests of experts, and "seed", in this order) a request leaves. Raises BadInput."""
    for name in (*only, *without):
        if name not in known:
            raise BadInput(f"{name!r} is no candidate of this model: name digests of its experts, or 'seed'")
    left = [name for name in known if (not only or name in only) and name not in without]
    if not left:
        raise BadInput("no candidate is left: name fewer in `without`, or more in `only`")
    return left


def choose(lm: Any, only: Collection[str] = (), without: Collection[str] = ()) -> Any:
    """The model with some of its candidates. An expert or the seed alone answers without a router. Raises BadInput."""
    if not only and not without:
        return lm
    mixture = lm.mixture if isinstance(lm, BoundedLM) else lm
    experts: Experts = mixture.experts
    known = [*(expert.digest for expert in experts.experts), SEED]
    left = allowed(known, only, without)
    if len(left) == 1 and not (isinstance(lm, BoundedLM) and known.index(left[0]) in lm.bounded):
        e = known.index(left[0])
        return OneLM(experts, e, mixture.names[e] if hasattr(mixture, "names") else left[0])
    if not isinstance(mixture, EnsembleLM | WeightsLM | ActivatedLM):
        raise BadInput("this model has no router: name one of its candidates, or none")
    has_seed = mixture.routing.seed_distance is not None
    if SEED in only and not has_seed:
        raise BadInput("the seed is no candidate of this router, so it has no weight beside experts: name it alone, or leave it out")
    members = [e for e, digest in enumerate(known[:-1]) if digest in left]
    if not members:
        raise BadInput("no expert is left beside the seed: name it alone with `only`")
    chosen: Any = copy.copy(mixture)
    chosen.experts, chosen.router = SomeExperts(experts, members), SomePlaces(mixture.router, members)
    chosen.names = [*(mixture.names[e] for e in members), mixture.names[-1]]
    chosen.routing = mixture.routing if SEED in left else replace(mixture.routing, seed_distance=None)
    if not isinstance(lm, BoundedLM):
        return chosen
    bounded = copy.copy(lm)
    bounded.mixture, bounded.seed = chosen, len(members)
    bounded.bounded = {c for c, e in enumerate(members) if e in lm.bounded}
    return bounded


class SomeExperts:
    """Some of the experts, and the seed as the last."""

    def __init__(self, experts: Experts, members: Sequence[int]):
        self.whole, self.members = experts, [*members, len(experts) - 1]
        self.experts = tuple(experts.experts[e] for e in members)
        self.seed, self.stops, self.device = experts.seed, experts.stops, experts.device
        self.check, self.start, self.end = experts.check, experts.start, experts.end

    def __len__(self) -> int:
        return len(self.members)

    def predict(self, c: int, tokens_BT: Any) -> Tensor:
        return self.whole.predict(self.members[c], tokens_BT)

    def score_windows(self, c: int, windows: Windows, wanted_W: Any, report: Any) -> Tensor:
        return self.whole.score_windows(self.members[c], windows, wanted_W, report)

    def score_each(self, windows: Windows, read_WC: Any, report: Any) -> Any:
        read_WE = np.zeros((len(read_WC), len(self.whole)), bool)
        read_WE[:, self.members] = read_WC
        return self.whole.score_each(windows, read_WE, report)[:, self.members]

    def extend(self, active: Sequence[int], tokens_T: Sequence[int] | None, text: Any) -> Any:
        return self.whole.extend([self.members[c] for c in active], tokens_T, text)

    def follow(self, active: Sequence[int], tokens_T: Sequence[int] | None, text: Any) -> Any:
        return self.whole.follow([self.members[c] for c in active], tokens_T, text)

    def score_mixed(self, weight_BC: Any, tokens_BT: Any, last: int) -> Tensor:
        return self.whole.score_mixed(self._spread(weight_BC), tokens_BT, last)

    def extend_mixed(self, weight_C: Any, tokens_T: Sequence[int], text: Any) -> Tensor:
        return self.whole.extend_mixed(self._spread(weight_C), tokens_T, text)

    def _spread(self, weight_XC: Any) -> Any:
        weight_XE = np.zeros((*np.shape(weight_XC)[:-1], len(self.whole)))
        weight_XE[..., self.members] = weight_XC
        return weight_XE


class SomePlaces:
    """A text's place among some of the experts."""

    def __init__(self, router: TextRouter, members: Sequence[int]):
        self.whole, self.members = router, list(members)

    def distances(self, windows: Windows) -> Any:
        found = self.whole.distances(windows)
        return None if found is None else found[:, self.members]

    def start(self) -> Any:
        return self.whole.start(self.members)

    def push(self, tokens_T: Sequence[int]) -> Any:
        found = self.whole.push(tokens_T)
        return None if found is None else found[:, self.members]

    def follow(self, walk: Any, tokens_T: Sequence[int], routing: Any) -> Any:
        near = self.whole.follow(walk, tokens_T, routing)
        return near._replace(expert_A=np.searchsorted(self.members, near.expert_A))
