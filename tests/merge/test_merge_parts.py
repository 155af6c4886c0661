"""Merges in parts: by several processes, one of them killed; on Ray; and of sums that strangers sent as folders."""

import os
from pathlib import Path

import dying
import numpy as np
import pytest
from dying import killed_once
from safetensors.numpy import load_file, save
from tiny_models import config_seed, full_expert, tiny_tokenizer
from transformers import LlamaConfig

from elmwood.engine import run
from elmwood.errors import BadInput, Damaged, DoesNotFit, ElmwoodError
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.parallel import StateJob, spread
from elmwood.merge.states import check, state
from elmwood.records import Merged
from elmwood.store import Store
from elmwood.study import merging
from elmwood.study.exporting import export

PARTS = 4


@pytest.fixture(scope="module")
def forest(tmp_path_factory):
    """Tensors of several blocks, so that every part has something to do."""
    store = Store(tmp_path_factory.mktemp("store"))
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=1024,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    assert len(tiny_tokenizer().get_vocab()) <= config.vocab_size
    seed = config_seed(config, store)
    return store, seed, [full_expert(seed, store, n) for n in range(3)]


def jobs_of(store, seed, experts, method):
    members = {expert.digest: everywhere(1.0) for expert in experts}
    made = [
        StateJob(store=store.root.resolve(), seed=seed.digest, members=members, method=method, settings={}, part=(part, PARTS))
        for part in range(PARTS)
    ]
    return members, made


def weights(record: Merged, store) -> bytes:
    return store.get(record.files["model.safetensors"]).read_bytes()


def test_a_killed_worker_costs_its_part_and_no_byte(forest):
    store, seed, experts = forest
    members, jobs = jobs_of(store, seed, experts, "average")
    with pytest.raises(DoesNotFit, match="killed"):
        run(killed_once, jobs, workers=2)
    assert int((store.root / "killed-average").read_text()) != os.getpid()
    (apart,) = spread(seed, members, [Answer("average", {})], store, parts=PARTS, workers=2)
    (whole,) = merge(seed, members, [Answer("average", {})], store)
    assert weights(apart, store) == weights(whole, store)
    assert {c.expert for c in apart.contributions} == set(members)


def test_on_ray_a_killed_worker_s_part_is_done_by_another(forest, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    ray.cloudpickle.register_pickle_by_value(dying)  # Ray's workers do not see the tests
    store, seed, experts = forest
    members, jobs = jobs_of(store, seed, experts, "ties")
    try:
        run(killed_once, jobs, workers=2, engine="ray")
        assert (store.root / "killed-ties").exists()
        (apart,) = spread(seed, members, [Answer("ties", {})], store, parts=PARTS, workers=2, engine="ray")
    finally:
        ray.shutdown()
    (whole,) = merge(seed, members, [Answer("ties", {})], store)
    assert weights(apart, store) == weights(whole, store)


def test_sums_of_strangers_come_as_folders_and_add_to_the_same_bytes(forest, tmp_path):
    """Each on a machine of its own, which knows one expert; the last has the seed and the folders alone."""
    store, seed, experts = forest
    folders = []
    for number, expert in enumerate(experts):
        home = knows(tmp_path / f"machine{number}", store, seed, expert)
        folders.append(export(merging.state_make(expert, home, method="ties"), tmp_path / f"sent{number}", store=home))
    last = knows(tmp_path / "last", store, seed)
    merging.state_add([*folders[::-1], folders[0]], last, name="all")
    made = merging.state_finalize("all", last).record
    (whole,) = merge(seed, {expert.digest: everywhere(1.0) for expert in experts}, [Answer("ties", {})], store)
    assert made.files["model.safetensors"] == whole.files["model.safetensors"]
    damaged = folders[0] / "sums.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    with pytest.raises(Damaged, match="not what its record says"):
        merging.state_add(folders[:2], last)


@pytest.mark.parametrize("method", ["average", "model_stock"])
def test_a_stranger_s_state_that_none_could_have_made_is_refused(forest, tmp_path, method):
    """Its record and its bytes agree: what is wrong is what they say."""
    store, seed, experts = forest
    mine = state(seed, {experts[0].digest: everywhere(1.0)}, method, {}, store)
    check(mine, store)
    sums = load_file(store.get(mine.files["sums.safetensors"]))
    key = next(iter(sorted(sums)))
    many = sums[key].copy()
    many[0] = 1 << 60  # within 64 bits, beyond what one such expert can add
    wrong = {
        "larger": sums | {key: many},
        "as .* makes them": {name: value for name, value in sums.items() if name != key},
        "does not have": sums | {"strange|sum": many},
        "makes them for this seed": sums | {key: sums[key].astype(np.float64)},
    }
    for said, made in wrong.items():
        with pytest.raises(ElmwoodError, match=said):
            check(mine.model_copy(update={"files": {"sums.safetensors": store.put(save(made))}}), store)
    with pytest.raises(BadInput, match="the part"):
        check(mine.model_copy(update={"part": (3, 2)}), store)
    with pytest.raises(BadInput, match="fewer experts"):
        check(mine.model_copy(update={"contributions": tuple(c.model_copy(update={"reach": 1 << 20}) for c in mine.contributions)}), store)


def knows(folder: Path, store: Store, *records) -> Store:
    """A store of another machine, with these records and their files."""
    home = Store(folder)
    for record in records:
        for digest in record.files.values():
            home.put(store.get(digest))
        home.add(record)
    return home
