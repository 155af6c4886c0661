"""`elmwood accept` with real small experts: an honest one joins; a copy, a blend, a broken and a worthless one do not, and why."""

import hashlib
import itertools
import json
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tiny_models import full_expert, lora_expert, tiny_seed
from topics import SENTENCES, build_corpus, some_sentences
from typer.testing import CliRunner

from elmwood.cli import app
from elmwood.domains.partition import partition as divide
from elmwood.errors import BadInput, ForeignExpert
from elmwood.evaluate import holdout
from elmwood.lm.adapters.peft_config import scale
from elmwood.records import Ensemble, Expert, Forest, Ledger, Recipe, Seed, Verdict
from elmwood.store import Store
from elmwood.study.quality.admission import accept, ledger_of
from elmwood.study.quality.evaluation import evaluate
from elmwood.train.tasks import train
from elmwood.weights.similarity import products

# of each topic's made-up words: words that topics share would route text of one to the expert of another
LETTERS = ("abcdef", "ghijkl", "mnopqr")
K = len(SENTENCES)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdout, "BLOCK", 128)
        yield


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A store with a seed, an adapter trained on each of three topics, and an ensemble of the first two."""
    folder = tmp_path_factory.mktemp("accept")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_sentences(SENTENCES, 20, 16, LETTERS), holdout=0.7)
    partition = divide(corpus, store, domains=K)
    seed = tiny_seed(store)
    recipe = Recipe(method="lora", steps=25, batch=4, length=48, learning_rate=2e-2, rank=4)
    experts = [train(seed, domain.train, recipe, store, partition=partition.digest, domain=k) for k, domain in enumerate(partition.domains)]
    forest = Forest(seed=seed.digest, partition=partition.digest, experts=tuple(expert.digest for expert in experts[:2]))
    store.add(forest)
    store.name("two", store.add(Ensemble(forest=forest.digest, top_k=1, temperature=0.1, seed_distance=0.99)))
    for k, expert in enumerate(experts):
        store.name(f"expert/{k}", expert.digest)
    return store, seed, experts


def asked(store, expert, forest="two", *words):
    command = ["accept", expert, forest, "--length", "48", "--store", str(store.root), "--json", *words]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def failures(told):
    return [check["name"].split(":")[0].split(",")[0] for check in told["verdict"]["checks"] if not check["passed"]]


def factors(expert, store):
    """Layer -> (A [R, I], B [O, R] with its scale)."""
    weights = safetensors.numpy.load_file(store.get(expert.files["adapter_model.safetensors"]))
    settings = json.loads(store.get(expert.files["adapter_config.json"]).read_text())
    found = {}
    for key in weights:
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a_RI = weights[key]
            found[name] = a_RI, weights[key.replace("lora_A", "lora_B")] * np.float32(scale(settings, name, len(a_RI)))
    return found, settings


def adapter(like, pairs, store, name):
    """An expert of these factors."""
    _, settings = factors(like, store)
    rank = len(next(iter(pairs.values()))[0])
    settings |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    weights = {}
    for layer, (a_RI, b_OR) in pairs.items():
        weights[f"base_model.model.{layer}.lora_A.weight"] = np.ascontiguousarray(a_RI, np.float32)
        weights[f"base_model.model.{layer}.lora_B.weight"] = np.ascontiguousarray(b_OR, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        safetensors.numpy.save_file(weights, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
        (Path(folder) / "adapter_config.json").write_text(json.dumps(settings))
        made = like.model_copy(update={"files": store.put_folder(Path(folder)), "contributor": name})
    store.name(name, store.add(made))
    return made


def test_an_honest_expert_joins_and_the_ledger_knows(grown):
    store, _, experts = grown
    told = asked(store, "expert/2", "two", "--name", "three")
    assert failures(told) == []
    assert told["verdict"]["accepted"]
    assert experts[2].digest in store.load("three", Forest).experts
    assert store.load(told["digest"], Verdict).accepted
    entry = store.load("ledger", Ledger).entries[-1]
    assert (entry.expert, entry.accepted, entry.verdict) == (experts[2].digest, True, told["digest"])
    key = bytes.fromhex(entry.key.removeprefix("key="))
    assert entry.sealed == told["sealed"] == "key-" + hashlib.sha256(key).hexdigest()
    assert told["tokens_forwarded"] > 0
    again = asked(store, "expert/2")  # another try: another level, another order
    assert again["submission"] == told["submission"] + 1
    assert again["key"] != told["key"]


def test_a_copy_in_another_basis_is_refused_before_anything_is_drawn(grown):
    store, _, experts = grown
    before = store.load("ledger", Ledger) if "ledger" in store.names() else Ledger()
    rng = np.random.default_rng(1)
    pairs, _ = factors(experts[0], store)
    turned = {}
    for layer, (a_RI, b_OR) in pairs.items():
        mix_RR = rng.standard_normal((len(a_RI), len(a_RI)))
        turned[layer] = np.linalg.inv(mix_RR) @ a_RI, b_OR @ mix_RR
    copy = adapter(experts[0], turned, store, "copy")
    assert copy.files["adapter_model.safetensors"] != experts[0].files["adapter_model.safetensors"]
    told = asked(store, "copy")
    assert failures(told)[0] == "not a copy"
    assert not told["verdict"]["accepted"]
    assert told["tokens_forwarded"] == 0
    assert (store.load("ledger", Ledger) if "ledger" in store.names() else Ledger()) == before


def test_a_blend_of_two_is_refused(grown):
    store, _, experts = grown
    one, other = (factors(expert, store)[0] for expert in experts[:2])
    blend = {
        layer: (np.concatenate([one[layer][0], other[layer][0]]), np.concatenate([0.5 * one[layer][1], 0.5 * other[layer][1]], 1))
        for layer in one
    }
    adapter(experts[0], blend, store, "blend")
    told = asked(store, "blend")
    assert failures(told)[0] == "not a blend"
    assert told["evidence"]["cosine"] < 0.85
    assert told["evidence"]["novelty"] == pytest.approx(0, abs=1e-4)


def test_numbers_that_are_not_finite_are_refused(grown):
    store, _, experts = grown
    pairs, _ = factors(experts[2], store)
    layer = sorted(pairs)[0]
    pairs[layer] = np.full_like(pairs[layer][0], np.nan), pairs[layer][1]
    adapter(experts[2], pairs, store, "broken")
    told = asked(store, "broken")
    assert failures(told)[0] == "weights are finite"
    assert told["tokens_forwarded"] == 0


def test_a_worthless_one_is_refused_for_what_it_says(grown):
    store, seed, experts = grown
    noise = lora_expert(
        seed, store, rng_seed=13, partition=experts[2].partition, domain=2
    )  # on a random seed some noise helps; this does not
    told = asked(store, noise.digest)
    assert failures(told)[0] == "better than the seed on its own domain"
    assert told["evidence"]["cosine"] < 0.5
    assert told["evidence"]["secret_gain"] < 0
    assert store.load("ledger", Ledger).entries[-1].accepted is False


def test_a_submission_that_was_cut_short_is_taken_up_again(grown, monkeypatch):
    store, seed, experts = grown
    noise = lora_expert(seed, store, rng_seed=11, partition=experts[2].partition, domain=2)
    with monkeypatch.context() as patch:
        patch.setattr("elmwood.study.quality.admission.Trial.gather", lambda *_: pytest.fail("cut short"))
        with pytest.raises(pytest.fail.Exception):
            asked(store, noise.digest)
    begun = store.load("ledger", Ledger).entries[-1]
    assert (begun.expert, begun.accepted, begun.key) == (noise.digest, None, "")
    told = asked(store, noise.digest)
    ended = store.load("ledger", Ledger).entries[-1]
    assert (ended.sealed, ended.level, told["submission"]) == (begun.sealed, begun.level, len(store.load("ledger", Ledger).entries))
    assert ended.accepted is False


def test_a_trial_that_is_cut_short_or_knows_much_ends_in_the_same_verdict(grown, tmp_path):
    """One digest: run at once, stopped again and again, after columns of all models were scored, and scored while it was stopped."""
    store, seed, experts = grown
    noise = lora_expert(seed, store, rng_seed=17, partition=experts[2].partition, domain=2)
    honest = experts[2].model_copy(update={"contributor": "somebody"})  # a record that nobody has scored
    store.secret()  # one order of blocks for all copies
    copies = [Store(shutil.copytree(store.root, tmp_path / name, symlinks=True)) for name in ("whole", "cut", "known")]
    cuts = []
    for expert in (noise, honest):
        for copy in copies:
            copy.add(expert)
        whole = accept(expert, "two", length=48, cap=40, store=copies[0])
        stops = 0
        for last in (0, 2, 5, None):
            scored = itertools.count()

            def stop(what, done, total, unit, scored=scored, last=last):
                if what == "score" and done == total and next(scored) == last:
                    raise KeyboardInterrupt

            try:
                cut = accept(expert, "two", length=48, cap=40, store=copies[1], progress=stop)
                break
            except KeyboardInterrupt:
                stops += 1
            if stops == 1:
                evaluate([seed.digest, "expert/0"], copies[1], length=48)
        cuts.append(stops)
        evaluate([seed.digest, expert.digest, "expert/0"], copies[2], length=48)
        known = accept(expert, "two", length=48, cap=40, store=copies[2])
        assert cut.record.digest == whole.record.digest == known.record.digest
        assert cut.cost.blocks == whole.cost.blocks == known.cost.blocks
    assert min(cuts) > 0
    assert sum(cuts) > 2
    assert ledger_of(copies[0]) == ledger_of(copies[1]) == ledger_of(copies[2])  # the budget is spent once


def test_two_at_once_spend_one_submission_and_give_one_verdict(grown):
    store, seed, experts = grown
    twin = lora_expert(seed, store, rng_seed=19, partition=experts[2].partition, domain=2)
    before, found = len(ledger_of(store).entries), []

    def ask(**fields):
        found.append(accept(twin, "two", store=store, length=48, **fields))

    other = threading.Thread(target=ask)

    def start_the_other(_):
        lock = (store.root / "work" / "ledger.lock").stat().st_ino  # there while it is held
        other.start()
        while not any("->" in line and f":{lock} " in line for line in Path("/proc/locks").read_text().splitlines()):
            assert other.is_alive()

    ask(on_submission=start_the_other)
    other.join()
    assert found[0].record == found[1].record
    assert len(ledger_of(store).entries) == before + 1


def test_words_for_people(grown):
    store, _, _ = grown
    done = CliRunner().invoke(app, ["accept", "expert/0", "two", "--length", "48", "--store", str(store.root)], catch_exceptions=False)
    for words in ("join", "passed", "at least", "blocks drawn", "sealed before"):
        assert words in done.stdout


def test_inner_products_of_any_kinds_are_those_of_the_weights(grown):
    store, seed, experts = grown
    whole = full_expert(seed, store, rng_seed=3)

    def delta(expert):
        base = {k: v.astype(np.float64) for k, v in safetensors.numpy.load_file(store.get(seed.files["model.safetensors"])).items()}
        if "model.safetensors" in expert.files:
            mine = safetensors.numpy.load_file(store.get(expert.files["model.safetensors"]))
            return np.concatenate([(mine[name] - base[name]).ravel() for name in sorted(base)])
        pairs, _ = factors(expert, store)
        zero = {name: np.zeros(value.shape) for name, value in base.items()}
        zero |= {f"{name}.weight": b_OR.astype(np.float64) @ a_RI for name, (a_RI, b_OR) in pairs.items()}
        return np.concatenate([zero[name].ravel() for name in sorted(zero)])

    members = [experts[0], whole, experts[1]]
    delta_MN = np.stack([delta(one) for one in members])
    np.testing.assert_allclose(products(members, seed, store), delta_MN @ delta_MN.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(products(experts[:2], seed, store), (delta_MN @ delta_MN.T)[::2, ::2], rtol=1e-5, atol=1e-5)


def test_strangers_and_other_things_are_refused(grown):
    store, _, experts = grown
    other = tiny_seed(store, rng_seed=5)
    stranger = lora_expert(other, store, rng_seed=0, partition=experts[0].partition, domain=0)
    for words, error in (((stranger.digest, "two"), ForeignExpert), (("expert/0", "expert/1"), BadInput)):
        with pytest.raises(error):
            asked(store, *words)
    assert isinstance(store.load(other.digest), Seed)
    assert isinstance(store.load(stranger.digest), Expert)
