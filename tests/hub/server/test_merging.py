"""The merge that is kept of a run: removing a member's expert gives the bytes of never having had it. Real adapters of a real seed."""

import numpy as np
import pytest
import safetensors.numpy
from sqlalchemy import select
from starlette.testclient import TestClient
from tiny_models import tiny_seed

from elmwood.errors import BadInput
from elmwood.hub import care
from elmwood.hub.app import create_app
from elmwood.hub.client.gate import adapter_config, expected_tensors
from elmwood.hub.home import Home, Hub
from elmwood.hub.manifest import publish
from elmwood.hub.merging import EQUALLY, enter_derived, keep_merge
from elmwood.hub.messages import Tier
from elmwood.hub.tables import derived, snapshot
from elmwood.merge.checkpoint import finalize
from elmwood.merge.states import SUMS, state
from elmwood.records import Forest, Recipe
from elmwood.store import Store
from tests.hub.server.people import Person
from tests.hub.server.world import keys, make_run

METHODS = "average", "ties"


class Community:
    """A run over a tiny seed, and who works for it."""

    def __init__(self, folder, client):
        home = Home("test", Store(folder))
        home.make_keys()
        self.hub, self.store = Hub(home), home.store
        draft, self.seed = make_run(self.store, 3), tiny_seed(self.store)
        recipe = Recipe(method="lora", steps=10, rank=2)
        self.tensors = expected_tensors(self.seed, recipe, self.store)
        config = self.store.put(adapter_config(recipe, self.seed, self.tensors))
        forest = Forest(seed=self.seed.digest, partition=draft.partition, experts=())
        self.store.add(forest)
        changes = {
            "seed": self.seed.digest,
            "ensemble": draft.ensemble.model_copy(update={"forest": forest.digest}),
            "tiers": {"cpu": Tier(recipe=recipe, tensors=self.tensors, config=config, bytes=1 << 20)},
        }
        publish(draft.model_copy(update=changes), self.hub)
        self.hub.start = lambda: None
        self.client = client(create_app(self.hub))
        self.verifier, self.admin = (Person(self.client, keys(self.hub)[role]) for role in ("verifier", "admin"))

    def accept(self, number: int) -> str:
        """Somebody's expert is accepted; its digest."""
        chance = np.random.default_rng(number)
        tensors = {name: chance.normal(size=shape).astype(np.float32) for name, shape in self.tensors.items()}
        member = Person(self.client).enter()
        made = member.give(member.claim().json(), safetensors.numpy.save(tensors, {"format": "pt"})).json()
        self.verifier.verify()
        return made["expert"]

    def retire(self, digest: str) -> None:
        self.admin.post(f"/v1/experts/{digest}/retire", {"reason": "withdrawn"}, status=200)

    def snapshot(self) -> tuple[str, str]:
        """Forest and ensemble, which are digests of their bytes."""
        last = select(snapshot.c.forest, snapshot.c.ensemble).order_by(snapshot.c.version.desc()).limit(1)
        return tuple(dict(self.hub.read(lambda c: c.one(last))).values())

    def marks(self) -> dict[str, int]:
        return {row["kind"]: row["tainted"] for row in self.hub.read(lambda c: c.all(select(derived)))}

    def never_having_had(self, *others: str, method: str) -> tuple[bytes, dict[str, str]]:
        """Sums and merge of these experts, summed in one go."""
        made = state(self.seed, dict.fromkeys(others, EQUALLY), method, {}, self.store)
        return self.store.get(made.files[SUMS]).read_bytes(), finalize([made], {}, self.store).files if len(others) > 1 else None


@pytest.fixture
def community(tmp_path):
    opened = []

    def client(app):
        opened.append(TestClient(app))
        return opened[-1].__enter__()

    made = Community(tmp_path, client)
    yield made
    opened[0].__exit__(None, None, None)
    made.hub.close()


def bytes_of(community, kept):
    return community.store.get(kept.state.files[SUMS]).read_bytes(), kept.merged.files if kept.merged else None


def test_after_a_removal_all_bytes_are_those_of_never_having_had_it(community):
    accept, hub = community.accept, community.hub
    first, second = accept(1), accept(2)
    without, kept_without = community.snapshot(), {method: keep_merge(hub, method) for method in METHODS}
    third = accept(3)
    for method in METHODS:
        kept = keep_merge(hub, method)
        assert (kept.added, kept.removed) == ((third,), ())
        assert bytes_of(community, kept) == community.never_having_had(first, second, third, method=method)
    community.retire(third)  # the last to come
    assert community.snapshot() == without
    for method in METHODS:
        kept = keep_merge(hub, method)
        assert (kept.added, kept.removed) == ((), (third,))
        assert kept.state == kept_without[method].state
        assert bytes_of(community, kept) == community.never_having_had(first, second, method=method)
    fourth = accept(4)
    keep_merge(hub)
    community.retire(first)  # the first to come
    for method in METHODS:
        kept = keep_merge(hub, method)  # "ties" meets an acceptance and a retirement at once
        assert kept.removed == (first,)
        assert bytes_of(community, kept) == community.never_having_had(second, fourth, method=method)
    community.retire(fourth)
    kept = keep_merge(hub)
    assert kept.merged is None  # of one expert
    assert bytes_of(community, kept) == community.never_having_had(second, method="average")
    community.retire(second)
    assert keep_merge(hub).state is None
    assert not [name for name in community.store.names() if name.startswith("test/") and "average" in name]
    assert {kind: mark for kind, mark in community.marks().items() if "average" in kind} == {}


def test_what_was_made_of_a_retired_expert_is_marked_until_it_is_rebuilt(community):
    first, _, second = community.accept(1), community.accept(2), community.accept(3)
    keep_merge(community.hub)
    names = {"state test/state/average": 0, "merged test/merge/average": 0}
    assert community.marks() == names
    community.retire(second)
    assert community.marks() == dict.fromkeys(names, 1)
    assert care.status(community.hub)["made of experts"] == {"current": 0, "to rebuild": 2}
    assert "is to be rebuilt" in community.client.get(f"/experts/{second}").text
    assert not enter_derived(community.hub, "test/merge/average")  # it is no better for being entered again
    keep_merge(community.hub)
    assert community.marks() == names
    assert "is to be rebuilt" not in community.client.get(f"/experts/{first}").text
    community.store.name("sum", community.store.add(Forest(seed=community.seed.digest, partition="0" * 64, experts=(first,))))
    with pytest.raises(BadInput, match="made of experts"):
        enter_derived(community.hub, "sum")
