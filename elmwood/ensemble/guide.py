"""The router of a text for those who only ask where it would go: a dry run, a gateway. Free of torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from elmwood.domains.distances import token_distances
from elmwood.domains.route import Routing
from elmwood.ensemble.text_router import names_of, open_text_router, weigh
from elmwood.records import Ensemble, Expert, Forest, Partition, Seed
from elmwood.store import Store


class Place(NamedTuple):
    """How a router sees one candidate before the next token, by distance alone: a memory of the text needs the experts to run."""

    name: str
    digest: str  # or "seed"
    domain: int | None  # of the forest's partition, the first that it serves
    dist2: float | None  # None: the router looks at no distances, or nothing is known of the text yet
    weight: float


class Map(NamedTuple):
    """The experts' domains and a text among them: the first two principal components of the domains' centres."""

    spots: list[tuple[str, float, float]]  # digest of an expert, x and y of the centre of its domain, from 0 to 1
    path: list[tuple[float, float]]  # of the text, prefix by prefix


class Guide:
    """The router of an ensemble. No model is opened."""

    def __init__(self, ensemble: Ensemble, store: Store):
        """Raises UnknownName, ForeignExpert."""
        forest, self.routing = store.load(ensemble.forest, Forest), Routing.of(ensemble)
        self.partition = store.load(forest.partition, Partition)
        members = sorted((store.load(digest, Expert) for digest in forest.experts), key=lambda expert: expert.digest)
        self.names, self.digests = [*names_of(members, store), "seed"], [*(expert.digest for expert in members), "seed"]
        self.contributors = [expert.contributor for expert in members]
        self.router = open_text_router(self.routing, self.partition, members, store.load(forest.seed, Seed), store)

    def cards(self) -> list[tuple[str, str, int | None, str | None]]:
        """Digest, name, domain and contributor of each expert."""
        domains = [served[0] if served else None for served in self.router.places_E]
        return list(zip(self.digests[:-1], self.names[:-1], domains, self.contributors, strict=True))

    def draw(self, tokens: Sequence[int], most: int = 200) -> Map | None:
        """The map, with at most so many points of the text's path; None where the router looks at no dense centroids of three domains."""
        if not self.router.reads_text or not isinstance(self.router.centroids_P, np.ndarray) or len(self.router.centroids_P) < 3:
            return None
        centre_PD = self.router.centroids_P - self.router.centroids_P.mean(0)
        left_PX, scale_X, _ = np.linalg.svd(centre_PD, full_matrices=False)
        if scale_X[1] <= 1e-6 * scale_X[0]:
            return None
        spot_P2 = left_PX[:, :2] * scale_X[:2]
        dist2_TP = token_distances(self.router.embedder, self.router.centroids_P, [*tokens, tokens[0]], self.router.spelled)
        dist2_TP = dist2_TP[np.isfinite(dist2_TP).all(1)]
        dist2_TP = dist2_TP[np.unique(np.linspace(0, len(dist2_TP) - 1, most).astype(int))] if len(dist2_TP) else dist2_TP
        # the point's own components follow from its distances alone (Gower 1968)
        point_T2 = 0.5 * ((centre_PD**2).sum(1) - dist2_TP) @ spot_P2 / scale_X[:2] ** 2
        low_2, span_2 = spot_P2.min(0), np.ptp(spot_P2, 0)
        spot_P2, point_T2 = (spot_P2 - low_2) / span_2, ((point_T2 - low_2) / span_2).clip(0, 1)
        spots = [(digest, *spot_P2[own[0]].round(4).tolist()) for digest, own in zip(self.digests, self.router.own_E, strict=False)]
        return Map(spots, [(x, y) for x, y in point_T2.round(4).tolist()])

    def look(self, tokens: Sequence[int]) -> list[Place]:
        """All candidates after these tokens (from the separator on), the heaviest first, then the nearest."""
        dist2_1E, count = self.router.push(tokens), len(self.names)
        weight_C = self._weigh(tokens, count)
        dist2_C = [None] * count if dist2_1E is None else [*map(float, dist2_1E[0]), self.routing.seed_distance]
        places = [(served[0] if served else None) for served in self.router.places_E] + [None]
        found = [
            Place(name, digest, domain, None if dist2 is None or not np.isfinite(dist2) else dist2, weight)
            for name, digest, domain, dist2, weight in zip(self.names, self.digests, places, dist2_C, weight_C, strict=True)
        ]
        return sorted(found, key=lambda place: (-place.weight, place.dist2 if place.dist2 is not None else np.inf))

    def _weigh(self, tokens: Sequence[int], count: int) -> list[float]:
        """Of those that are live."""
        walk, weight_C = self.router.start(), np.zeros(count)
        near = None if walk is None else self.router.follow(walk, tokens)
        active, weight_A = weigh(near, np.zeros(count), self.routing)
        weight_C[active] = weight_A
        return weight_C.tolist()
