"""Where a text lies among the experts of a forest. Free of torch: no model is opened, unless it is what embeds the text.

Shapes: E experts by digest, T tokens, N scored tokens of several documents, P domains that the experts serve
"""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmwood.corpus.tokens import Windows, token_bytes
from elmwood.domains import embed
from elmwood.domains.partition import centroids, serving
from elmwood.domains.route import PrefixDistances, Routing, nearest_place, router_of, token_distances
from elmwood.errors import ForeignExpert
from elmwood.lm.files import tokenizer
from elmwood.records import Expert, Partition, Seed
from elmwood.store import Store

Floats = NDArray[np.floating]


class TextRouter:
    """Where a text lies among the experts of a forest; nothing for a router that looks at no distances (`reads_text`)."""

    def __init__(self, routing: Routing, partition: Partition, experts: Sequence[Expert], seed: Seed, store: Store):
        """Raises UnknownName, ForeignExpert."""
        kind = router_of(routing).distances
        self.places_E = places(experts, partition, store)
        self.reads_text = kind is not None
        if kind is None:
            return
        self.embedder = embed.load(partition.embedder, store, _open_hidden_states)
        self.centroids_P = centroids(partition, store, kind)[list(chain.from_iterable(self.places_E))]
        starts_E = np.cumsum([0, *map(len, self.places_E)])
        self.own_E = [range(first, last) for first, last in pairwise(starts_E.tolist())]  # rows of these centroids
        spelled = token_bytes(tokenizer(seed, store))
        self.spelled = spelled + [b""] * (seed.vocabulary - len(spelled))  # some embeddings are padded with unused rows

    def distances(self, windows: Windows) -> Floats | None:
        """Of the document before each scored token [N, E]."""
        if not self.reads_text:
            return None
        parts = [np.zeros((0, len(self.own_E)), np.float32)]
        for _, tokens_T in windows.documents():
            parts.append(nearest_place(token_distances(self.embedder, self.centroids_P, tokens_T, self.spelled)[1:], self.own_E))
        return np.concatenate(parts)

    def start(self) -> PrefixDistances | None:
        """An empty text."""
        return PrefixDistances(self.embedder, self.centroids_P) if self.reads_text else None

    def push(self, prefix: PrefixDistances | None, tokens_T: Sequence[int]) -> Floats | None:
        """Let a text grow; the distances of all of it so far [1, E]."""
        if prefix is None:
            return None
        return nearest_place(prefix.push(b"".join(self.spelled[token] for token in tokens_T))[None], self.own_E)


def _open_hidden_states(name: str, store: Store) -> Any:
    from elmwood.lm.hidden_states import open_hidden_states  # torch, for partitions that embed with a model

    return open_hidden_states(name, store)


def places(experts: Sequence[Expert], partition: Partition, store: Store) -> list[tuple[int, ...]]:
    """The domains of a partition that each expert serves. Raises ForeignExpert, also where an expert serves none."""
    found = serving(partition, [(expert.partition, expert.domain) for expert in experts], store)
    for expert, served in zip(experts, found, strict=True):
        if not served:
            raise ForeignExpert(f"every part of the domain of expert {expert.digest[:8]} has experts of its own by now: leave it out")
    return found


def names_of(experts: Sequence[Expert], store: Store) -> list[str]:
    """The name of each expert: its domain, with its digest where several have the same."""
    domains = [store.load(expert.partition or "", Partition).domains[expert.domain or 0].name for expert in experts]
    return [f"{name}:{expert.digest[:8]}" if domains.count(name) > 1 else name for name, expert in zip(domains, experts, strict=True)]
