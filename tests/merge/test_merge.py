"""Merged checkpoints: weights by depth, what other tools open, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_merges import equally, weights_of
from tiny_models import config_seed, full_expert, leave_statistics, lora_expert, tiny_seed
from transformers import AutoModelForCausalLM, LlamaConfig

from elmwood.errors import BadInput, ForeignExpert, UnknownName
from elmwood.lm.load import load_model
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.layer_weights import weight_of
from elmwood.merge.states import add, remove, state
from elmwood.records import Expert, Recipe, Share
from elmwood.store import Store


def test_weights_by_depth_and_name(forest):
    store, seed, experts = forest
    shares = (Share(tensors="norm", values=(0.0,)), Share(values=(1.0, 0.0)))
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)]
    assert [weight_of(shares, name, 3) for name in names] == [1.0, 0.5, 0.0]
    assert weight_of(shares, "model.embed_tokens.weight", 3) == 1.0
    assert weight_of((Share(layers=(1, 2), values=(1.0,)),), names[0], 3) == 0.0
    (record,) = merge(seed, {one.digest: shares for one in experts[:2]}, [Answer("task_arithmetic", {})], store)
    got, base = weights_of(record, store), weights_of(seed, store)
    assert np.array_equal(got["model.norm.weight"], base["model.norm.weight"])
    last, first = (f"model.layers.{n}.mlp.up_proj.weight" for n in (1, 0))
    assert np.array_equal(got[last], base[last])
    assert not np.array_equal(got[first], base[first])


def test_a_merge_opens_in_transformers(forest):
    store, seed, experts = forest
    (record,) = merge(seed, equally(experts), [Answer("average", {})], store)
    folder = store.folder(record.files)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.isfinite(model(torch.tensor([[0, 1, 2]])).logits).all()
    card = (folder / "README.md").read_text()
    assert all(expert.digest in card for expert in experts)
    assert seed.digest in card
    assert merge(seed, equally(experts), [Answer("average", {})], store)[0].digest == record.digest


def test_bf16_seeds_stay_bf16(tmp_path):
    store = Store(tmp_path)
    seed = tiny_seed(store)
    half = _in_bf16(seed, store)
    experts = [_in_bf16(full_expert(seed, store, n), store, seed=half.digest) for n in range(3)]
    (record,) = merge(half, equally(experts), [Answer("average", {})], store)
    made = load_file(store.get(record.files["model.safetensors"]))
    for name, value in made.items():
        assert value.dtype == torch.bfloat16
        mean = sum(load_file(store.get(one.files["model.safetensors"]))[name].double() for one in experts) / 3
        assert (value.double() - mean).abs().max() <= mean.abs().max() * 2**-8


def _in_bf16(record, store, **changes):
    weights = {name: value.bfloat16() for name, value in load_file(store.get(record.files["model.safetensors"])).items()}
    path = Path(store.root) / "half.safetensors"
    save_file(weights, path, {"format": "pt"})
    made = record.model_copy(update={"files": record.files | {"model.safetensors": store.put(path)}, **changes})
    store.add(made)
    return made


def test_nonsense_is_refused(forest, tmp_path):
    store, seed, experts = forest
    with pytest.raises(BadInput, match="two experts"):
        merge(seed, equally(experts[:1]), [Answer("average", {})], store)
    with pytest.raises(UnknownName, match="no merge rule"):
        merge(seed, equally(experts), [Answer("magic", {})], store)
    with pytest.raises(BadInput, match="no setting"):
        merge(seed, equally(experts), [Answer("average", {"density": 0.5})], store)
    other = tiny_seed(store, rng_seed=5)
    with pytest.raises(ForeignExpert, match="one seed"):
        merge(other, equally(experts), [Answer("average", {})], store)
    weights = load_file(store.get(experts[0].files["model.safetensors"]))
    name = "model.layers.0.mlp.up_proj.weight"
    broken = {
        "diverged": weights | {name: torch.full_like(weights[name], torch.nan)},
        "architecture": weights | {name: weights[name].T.contiguous()},
        "lacks": {key: value for key, value in weights.items() if key != name},
    }
    for words, bad in broken.items():
        save_file(bad, tmp_path / "bad.safetensors", {"format": "pt"})
        files = experts[0].files | {"model.safetensors": store.put(tmp_path / "bad.safetensors")}
        stranger = Expert(seed=seed.digest, data=(), recipe=Recipe(method="full", steps=1), files=files)
        store.add(stranger)
        for method in ("average", "ties"):
            with pytest.raises((BadInput, ForeignExpert), match=words):
                merge(seed, equally([experts[1], stranger]), [Answer(method, {})], store)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_even_where_nothing_is_trimmed_or_added(bad, forest, tmp_path):
    store, seed, experts = forest
    weights = load_file(store.get(experts[0].files["model.safetensors"]))
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = bad
    save_file(weights, tmp_path / "bad.safetensors", {"format": "pt"})
    files = experts[0].files | {"model.safetensors": store.put(tmp_path / "bad.safetensors")}
    stranger = Expert(seed=seed.digest, data=(), recipe=Recipe(method="full", steps=1), files=files)
    store.add(stranger)
    whole = {"density": 1.0}
    for answer in [Answer("average", {}), Answer("ties", whole), Answer("breadcrumbs", whole), Answer("dare", whole)]:
        with pytest.raises(BadInput, match="diverged"):
            merge(seed, equally([experts[1], stranger]), [answer], store)
    with pytest.raises(BadInput, match="diverged"):
        merge(seed, equally([experts[1], experts[2]]) | equally([stranger], 0.0), [Answer("average", {})], store)


def test_a_tokenizer_in_the_older_spelling_is_the_same_tokenizer(forest, tmp_path):
    store, seed, experts = forest
    words = json.loads(store.get(seed.files["tokenizer.json"]).read_bytes())
    words["model"]["merges"] = [" ".join(pair) for pair in words["model"]["merges"]]
    files = experts[0].files | {"tokenizer.json": store.put(json.dumps(words, indent=2).encode())}
    older = experts[0].model_copy(update={"files": files})
    store.add(older)
    merged = [merge(seed, equally([one, experts[1]]), [Answer("average", {})], store)[0] for one in (older, experts[0])]
    assert merged[0].files["model.safetensors"] == merged[1].files["model.safetensors"]
    words["model"]["vocab"] |= {"unheard of": len(words["model"]["vocab"])}
    other = older.model_copy(update={"files": files | {"tokenizer.json": store.put(json.dumps(words).encode())}})
    store.add(other)
    with pytest.raises(BadInput, match="another tokenizer"):
        merge(seed, equally([other, experts[1]]), [Answer("average", {})], store)


def test_other_vocabularies_are_refused_or_resized(forest, tmp_path):
    store, seed, experts = forest
    weights = load_file(store.get(experts[0].files["model.safetensors"]))
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:300].contiguous()
    save_file(weights, tmp_path / "short.safetensors", {"format": "pt"})
    files = {"model.safetensors": store.put(tmp_path / "short.safetensors")}
    short = Expert(seed=seed.digest, data=(), recipe=Recipe(method="full", steps=1), files=files)
    store.add(short)
    with pytest.raises(BadInput, match="--resize"):
        merge(seed, equally([experts[1], short]), [Answer("average", {})], store)
    (record,) = merge(seed, equally([experts[1], short]), [Answer("average", {})], store, resize=True)
    base, one = weights_of(seed, store)[name], weights_of(experts[1], store)[name]
    np.testing.assert_array_equal(weights_of(record, store)[name][300:], ((base + one) / 2)[300:].astype(np.float32))


def test_an_adapter_merges_like_the_checkpoint_it_stands_for(forest, tmp_path):
    store, seed, experts = forest
    adapter = experts[3]
    folded = load_model(seed, store, adapter, device="cpu").merge_and_unload()
    folded.save_pretrained(tmp_path)
    full = Expert(seed=seed.digest, data=(), recipe=Recipe(method="full", steps=1), files=store.put_folder(tmp_path))
    store.add(full)
    one, other = (weights_of(merge(seed, equally([experts[0], e]), [Answer("average", {})], store)[0], store) for e in (adapter, full))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)


def test_an_adapter_for_other_modules_is_refused(forest):
    """Modules the seed does not have, or has in another shape: the adapter of a wider seed, and one of another layout."""
    store, seed, experts = forest
    wide = config_seed(LlamaConfig(hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=320), store)
    deep = config_seed(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=320), store)
    for other in (wide, deep):
        stranger = lora_expert(other, store, 0).model_copy(update={"seed": seed.digest})
        store.add(stranger)
        with pytest.raises(ForeignExpert, match="grew on another"):
            merge(seed, equally([experts[0], stranger]), [Answer("average", {})], store)


def test_settings_and_experts_that_do_not_go_together_are_refused(forest):
    store, seed, experts = forest
    with pytest.raises(BadInput, match="between two"):
        merge(seed, equally(experts), [Answer("slerp", {})], store)
    with pytest.raises(BadInput, match="reach 1"):
        merge(seed, equally(experts), [Answer("della", {"density": 0.95})], store)
    one, other = (state(seed, equally([expert]), "fisher", {}, store) for expert in experts[:2])
    both = add(one, other, store)
    leave_statistics(experts[0], seed, store, 77, rows=99)
    with pytest.raises(BadInput, match="other statistics"):
        remove(both, experts[0].digest, store)
    twin = Expert(**(experts[0].model_dump() | {"contributor": "nobody"}))
    store.add(twin)
    with pytest.raises(BadInput, match="left no statistics"):
        merge(seed, equally([experts[1], twin]), [Answer("regmean", {})], store)
