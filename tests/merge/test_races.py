"""Several at the same work at once: each ends with the same record, and every blob is what its name says."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from tiny_models import full_expert, lora_expert

from elmwood.records import Forest
from elmwood.store.verify import verify
from elmwood.study import merging, mixing

AT_ONCE = 4


@pytest.fixture(scope="module")
def members(store, seed):
    """Two full experts and two adapters."""
    return [full_expert(seed, store, n, domain=n) for n in range(2)], [lora_expert(seed, store, n, domain=n) for n in range(2)]


def race(work):
    """The digests that several threads end with; a lock on a file holds between them as it does between processes."""
    begin = Barrier(AT_ONCE)

    def run(_):
        begin.wait()
        return work().digest

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return set(pool.map(run, range(AT_ONCE)))


def test_merges_and_states(store, members):
    full, low = members
    works = {
        "merge": lambda: merging.merge(full, store, method="ties").record,
        "adapters": lambda: merging.merge(low, store, method="concat").record,
        "state": lambda: merging.state_make(full[:1], store, method="ties"),
        "other state": lambda: merging.state_make(full[1:], store, method="ties"),
    }
    made = {name: race(work) for name, work in works.items()}
    states = made["state"] | made["other state"]
    made["add"] = race(lambda: merging.state_add(sorted(states), store))
    (both,) = made["add"]
    made["remove"] = race(lambda: merging.state_remove(both, full[1:], store))
    made["finalize"] = race(lambda: merging.state_finalize(both, store, scale=0.5).record)
    assert {name: len(digests) for name, digests in made.items()} == dict.fromkeys(made, 1)
    assert made["remove"] == made["state"]
    assert not list(verify(store))


def test_overlapping_sets_of_answers(store, members):
    """Merges that share some of their tasks, asked for in different orders."""
    full, _ = members
    orders = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.4], [0.4, 0.1, 0.2]]
    begin = Barrier(len(orders))

    def run(scales):
        begin.wait()
        return {title: one.digest for title, one in merging.merge(full, store, method="task_arithmetic", scale=scales).made.items()}

    with ThreadPoolExecutor(len(orders)) as pool:
        found = list(pool.map(run, orders))
    for one in found:
        assert all(other.get(title, digest) == digest for other in found for title, digest in one.items())
    assert not list(verify(store))


def test_mixtures(store, seed, members):
    full, _ = members
    forest = Forest(seed=seed.digest, partition="0" * 64, experts=tuple(one.digest for one in full))
    store.add(forest)
    (made,) = race(lambda: mixing.mix(forest, store, gates="random").record)
    assert len(race(lambda: mixing.mix(made, store, without=full[0]).record)) == 1
    assert not [one for one in verify(store) if forest.partition not in one.where]
