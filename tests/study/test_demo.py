"""The demo's study on a tiny text, and the seed that comes with the package."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from topics import TOPICS, build_corpus, some_texts

from elmwood.corpus.build import build
from elmwood.domains.partition import partition
from elmwood.errors import BadInput, Damaged
from elmwood.records import Comparison, Corpus, Row, Seed
from elmwood.store import Store
from elmwood.study import demo_seed
from elmwood.study.demo import CONTROLS, SAMPLE, Study, demo, grow, plan, settings, sum_progress
from elmwood.study.demo_seed import compare_packaged, install_seed, pack_seed
from elmwood.study.quality.evaluation import conclusion, with_seconds

TINY = Study(domains=3, vocabulary=300, layers=1, width=32, length=32, seed_tokens=2_000, tokens=1_600, batch=2, documents=None)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[Corpus, Store]:
    folder = tmp_path_factory.mktemp("demo")
    store = Store(folder / "store")
    return build_corpus(folder / "text", store, some_texts(TOPICS[:3], 30, np.random.default_rng(0))), store


def test_a_study_makes_every_row_and_is_found_again(text):
    corpus, store = text
    phases = []
    made = grow(TINY, corpus, None, store, workers=1, on_phase=phases.append)
    assert [phase.number for phase in phases] == [2, 3, 4]
    assert set(made.models) == {*CONTROLS.values(), *(f"{side}/{place}" for side in ("expert", "random") for place in range(3))}
    names = [row.name for row in made.comparison.rows]
    assert {"seed", "uniform routing", "oracle routing", *CONTROLS} <= set(names)
    assert made.comparison.chosen in names
    assert len({row.tokens for row in made.comparison.rows if row.tokens}) == 1, "every side trains on as many tokens"
    before = {path: path.stat().st_mtime_ns for path in (store.root / "blobs").rglob("*")}
    again = grow(TINY, corpus, made.seed, store, workers=1)
    assert again.comparison == made.comparison
    assert {path: path.stat().st_mtime_ns for path in (store.root / "blobs").rglob("*")} == before


def test_the_machine_decides_no_record(text, tmp_path, monkeypatch):
    corpus, store = text
    grow(TINY, corpus, None, store, workers=1)
    other = Store(tmp_path / "store")
    shutil.copytree(store.root / "blobs", other.root / "blobs")
    other.add(corpus)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # of the workers; with several in turns on a core, they do not spin
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    made = grow(TINY, corpus, None, other, workers=2)
    assert set(other.records()) == set(store.records())
    timed = [row for row in with_seconds(made.comparison, other).rows if row.machine_seconds]
    assert {row.name for row in timed} >= set(CONTROLS)
    assert not any(row.machine_seconds or row.wall_seconds for row in made.comparison.rows)


def test_dense_controls_differ_in_batch_and_rate_and_read_in_their_own_order(text):
    corpus, store = text
    study = TINY.model_copy(update={"domains": 6, "tokens": 12_000})
    seed = grow(TINY, corpus, None, store, workers=1).seed
    divisions = {
        name: partition(corpus, store, domains=6, method=method) for name, method in (("expert", "balanced"), ("random", "random"))
    }
    sides = plan(study, seed, corpus, divisions, store)
    dense = [sides[name][0].recipe for name in CONTROLS]
    assert [recipe.batch for recipe in dense] == [2, 6, 12]
    assert [recipe.learning_rate for recipe in dense] == [study.dense_rate, study.middle_rate, study.large_rate]
    assert len({recipe.tokens for recipe in dense} | {sum(job.recipe.tokens for job in sides[side]) for side in divisions}) == 1
    assert len({recipe.rng_seed for recipe in dense} | {study.seed_recipe.rng_seed}) == 4
    assert all(sides[name][0].data == corpus.train for name in CONTROLS)


def test_settings_take_rates_of_each_side_alike():
    study = settings(Study(), None, tokens="1.2M", domains=4)
    assert (study.tokens, study.domains, study.expert_rate) == (1_200_000, 4, Study().expert_rate)
    study = settings(Study(), None, learning_rate=1e-3)
    assert {study.expert_rate, study.random_rate, study.dense_rate} == {1e-3}
    assert {study.middle_rate, study.large_rate} == {2e-3}
    with pytest.raises(BadInput, match="one of the two"):
        demo(seed="mine", from_scratch=True, store="nowhere")


def test_a_gain_over_dense_models_that_learned_nothing_is_no_result():
    def table(seed: float, dense: float) -> Comparison:
        common = {"standard_error": 0.01, "perplexity": 9.0}
        rows = (
            Row(name="seed", role="seed", bits_per_byte=seed, gain=dense - seed, gain_error=0.001, **common),
            Row(name="dense", role="control", bits_per_byte=dense, **common),
            Row(name="live", role="result", bits_per_byte=2.0, gain=dense - 2, gain_error=0.001, **common),
        )
        return Comparison(holdout="holdout-0", rows=rows, chosen="live")

    assert conclusion(table(2.2, 2.1)).endswith(
        "is better than every control (+0.1000 ± 0.0010 bits per byte against the strongest dense model)."
    )
    assert "no dense model better than the seed" in conclusion(table(2.1, 2.2))


def test_the_progress_of_several_tasks_is_one():
    told = []
    tell = sum_progress("all", {"a": 100, "b": 300}, lambda *event: told.append(event))
    tell("a", 50, 100, "tokens")
    tell("stranger", 1, 1, "tasks")
    tell("b", 10, 10, "tokens")
    assert told == [("all", 50, 400, "tokens"), ("all", 350, 400, "tokens")]


# ---- the packaged seed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[Corpus, Store]:
    store = Store(tmp_path_factory.mktemp("sample") / "store")
    return build([SAMPLE], store), store


def test_the_packaged_seed_is_of_the_bundled_training_split_and_of_the_documented_recipe(sample):
    corpus, store = sample
    seed = install_seed(corpus, store)
    assert (seed.corpus, seed.recipe) == (corpus.digest, Study().seed_recipe)
    assert (seed.vocabulary, seed.context) == (Study().shape.vocabulary, Study().shape.context)
    assert store.load(seed.digest) == seed
    assert {shard.blob for shard in corpus.train}.isdisjoint(shard.blob for shard in corpus.holdout)
    assert compare_packaged(seed, store) == (True, 0.0)


def test_the_demo_of_the_bundled_text_takes_the_packaged_seed_and_trains_none(sample):
    corpus, store = sample

    def cut(phase):
        if phase.number > 1:
            raise KeyboardInterrupt
        told.append(phase.text)

    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        demo(quick=True, store=store, on_phase=cut)
    assert len(told) == 1  # no phase that trains a seed
    assert {digest for digest in store.records() if isinstance(store.load(digest), Seed)} == {install_seed(corpus, store).digest}


def test_a_seed_that_saw_another_split_or_lost_a_byte_is_not_installed(text, sample, tmp_path, monkeypatch):
    with pytest.raises(Damaged, match="held-out"):
        install_seed(text[0], text[1])
    corpus, store = sample
    folder = tmp_path / "packaged"
    shutil.copytree(Path(demo_seed.__file__).parent, folder)
    words = folder / "tokenizer.json"
    words.write_bytes(words.read_bytes() + b" ")
    monkeypatch.setattr(demo_seed, "PACKAGED", folder)
    with pytest.raises(Damaged, match=r"tokenizer\.json"):
        install_seed(corpus, store)


def test_a_seed_trained_again_is_held_against_the_packaged_one(sample, tmp_path):
    corpus, store = sample
    seed = install_seed(corpus, store)
    weights = load_file(store.get(seed.files["model.safetensors"]))
    name = min(weights)
    weights[name] = weights[name] + np.float32(1e-3)
    save_file(weights, tmp_path / "other.safetensors", metadata={"format": "pt"})
    other = seed.model_copy(update={"files": {**seed.files, "model.safetensors": store.put(tmp_path / "other.safetensors")}})
    found = compare_packaged(other, store)
    assert not found.same
    assert 0 < found.difference < 1e-2
    assert compare_packaged(other.model_copy(update={"recipe": None}), store) is None


def test_what_is_packed_is_what_is_installed(sample, tmp_path):
    corpus, store = sample
    pack_seed(install_seed(corpus, store), store, tmp_path)
    packaged = Path(demo_seed.__file__).parent
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in packaged.iterdir() if path.suffix in (".json", ".safetensors")
    }
    assert all(path.read_bytes() == (packaged / path.name).read_bytes() for path in tmp_path.iterdir())
