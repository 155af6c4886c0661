"""Text of the volunteer's own, routed to the domains of the published partition here: only the adapter leaves the machine."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from elmwood.domains.grow import DivideTask, Setup, divide
from elmwood.domains.partition import ALONE, centroids
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.records import Partition, Shard, fingerprint
from elmwood.store import Store
from elmwood.study.text import build


class OwnText(NamedTuple):
    """The shards of each domain that some text belongs to, and bytes of it."""

    shards: dict[int, tuple[Shard, ...]]
    bytes: dict[int, int]

    @property
    def domains(self) -> tuple[int, ...]:
        """The one with the most text first."""
        return tuple(sorted(self.bytes, key=lambda domain: (-self.bytes[domain], domain)))


def route_text(sources: Sequence[str], partition: Partition, store: Store, *, least: int = 0, progress: Progress = silent) -> OwnText:
    """Read sources, drop duplicates, and divide them among the domains; those with fewer than `least` bytes are left out.

    The same text is divided once. Raises BadInput, BadCorpus.
    """
    corpus = build(list(sources), store, holdout=0.1, progress=progress)
    key = fingerprint("own-text", corpus.digest, partition.digest)
    setup, centroid_KD = Setup(store, store.work(key), partition.embedder, ALONE), np.asarray(centroids(partition, store))
    found: dict[int, tuple[Shard, ...]] = {}
    for number, shard in enumerate((*corpus.train, *corpus.holdout)):  # nobody tests on this text: all of it is trained on
        task = DivideTask(setup, centroid_KD, setup.work / f"own-{number}.json", shard, np.zeros(0, np.int64), None)
        for domain, fields in divide(task, progress)[0].items():
            found[int(domain)] = (*found.get(int(domain), ()), Shard(**fields))
    size = {domain: sum(shard.bytes for shard in shards) for domain, shards in found.items()}
    kept = {domain for domain in found if size[domain] >= max(1, least)}
    if not kept:
        raise BadInput(f"no domain gets {least} bytes of this text: give more of it, with --text")
    return OwnText({domain: found[domain] for domain in kept}, {domain: size[domain] for domain in kept})
