"""A sparse mixture of experts' next-token probabilities (c-BTM, arXiv:2303.14177), and the one door to every model.

Shapes: E candidates (experts by digest, the seed last where it is one), A of them with weight, B rows, T tokens, V vocabulary.

p(x_t | x_<t) = sum over e of w_e(x_<t) p_e(x_t | x_<t). Only candidates with weight are run, save by `posterior`, which weighs
each by what it said of the text so far and so must run all.
"""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmwood.corpus.tokens import token_bytes
from elmwood.domains import embed
from elmwood.domains.partition import centroids, serving
from elmwood.domains.route import ROUTERS, Walk, candidates, gate, nearest_place, posterior_scores, token_distances
from elmwood.errors import BadInput, ForeignExpert, UnknownName
from elmwood.lm.experts import Experts, OneLM, Text
from elmwood.lm.files import tokenizer
from elmwood.lm.hidden_states import seed_states
from elmwood.lm.interface import LM
from elmwood.records import Ensemble, Expert, Forest, Merged, Mixture, Partition, Recipe, Record, Seed
from elmwood.store import Store

Floats = NDArray[np.floating]


class Gate:
    """Text -> the weight of each candidate, by an ensemble's settings."""

    def __init__(self, ensemble: Ensemble, partition: Partition, experts: Sequence[Expert], seed: Seed, store: Store):
        if ensemble.router not in ROUTERS:  # a record may come from a stranger, so no 'module:function' here
            raise UnknownName(f"the ensemble asks for router {ensemble.router!r}; have {', '.join(sorted(ROUTERS))}")
        self.ensemble, self.router = ensemble, ROUTERS[ensemble.router]
        if self.router.signal == "domain":
            raise BadInput(
                f"router {ensemble.router!r} is a bound for tables: it knows the domain of the whole document, and a text that is still "
                "being written has none; choose 'centroid', 'sparse' or 'posterior'"
            )
        self.places_E = places(experts, partition, store)
        if self.by_loglik:
            return
        self.embedder = embed.load(partition.embedder, store, seed_states)
        self.centroids_P = centroids(partition, store, self.router.signal)[list(chain.from_iterable(self.places_E))]
        starts_E = np.cumsum([0, *map(len, self.places_E)])
        self.own_E = [range(first, last) for first, last in pairwise(starts_E.tolist())]  # rows of these centroids
        spelled = token_bytes(tokenizer(seed, store))
        self.spelled = spelled + [b""] * (seed.vocabulary - len(spelled))  # some embeddings are padded with rows nobody uses

    @property
    def by_loglik(self) -> bool:
        """Whether weights follow from what the candidates say of the text, and not from distances."""
        return self.router.signal == "loglik"

    @property
    def seed_joins(self) -> bool:
        return self.ensemble.seed_distance is not None

    def tokens(self, tokens_T: Sequence[int]) -> Floats:
        """Row t: weights for predicting token t [T, E]."""
        return self._weights(token_distances(self.embedder, self.centroids_P, tokens_T, self.spelled))

    def walk(self) -> Walk | None:
        """The routing of an empty text."""
        return None if self.by_loglik else Walk(self.embedder, self.centroids_P)

    def push(self, walk: Walk, tokens_T: Sequence[int]) -> Floats:
        """Let a text grow; weights for predicting what comes next [E]."""
        return self._weights(walk.push(b"".join(self.spelled[token] for token in tokens_T))[None])[0]

    def prompt(self, tokens_T: Sequence[int]) -> Floats:
        """Weights for predicting what comes after these [E]."""
        return self.push(Walk(self.embedder, self.centroids_P), tokens_T)

    def believe(self, before_NE: Floats) -> Floats:
        """Weights [N, E] from the log-likelihood of the text so far under each candidate. Experts are alike at first; the seed
        begins behind by its distance, in nats."""
        head_1E = np.zeros((1, before_NE.shape[1]))
        if self.ensemble.seed_distance is not None:
            head_1E[0, -1] = -self.ensemble.seed_distance
        return gate(self.router(before_NE + head_1E), self.ensemble.temperature, self.ensemble.top_k)

    def _weights(self, dist2_NP: Floats) -> Floats:
        dist2_NE = nearest_place(dist2_NP, self.own_E)
        return gate(self.router(candidates(dist2_NE, self.ensemble.seed_distance)), self.ensemble.temperature, self.ensemble.top_k)


def places(experts: Sequence[Expert], partition: Partition, store: Store) -> list[tuple[int, ...]]:
    """The domains of a partition that each expert serves. Raises ForeignExpert, also for one that no domain needs any more."""
    found = serving(partition, [(expert.partition, expert.domain) for expert in experts], store)
    for expert, served in zip(experts, found, strict=True):
        if not served:
            raise ForeignExpert(f"every part of the domain of expert {expert.digest[:8]} has experts of its own by now: leave it out")
    return found


class Mixed(Text):
    """A text that an ensemble reads."""

    def __init__(self, walk: Walk | None) -> None:
        super().__init__()
        self.spoke: dict[str, float] = {}
        self.walk = walk  # none where the router goes by likelihoods:
        self.before_E: Floats = np.zeros(0)  # of the text so far, under each candidate
        self.next_EV: Tensor | None = None  # of the token after it


class EnsembleLM:
    """A sparse ensemble as an LM (see elmwood/lm/interface.py)."""

    def __init__(self, ensemble: Ensemble, store: Store, device: torch.device | str | None = None):
        """Raises ForeignExpert, UnknownName."""
        forest = store.load(ensemble.forest, Forest)
        seed, partition = store.load(forest.seed, Seed), store.load(forest.partition, Partition)
        self.experts = Experts(seed, [store.load(digest, Expert) for digest in forest.experts], store, device)
        self.gate = Gate(ensemble, partition, self.experts.experts, seed, store)
        self.names = [*_names(self.experts.experts, store), "seed"]
        self.context, self.vocabulary, self.separator = seed.context, seed.vocabulary, seed.separator
        self.stops = self.experts.stops

    def score(self, tokens_BT: Any) -> Tensor:
        """log p(x_t | x_<t) [B, T], float32 on the CPU; each row is routed by its own tokens."""
        tokens_BT = torch.as_tensor(tokens_BT, dtype=torch.long)
        if self.gate.by_loglik:
            loglik_BTE = torch.stack([self.experts.score(e, tokens_BT) for e in self._all()], -1).double()
            weights = [self.gate.believe(posterior_scores(row_TE)) for row_TE in loglik_BTE.numpy()]
            loglik_BT = torch.logsumexp(torch.from_numpy(np.stack(weights)).log() + loglik_BTE, -1)
        else:
            loglik_BT = self._sparse(tokens_BT)
        loglik_BT[:, 0] = 0
        return loglik_BT.float()

    def _sparse(self, tokens_BT: Tensor) -> Tensor:
        """Of rows routed by distance [B, T] float64: an expert runs the rows in which it has weight."""
        weight_BTE = torch.from_numpy(np.stack([self.gate.tokens(row) for row in tokens_BT.tolist()]))
        weight_BTE[:, 0] = 0  # the first token is given
        loglik_BT = torch.full(tokens_BT.shape, -torch.inf, dtype=torch.float64)
        for e in range(weight_BTE.shape[2]):
            rows = weight_BTE[:, :, e].any(1).nonzero().flatten()
            if len(rows):
                mine_BT = weight_BTE[rows, :, e].log() + self.experts.score(e, tokens_BT[rows])
                loglik_BT[rows] = torch.logaddexp(loglik_BT[rows], mine_BT)
        return loglik_BT

    def start(self) -> Mixed:
        return Mixed(self.gate.walk())

    def extend(self, tokens_T: Sequence[int], cache: Mixed) -> tuple[Tensor, Mixed]:
        """Log-probabilities [V] of the token after these, from the candidates that the text so far calls for."""
        self.experts.check(tokens_T, len(cache.tokens) + len(tokens_T))
        if cache.walk is not None:
            weight_E = self.gate.push(cache.walk, tokens_T)
            active = np.flatnonzero(weight_E)
            logp_AV, _ = self.experts.extend(active.tolist(), tokens_T, cache)
        else:
            weight_E = self._learn(tokens_T, cache)
            active = np.flatnonzero(weight_E)
            cache.next_EV, _ = self.experts.extend(self._all(), tokens_T, cache)
            logp_AV = cache.next_EV[active]
        weight_A = torch.from_numpy(weight_E[active]).to(logp_AV.device)
        cache.spoke = {self.names[e]: float(weight_E[e]) for e in active}
        return torch.logsumexp(logp_AV + weight_A.log()[:, None], 0).float().cpu(), cache

    def _learn(self, tokens_T: Sequence[int], cache: Mixed) -> Floats:
        """Bayes: every candidate's account is added up, by a second reading where several tokens come at once; weights [E]."""
        if cache.next_EV is None or len(tokens_T) > 1:
            row_1T = [[*cache.tokens, *tokens_T]]
            new_TE = torch.stack([self.experts.score(e, row_1T)[0, len(cache.tokens) :] for e in self._all()], -1)
            new_E = new_TE.double().sum(0)
        else:
            new_E = cache.next_EV[:, tokens_T[0]].double().cpu()
        cache.before_E = new_E.numpy() + (cache.before_E if len(cache.before_E) else 0)
        return self.gate.believe(cache.before_E[None])[0]

    def _all(self) -> list[int]:
        return list(range(len(self.experts) - (0 if self.gate.seed_joins else 1)))


class Fixed(Text):
    """A text that is read with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.spoke: dict[str, float] = {}
        self.weight_E: Floats | None = None  # none before its prompt has come


class WeightsLM:
    """LoRA experts summed into one adapter for each prompt, by its router's weights; one pass, whatever their number.

    theta = seed + sum over e of w_e(prompt) delta_e: not the mixture of probabilities, but its first-order neighbour in weights. The
    prompt is what the first `extend` of a text brings; its weights stay until the text ends. A row is scored as if its text were
    continued anew at every block: tokens b … b + block - 1 as after the prompt x_<b, read under that prompt's weights; those of the first
    block as after the first token. So `score` says what `extend` would.
    """

    def __init__(self, ensemble: Ensemble, store: Store, device: torch.device | str | None = None):
        """Raises ForeignExpert, UnknownName, BadInput where an expert is no adapter or the router goes by likelihoods."""
        outputs = EnsembleLM(ensemble, store, device)
        self.experts, self.gate, self.names, self.block = outputs.experts, outputs.gate, outputs.names, ensemble.block
        self.context, self.vocabulary, self.separator, self.stops = outputs.context, outputs.vocabulary, outputs.separator, outputs.stops
        if self.gate.by_loglik:
            raise BadInput(f"router {ensemble.router!r} runs every expert to weigh it, which mixing weights is to spare: choose 'centroid'")
        self.experts.adapters_only()

    def score(self, tokens_BT: Any) -> Tensor:
        """log p(x_t | x_<t) [B, T], float32 on the CPU: one pass for each block, over all that comes before its end."""
        tokens_BT = torch.as_tensor(tokens_BT, dtype=torch.long)
        loglik_BT = torch.zeros(tokens_BT.shape)
        weight_BTE = np.stack([self.gate.tokens(row) for row in tokens_BT.tolist()])
        for begin in range(0, tokens_BT.shape[1], self.block):
            first, end = max(1, begin), min(begin + self.block, tokens_BT.shape[1])
            if first < end:
                loglik_BT[:, first:end] = self.experts.score_mixed(weight_BTE[:, first], tokens_BT[:, :end], end - first)
        return loglik_BT

    def start(self) -> Fixed:
        return Fixed()

    def extend(self, tokens_T: Sequence[int], cache: Fixed) -> tuple[Tensor, Fixed]:
        self.experts.check(tokens_T, len(cache.tokens) + len(tokens_T))
        if cache.weight_E is None:
            cache.weight_E = self.gate.prompt(tokens_T)
            cache.spoke = {self.names[e]: float(cache.weight_E[e]) for e in np.flatnonzero(cache.weight_E)}
        return self.experts.extend_mixed(cache.weight_E, tokens_T, cache).cpu(), cache


def _names(experts: Sequence[Expert], store: Store) -> list[str]:
    """What each expert is called: the domain it was trained on, and its digest where it shares the name."""
    domains = [store.load(expert.partition or "", Partition).domains[expert.domain or 0].name for expert in experts]
    return [f"{name}:{expert.digest[:8]}" if domains.count(name) > 1 else name for name, expert in zip(domains, experts, strict=True)]


def _as_expert(merged: Merged | Mixture) -> Expert:
    """A merge or mixture opens as an expert of its seed does: a checkpoint, or an adapter."""
    method: Literal["full", "lora"] = "lora" if "adapter_config.json" in merged.files else "full"
    return Expert(seed=merged.seed, data=(), recipe=Recipe(method=method, steps=1), files=merged.files)


def open_model(record: Record, store: Store, device: torch.device | str | None = None) -> LM:
    """A model's record as an LM: the one place that looks at what kind of model it is. Raises UnknownName."""
    match record:
        case Seed():
            return OneLM(Experts(record, [], store, device), 0, "seed")
        case Expert():
            return OneLM(Experts(store.load(record.seed, Seed), [record], store, device), 0, record.digest[:8])
        case Merged() | Mixture():
            return OneLM(Experts(store.load(record.seed, Seed), [_as_expert(record)], store, device), 0, record.digest[:8])
        case Ensemble():
            return (WeightsLM if record.mixing == "weights" else EnsembleLM)(record, store, device)
    raise UnknownName(
        f"a {record.kind} is not a model; a seed, an expert, a merge, a mixture or an ensemble is: `elmwood show` lists what there is"
    )
