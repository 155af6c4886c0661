"""Statistics that experts leave, and the rules and estimates that use them."""

import json
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, full_expert, lora_expert, tiny_seed

from elmwood.corpus.build import build
from elmwood.corpus.tokens import pack
from elmwood.engine import silent
from elmwood.errors import BadInput
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.estimate import by_coordinates, estimates
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.states import statistics_of
from elmwood.merge.statistics import open_statistics
from elmwood.records import Domain, Embedder, Merged, Partition, Recipe, Statistics
from elmwood.store import Store
from elmwood.store.headers import read_header
from elmwood.study.merging import merge as merge_verb
from elmwood.study.quality.selection import by_columns, tune
from elmwood.train.card import precision
from elmwood.train.data import batches
from elmwood.train.statistics import statistics
from elmwood.train.tasks import train

ROWS = 3


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A store with a seed, and two experts of it with their statistics: a full one and an adapter."""
    folder = tmp_path_factory.mktemp("grown")
    store = Store(folder / "store")
    texts = [" ".join(np.random.default_rng(n).choice(WORDS.split(), 60)) for n in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = build([str(folder / "text.jsonl")], store)
    seed = tiny_seed(store)
    recipes = [Recipe(steps=3, length=32, batch=2), Recipe(method="lora", rank=4, learning_rate=0.05, steps=3, length=32, batch=2)]
    experts = [train(seed, corpus.train, recipe, store, device="cpu") for recipe in recipes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "uses_bf16", lambda device: False)  # CPUs with AMX: the test works them out in float32
        for expert in experts:
            statistics(expert, store, rows=ROWS, device="cpu")
    return store, seed, corpus, experts


def test_statistics_are_what_their_words_say(grown):
    """Gram matrices from the layers' inputs and squared gradients from autograd, both worked out another way."""
    store, seed, corpus, experts = grown
    for expert in experts:
        held = open_statistics(expert.digest, store)
        model = load_model(seed, store, expert, "cpu", torch.float32)
        model = model.merge_and_unload() if expert.recipe.method == "lora" else model
        model.requires_grad_(True)
        packed = pack(corpus.train, tokenizer(seed, store), seed.separator, store)
        recipe = expert.recipe.model_copy(update={"batch": 1, "rng_seed": expert.recipe.rng_seed + 1})
        name, read = "model.layers.1.mlp.down_proj.weight", []
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, inputs, read=read: read.append(inputs[0].detach())
        )
        squares = 0.0
        for _, batch in zip(range(ROWS), batches(packed, recipe), strict=False):
            tokens, targets, positions = (torch.from_numpy(part) for part in batch)
            begun = torch.arange(positions.shape[1]) - positions[0]
            apart = (begun[:, None] != begun[None, :]) | torch.ones(len(begun), len(begun)).triu(1).bool()
            mask = torch.zeros(len(begun), len(begun)).masked_fill(apart, -torch.inf)[None, None]
            logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask).logits
            model.zero_grad()
            torch.nn.functional.cross_entropy(logits[0], targets[0]).backward()
            squares = squares + model.get_parameter(name).grad.double().square() / ROWS
        x_TI = torch.cat(read).flatten(0, 1).double().numpy()
        np.testing.assert_allclose(held.gram(name), x_TI.T @ x_TI / len(x_TI), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(held.fisher(name) * held.record.fisher, squares.numpy(), rtol=1e-3, atol=1e-9)
        assert np.array_equal(held.gram(name.replace("down", "up")), held.gram(name.replace("down", "gate")))
        assert held.gram("model.norm.weight") is None


def test_wide_layers_leave_a_sketch_with_the_exact_diagonal(grown, monkeypatch):
    store, _, _, (expert, _) = grown
    exact = open_statistics(expert.digest, store).gram(name := "model.layers.0.mlp.down_proj.weight")
    module = import_module("elmwood.train.statistics")
    monkeypatch.setattr(module, "WIDE", 40)
    monkeypatch.setattr(module, "DIRECTIONS", 20)
    record = statistics(expert, store, rows=ROWS + 1, device="cpu")  # another number of rows is another record
    assert isinstance(record, Statistics)
    again = open_statistics(expert.digest, store)
    assert again.record.rows == ROWS + 1
    sketch = again.gram(name)
    assert np.linalg.eigvalsh(sketch).min() > -1e-6
    assert np.linalg.norm(sketch - exact) < 0.3 * np.linalg.norm(exact)


def test_an_expert_without_text_or_statistics_says_so(grown):
    store, seed, _, _ = grown
    stranger = full_expert(seed, store, 9)
    with pytest.raises(BadInput, match="names no training text"):
        statistics(stranger, store)
    with pytest.raises(BadInput, match="elmwood statistics"):
        open_statistics(stranger.digest, store)


def test_estimates_are_the_layers_output_errors(grown):
    """The three sums give what going through each expert does, and a candidate that is an expert costs nothing for it."""
    store, seed, _, experts = grown
    candidates = dict(
        zip(
            ("average", "regmean", "ta"),
            merge(
                seed, {one.digest: everywhere(1.0) for one in experts},
                [Answer("average", {}), Answer("regmean", {"alpha": 1.0, "ridge": 1e-9}), Answer("task_arithmetic", {"scale": 0.3})], store,
            ),
            strict=True,
        )
    )  # fmt: skip
    base, *merges = (
        {key: value.double().numpy() for key, value in load_file(store.get(one.files["model.safetensors"])).items()}
        for one in (seed, *candidates.values())
    )
    known = [(open_statistics(one.digest, store), _weights(seed, one, store)) for one in experts]
    for kind in ("gram", "fisher"):
        found = estimates(seed, [one.digest for one in experts], candidates, store, kind)
        for name, merged in zip(candidates, merges, strict=True):
            layers: dict[str, list[float]] = {}
            for key in base:
                where = key.split(".")[2] if ".layers." in key else "outside"
                if kind == "fisher":
                    layers.setdefault(where, []).append(
                        sum(left.record.fisher / 2 * (left.fisher(key) * (merged[key] - own[key]) ** 2).sum() for left, own in known)
                    )
                elif known[0][0].gram(key) is not None:
                    error, energy = (
                        sum(np.trace((weights[key] - own[key]) @ left.gram(key) @ (weights[key] - own[key]).T) for left, own in known)
                        for weights in (merged, base)
                    )
                    layers.setdefault(where, []).append(error / energy)
            total = {where: np.sum(values) if kind == "fisher" else np.mean(values) for where, values in layers.items()}
            assert found[name] == pytest.approx(total, rel=1e-3), (kind, name)
        if kind == "gram":  # RegMean is what minimises it
            assert min(found, key=lambda name: sum(found[name].values())) == "regmean"
            assert min(found, key=lambda name: found[name]["0"]) == "regmean"


def _weights(seed, expert, store):
    model = load_model(seed, store, expert, "cpu", torch.float32)
    model = model.merge_and_unload() if expert.recipe.method == "lora" else model
    return {name: weight.detach().double().numpy() for name, weight in model.named_parameters()}


def test_estimates_choose_layers_and_true_losses_decide(grown):
    store, _, corpus, experts = grown
    names = []
    for place, one in enumerate(experts):
        store.name(f"e/{place}", one.digest)
        names.append(f"e/{place}")
    store.name("p", store.add(_partition(corpus)))
    done = merge_verb(names, store, method=["average", "regmean", "wudi"], scale=[4, 8, 16], choose=True, per_layer=True, run=5,
                      partition="p", documents=4)  # fmt: skip
    assert done.choice
    losses = {name: loss.value for name, loss in done.choice.tuned.losses.items()}
    assert 5 < done.choice.looked <= 5 + 1 + 2 * 3  # three places: two layers, and what is outside; the beginning once more
    assert done.choice.best == min(losses, key=losses.__getitem__)
    assert done.choice.test.record.b == done.record.digest  # against the seed, on blocks that nothing was chosen on
    assert done.choice.test.record.split == "gate"
    others = {record.digest for name, record in done.made.items() if name != "by_layer"}
    assert set(done.record.layers.values()) <= others  # found with exchanged layers, scored as a checkpoint
    assert losses["by_layer"] < min(value for name, value in losses.items() if name != "by_layer")


def test_layers_are_refused_where_there_is_nothing_to_choose(grown):
    store, _, _, experts = grown
    names = [one.digest for one in experts]
    for methods, choose in ((["average"], False), (["average"], True), (["average", "svd"], True)):
        with pytest.raises(BadInput, match="--per-layer takes layers"):
            merge_verb(names, store, method=methods, choose=choose, per_layer=True)


@given(
    loss_LC=hypothesis.extra.numpy.arrays(np.float64, (4, 3), elements=st.integers(0, 50).map(float)),
    estimate_LC=hypothesis.extra.numpy.arrays(np.float64, (4, 3), elements=st.integers(0, 50).map(float)),
)
def test_the_search_by_layers_finds_the_best_of_each_where_losses_add(loss_LC, estimate_LC):
    """Estimates that know the losses lead to the least of all, any others to none above the beginning; each layer tried twice at most."""
    layers, names = ["0", "1", "2", "outside"], ["a", "b", "c"]
    looked = []

    def loss(choice):
        looked.append(dict(choice))
        return sum(loss_LC[layers.index(layer), names.index(name)] for layer, name in choice.items())

    for known_LC in (loss_LC, estimate_LC):
        estimated = {name: dict(zip(layers, known_LC[:, at], strict=True)) for at, name in enumerate(names)}
        looked.clear()
        choice = by_coordinates("a", ["b", "c"], layers, estimated, loss)
        assert len(looked) <= 1 + 2 * len(layers)
        found = loss(choice)
        assert found <= loss_LC[:, 0].sum()
        if known_LC is loss_LC:
            assert found == loss_LC.min(1).sum()
            gains_L = [loss_LC[layers.index(layer)].min() - loss_LC[layers.index(layer), 0] for layer in changed(looked)]
            assert gains_L == sorted(gains_L)  # the most promising first


def changed(looked):
    """The layers in the order in which they were first tried with something else."""
    found = []
    for choice in looked:
        found += [layer for layer, name in choice.items() if name != "a" and layer not in found]
    return found


def test_where_statistics_are_missing_columns_put_answers_in_order(grown):
    """Of weighted sums of experts the pool of their columns is near the merge; of the seed alone it is the seed."""
    store, seed, corpus, _ = grown
    experts = [lora_expert(seed, store, rng_seed=20 + n) for n in range(2)]
    store.name("p", store.add(_partition(corpus)))
    for place, one in enumerate(experts):
        store.name(f"bare/{place}", one.digest)
    done = merge_verb(["bare/0", "bare/1"], store, method="task_arithmetic", scale=[0.01, 0.2, 3], choose=True, run=2, partition="p",
                      documents=4)  # fmt: skip
    assert done.choice
    assert done.choice.ranked
    assert done.choice.ranked.by == "columns"
    assert len(done.made) == 2
    merged = [one for digest in store.records() if isinstance(one := store.load(digest), Merged)]
    mine = {one.digest for one in experts}
    made = {str(one.settings["scale"]): one for one in merged if {part.expert for part in one.contributions} == mine}
    guessed = by_columns(made, seed, "p", 4, store, silent)
    true = tune(made, seed, "p", 4, store, silent).losses
    assert guessed["0.01"] == pytest.approx(true["0.01"].value, abs=0.02)
    assert sorted(guessed, key=guessed.__getitem__)[-1] == "3.0"


def _partition(corpus):
    domain = Domain(name="all", train=corpus.train, holdout=corpus.holdout)
    nothing = "sha256:" + "0" * 64
    return Partition(corpus=corpus.digest, embedder=Embedder(name="none", dimension=1, files={}), centroids=nothing, domains=(domain,))


def _claim(record, store, change, **fields):
    """The same statistics as another might send them: changed tensors, other fields."""
    tensors = {name: change(name, value.clone()) for name, value in load_file(store.get(record.files["statistics.safetensors"])).items()}
    same = read_header(store.get(record.files["statistics.safetensors"])).metadata
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, path := Path(folder) / "statistics.safetensors", dict(same))
        made = record.model_copy(update={"files": {path.name: store.put(path)}, **fields})
    store.add(made)
    return made


def _broken(kind, value):
    def change(name, tensor):
        if name.startswith(kind):
            tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        (lambda name, value: value, {"tokens": 10**15}, "tokens, and"),
        (_broken("fisher", float("nan")), {}, "not finite"),
        (_broken("gram", -1.0), {}, "at least 0 on its diagonal"),
        (lambda name, value: value * 1e6 if name.startswith("fisher") else value, {}, "on average"),
        (lambda name, value: torch.zeros_like(value) if name.startswith("fisher") else value, {}, "on average"),
        (lambda name, value: value * 1e6 if name.startswith("gram") else value, {}, "as large as the experts' median"),
    ],
)
def test_statistics_of_others_are_bounded_and_never_put_before_own_ones(grown, tmp_path, change, fields, words):
    store, _, _, (expert, other) = grown
    own = open_statistics(expert.digest, store).record
    theirs = Store(shutil.copytree(store.root, tmp_path / "theirs", symlinks=True))
    claim = _claim(own, theirs, change, **{"tokens": own.rows * expert.recipe.length, **fields, "rows": own.rows})
    assert open_statistics(expert.digest, theirs).record.digest == own.digest  # whatever another claims
    stranger = Store(tmp_path / "stranger")  # has the same, and made none of it
    shutil.copytree(theirs.root / "blobs", stranger.root / "blobs", symlinks=True)
    for digest in (expert.digest, other.digest, claim.digest, open_statistics(other.digest, store).record.digest):
        stranger.add(theirs.load(digest))
    with pytest.raises(BadInput, match=words):
        statistics_of(True, [expert.digest, other.digest], stranger)
