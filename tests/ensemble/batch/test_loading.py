"""What may become ready (S8): an adapter whose every tensor is used, that fits the seed and changes it; from its files or its record."""

import json
import queue
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import lora_expert, save_adapter, tiny_seed
from transformers import LlamaConfig, LlamaForCausalLM

from elmwood.ensemble.batch.engine import layers_of, open_batched
from elmwood.ensemble.batch.interface import Ended, Request, Said
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, Damaged
from elmwood.lm import probe
from elmwood.lm.adapters.lora import Adapter, adapter_of, layout
from elmwood.lm.adapters.packed import Packed
from elmwood.lm.adapters.slots import halves, read_record
from elmwood.lm.load import load_model
from elmwood.store import Store


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter in a folder, its layers, and the numbers it should have."""
    folder = tmp_path_factory.mktemp("adapter")
    store = Store(folder / "store")
    seed = tiny_seed(store)
    source = adapter_of(lora_expert(seed, store, 7), store)
    for path, name in zip(source, ("adapter_config.json", "adapter_model.safetensors"), strict=True):
        shutil.copy(path, folder / name)
    found = Adapter(folder / "adapter_config.json", folder / "adapter_model.safetensors")
    layers = layout(load_model(seed, store), [found])
    return found, layers, load_file(found.weights)


def broken(adapter, folder, change):
    """A copy of an adapter with other tensors."""
    found, layers, tensors = adapter
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return Adapter(found.config, folder / "adapter_model.safetensors"), layers


def numbers(layers):
    return torch.full((sum(layer.numbers for layer in layers),), torch.nan)


def test_an_adapter_is_read_into_its_record(adapter, tmp_path):
    found, layers, tensors = adapter
    flat_P, again_P = numbers(layers), numbers(layers)
    read_record(found, layers, flat_P)
    for layer in layers:
        (a_RI,), (b_RO,) = halves(flat_P[None], layer)
        key = f"base_model.model.{layer.name}.lora_"
        assert torch.equal(a_RI, tensors[f"{key}A.weight"])
        assert torch.equal(b_RO.T, 2 * tensors[f"{key}B.weight"]), "alpha over rank is 2"
    packed = Packed(tmp_path, layers)
    packed.load(found, ["a", "b"], again_P)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    whole = path.read_bytes()
    for content in (whole, whole[:-1], whole + b"x", whole[:60] + b"\1\2\3\4" + whole[64:], b""):
        path.write_bytes(content)
        third_P = numbers(layers)
        packed.load(found, ["a", "b"], third_P)
        assert torch.equal(third_P, flat_P)
        assert torch.equal(again_P, flat_P)
        assert path.read_bytes() == whole, "a damaged record is written again"


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_"
HALVES = ("A.weight", "B.weight")
CHANGES = {
    "half a layer": lambda tensors: tensors.pop(KEY + "A.weight"),
    "a layer of another model": lambda tensors: tensors.update({KEY.replace("1", "9") + half: torch.ones(4, 4) for half in HALVES}),
    "other sizes": lambda tensors: tensors.update({KEY + "A.weight": torch.ones(4, 31)}),
    "a larger rank": lambda tensors: tensors.update({KEY + "A.weight": torch.ones(5, 32), KEY + "B.weight": torch.ones(48, 5)}),
    "a tensor nobody knows": lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(32)}),
    "not finite": lambda tensors: tensors[KEY + "B.weight"].fill_(torch.inf),
    "nothing": lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_whole_adapter_of_this_seed_is_refused(change, adapter, tmp_path):
    found, layers = broken(adapter, tmp_path, CHANGES[change])
    with pytest.raises(BadInput):
        Packed(tmp_path / "packed", layers).load(found, ["a", "b"], numbers(layers))
    assert not (tmp_path / "packed").exists()


def test_a_file_cut_short_is_refused(adapter, tmp_path):
    found, layers, _ = adapter
    for size in (0, 7, 100, found.weights.stat().st_size - 1):
        cut = tmp_path / f"{size}.safetensors"
        cut.write_bytes(found.weights.read_bytes()[:size])
        with pytest.raises((BadInput, Damaged)):
            read_record(Adapter(found.config, cut), layers, numbers(layers))


def test_a_refused_expert_is_no_candidate_any_more(house, tmp_path):
    """Texts go to the others; who asks for it alone is told why."""
    model = load_model(house.seed, house.store, device="cpu")
    save_adapter(model, str(tmp_path), 5, r=4, lora_alpha=8, target_modules="all-linear")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    files = house.store.put_folder(tmp_path)
    idle = house.add(house.experts[0].model_copy(update={"files": files, "domain": 2}))
    record = house.ensemble([idle, house.experts[1]], top_k=2)
    engine = open_batched(record, house.store)
    try:
        ends = [engine_says(engine, Request(tuple(house.tokens[:20]), 4, stops=frozenset(), only=only)) for only in ((), (idle.digest,))]
    finally:
        engine.close()
    said, ended = ends[0]
    assert (ended, {name for one in said for name in one.weights}) == (Ended("length"), {house.experts[1].digest})
    assert (ends[1][0], ends[1][1].status) == ([], 503)
    assert "adds nothing" in ends[1][1].detail


def engine_says(engine, request):
    """What an engine says of a request."""
    heard: queue.SimpleQueue = queue.SimpleQueue()
    engine.submit(request, heard.put)
    events = [heard.get(timeout=120)]
    while not isinstance(events[-1], Ended):
        events.append(heard.get(timeout=120))
    return [event for event in events if isinstance(event, Said)], events[-1]


def test_layers_of_many_experts_are_those_of_each_configuration(house):
    model = load_model(house.seed, house.store, device="cpu")
    few = lora_expert(
        house.seed, house.store, 9, domain=0, partition=house.partition.digest, settings={"r": 2, "target_modules": ["q_proj"]}
    )
    layers = layers_of(model, [house.experts[0], few, few.model_copy(update={"contributor": "b"})], house.store)
    assert {layer.rank for layer in layers} == {4}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(BadInput, match="another base model"):
        layers_of(other, [few], house.store)


def test_an_expert_that_does_not_say_what_it_said_when_it_was_scored_is_refused(house):
    """S8: its probe is recorded where it is scored, by another path than the server's, and compared at the first load."""
    store, expert = house.store, house.experts[0]
    probe.note(open_model(expert, store, "cpu"), expert, store)
    (path,) = (store.root / "work" / "probes").rglob("*.json")
    whole = path.read_text()
    for change, refused in ((0.0, 0), (0.5, 1)):
        path.write_text(json.dumps([number + change for number in json.loads(whole)]))
        shutil.rmtree(store.root / "work" / "packed", ignore_errors=True)
        engine = open_batched(expert, store, "cpu")
        said, ended = engine_says(engine, Request(tuple(house.tokens[:9]), 2, stops=frozenset()))
        counts = engine.counts()
        engine.close()
        assert (len(said), ended.reason, counts.refused) == ((2, "length", 0) if not refused else (0, "error", 1))
    assert ended.status == 503
    assert "when it was trained or scored" in ended.detail
    path.unlink()
    assert probe.known(expert, store) is None


def test_an_expert_s_record_says_what_it_must_say(house):
    """It travels with the record: a store that never scored the expert has it too."""
    store, expert = house.store, house.experts[0]
    lm = open_model(expert, store, "cpu")
    said = probe.sample(lm.extend(probe.text(lm.vocabulary, lm.context), lm.start())[0])
    for change, refused in ((0.004, 0), (0.5, 1)):
        told = expert.model_copy(update={"probe": tuple(number + change for number in said)})
        store.add(told)
        probe.note(lm, told, store)
        assert not (store.root / "work" / "probes").exists() or probe.known(told, store) == list(told.probe)
        shutil.rmtree(store.root / "work" / "packed", ignore_errors=True)
        engine = open_batched(told, store, "cpu")
        _, ended = engine_says(engine, Request(tuple(house.tokens[:9]), 2, stops=frozenset()))
        assert (ended.reason, engine.counts().refused) == (("length", 0) if not refused else ("error", 1))
        engine.close()


def test_what_an_adapter_says_is_compared_within_rounding_of_bf16():
    seed, said = [-1.0, -2.0, -3.0], [-1.4, -2.0, -2.0]
    probe.compare(said, seed, None)
    probe.compare(said, seed, [-1.4, -2.1, -1.9])
    for one, recorded in ((seed, None), (seed, said), (said, [-1.2, -2.0, -2.5]), ([float("nan")] * 3, said)):
        with pytest.raises(BadInput):
            probe.compare(one, seed, recorded)
