"""A sparse mixture of experts' next-token probabilities (c-BTM, arXiv:2303.14177), and the one door to every model.

Shapes: E candidates (experts by digest, the seed last where it is one), A of them with weight, B rows, T tokens, V vocabulary.

p(x_t | x_<t) = sum over e of w_e(x_<t) p_e(x_t | x_<t). Only candidates with weight are run.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmwood.corpus.tokens import token_bytes
from elmwood.domains import embed
from elmwood.domains.partition import centroids
from elmwood.domains.route import ROUTERS, Walk, candidates, gate, token_distances
from elmwood.errors import BadInput, ForeignExpert, UnknownName
from elmwood.lm.experts import Experts, OneLM, Text
from elmwood.lm.interface import LM
from elmwood.lm.load import tokenizer
from elmwood.records import Ensemble, Expert, Forest, Partition, Record, Seed
from elmwood.store import Store

Floats = NDArray[np.floating]


class Gate:
    """Text -> the weight of each candidate, by an ensemble's settings."""

    def __init__(self, ensemble: Ensemble, partition: Partition, experts: Sequence[Expert], seed: Seed, store: Store):
        if ensemble.router not in ROUTERS:  # a record may come from a stranger, so no 'module:function' here
            raise UnknownName(f"the ensemble asks for router {ensemble.router!r}; have {', '.join(sorted(ROUTERS))}")
        self.ensemble, self.router = ensemble, ROUTERS[ensemble.router]
        if self.router.signal not in ("dense", "sparse"):
            raise BadInput(
                f"router {ensemble.router!r} goes by more than the text so far, so it cannot generate: choose 'centroid' or 'sparse'"
            )
        self.embedder = embed.load(partition.embedder, store)
        self.centroids_E = centroids(partition, store, self.router.signal)[[_domain(expert, partition) for expert in experts]]
        spelled = token_bytes(tokenizer(seed, store))
        self.spelled = spelled + [b""] * (seed.vocabulary - len(spelled))  # some embeddings are padded with rows nobody uses

    def tokens(self, tokens_T: Sequence[int]) -> Floats:
        """Row t: weights for predicting token t [T, E]."""
        return self._weights(token_distances(self.embedder, self.centroids_E, tokens_T, self.spelled))

    def walk(self) -> Walk:
        """The routing of an empty text."""
        return Walk(self.embedder, self.centroids_E)

    def push(self, walk: Walk, tokens_T: Sequence[int]) -> Floats:
        """Let a text grow; weights for predicting what comes next [E]."""
        return self._weights(walk.push(b"".join(self.spelled[token] for token in tokens_T))[None])[0]

    def _weights(self, dist2_NE: Floats) -> Floats:
        return gate(self.router(candidates(dist2_NE, self.ensemble.seed_distance)), self.ensemble.temperature, self.ensemble.top_k)


def _domain(expert: Expert, partition: Partition) -> int:
    """The row of an expert's centroid. Raises ForeignExpert."""
    if expert.partition != partition.digest or expert.domain is None:
        where = "no domain" if expert.domain is None else f"partition {(expert.partition or 'none')[:8]}"
        raise ForeignExpert(f"expert {expert.digest[:8]} is of {where}, the forest's partition is {partition.digest[:8]}: leave it out")
    return expert.domain


class Mixed(Text):
    """A text that an ensemble reads."""

    def __init__(self, walk: Walk) -> None:
        super().__init__()
        self.spoke: dict[str, float] = {}
        self.walk = walk


class EnsembleLM:
    """A sparse ensemble as an LM (see elmwood/lm/interface.py)."""

    def __init__(self, ensemble: Ensemble, store: Store, device: torch.device | str | None = None):
        """Raises ForeignExpert, UnknownName."""
        forest = store.load(ensemble.forest, Forest)
        seed, partition = store.load(forest.seed, Seed), store.load(forest.partition, Partition)
        self.experts = Experts(seed, [store.load(digest, Expert) for digest in forest.experts], store, device)
        self.gate = Gate(ensemble, partition, self.experts.experts, seed, store)
        self.names = [*_names(self.experts.experts, partition), "seed"]
        self.context, self.vocabulary, self.separator = seed.context, seed.vocabulary, seed.separator
        self.stops = self.experts.stops

    def score(self, tokens_BT: Any) -> Tensor:
        """log p(x_t | x_<t) [B, T], float32 on the CPU; each row is routed by its own tokens."""
        tokens_BT = torch.as_tensor(tokens_BT, dtype=torch.long)
        weight_BTE = torch.from_numpy(np.stack([self.gate.tokens(row) for row in tokens_BT.tolist()]))
        weight_BTE[:, 0] = 0  # the first token is given
        loglik_BT = torch.full(tokens_BT.shape, -torch.inf, dtype=torch.float64)
        for e in range(weight_BTE.shape[2]):
            rows = weight_BTE[:, :, e].any(1).nonzero().flatten()
            if len(rows):
                mine_BT = weight_BTE[rows, :, e].log() + self.experts.score(e, tokens_BT[rows])
                loglik_BT[rows] = torch.logaddexp(loglik_BT[rows], mine_BT)
        loglik_BT[:, 0] = 0
        return loglik_BT.float()

    def start(self) -> Mixed:
        return Mixed(self.gate.walk())

    def extend(self, tokens_T: Sequence[int], cache: Mixed) -> tuple[Tensor, Mixed]:
        """Log-probabilities [V] of the token after these, from the candidates that the text so far calls for."""
        self.experts.check(tokens_T, len(cache.tokens) + len(tokens_T))
        weight_E = self.gate.push(cache.walk, tokens_T)
        active = np.flatnonzero(weight_E)
        logp_AV, _ = self.experts.extend(active.tolist(), tokens_T, cache)
        weight_A = torch.from_numpy(weight_E[active]).to(logp_AV.device)
        cache.spoke = {self.names[e]: float(weight_E[e]) for e in active}
        return torch.logsumexp(logp_AV + weight_A.log()[:, None], 0).float().cpu(), cache


def _names(experts: Sequence[Expert], partition: Partition) -> list[str]:
    """What each expert is called: its domain, and its digest where it shares the domain."""
    domains = [partition.domains[_domain(expert, partition)].name for expert in experts]
    return [f"{name}:{expert.digest[:8]}" if domains.count(name) > 1 else name for name, expert in zip(domains, experts, strict=True)]


def open_model(record: Record, store: Store, device: torch.device | str | None = None) -> LM:
    """A seed, an expert or an ensemble as an LM: the one place that looks at what kind of model a record is. Raises UnknownName."""
    match record:
        case Seed():
            return OneLM(Experts(record, [], store, device), 0, "seed")
        case Expert():
            return OneLM(Experts(store.load(record.seed, Seed), [record], store, device), 0, record.digest[:8])
        case Ensemble():
            return EnsembleLM(record, store, device)
    raise UnknownName(f"a {record.kind} is not a model; a seed, an expert or an ensemble is: `elmwood show` lists what there is")
