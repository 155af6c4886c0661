"""A seed with experts of every kind, and their merge."""

import pytest
from tiny_models import full_expert, leave_statistics, lora_expert, tiny_seed

from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.layer_weights import everywhere
from elmwood.store import Store


@pytest.fixture(scope="module")
def forest(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    seed = tiny_seed(store)
    experts = [full_expert(seed, store, n) for n in range(3)] + [lora_expert(seed, store, n) for n in range(2)]
    for place, expert in enumerate(experts):
        leave_statistics(expert, seed, store, place)
    return store, seed, experts


@pytest.fixture(scope="module")
def experts(seed, store):
    """One of each kind."""
    return {
        "full": full_expert(seed, store, 1),
        "lora": lora_expert(seed, store, 2, settings={"r": 3, "use_rslora": True, "alpha_pattern": {"v_proj": 5}}),
        "dora": lora_expert(seed, store, 3, settings={"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    }


@pytest.fixture(scope="module")
def merged(seed, experts, store):
    members = {experts[name].digest: everywhere(1.0) for name in ("full", "lora")}
    return merge(seed, members, [Answer("average", {})], store)[0]
