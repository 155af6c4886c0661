"""The gate lets in the adapter of the recipe, and nothing else: malformed files, other formats, other tensors, NaN."""

import io
import json
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from tiny_models import tiny_seed
from topics import build_corpus, some_sentences

from benches.hub import fuzz
from elmwood.hub.client.gate import CONFIG, WEIGHTS, Refused, adapter_config, check_adapter, expected_tensors
from elmwood.records import Expert, Recipe
from elmwood.train.tasks import train
from elmwood.weights.similarity import products

SHAPES = fuzz.SHAPES
SIZE = 4 * 32 * 4  # bytes of each


def adapter(**changed):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()} | changed


def header(entries, size=None):
    """A file with this header, and so many bytes of values."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(SIZE * len(SHAPES) if size is None else size)


def entries(**changed):
    found = {
        name: {"dtype": "F32", "shape": list(shape), "data_offsets": [SIZE * n, SIZE * (n + 1)]}
        for n, (name, shape) in enumerate(SHAPES.items())
    }
    return found | changed


FIRST, SECOND = list(SHAPES)[:2]
ONE = entries()[FIRST]
DOUBLE = json.dumps(entries()).replace(f'"{SECOND}"', f'"{FIRST}"', 1).encode()
MALFORMED = {
    "cut short": header(entries())[:-7],
    "bytes behind": header(entries()) + b"more",
    "overlap": header(entries(**{SECOND: ONE}), SIZE * 5),
    "hole": header(entries(**{SECOND: ONE | {"data_offsets": [2 * SIZE, 3 * SIZE]}}), SIZE * 7),
    "offsets that overflow": header(entries(**{FIRST: ONE | {"data_offsets": [0, 2**63]}})),
    "a length that overflows": struct.pack("<Q", 2**63) + b"{}",
    "a header of more than 1 MB": header(json.dumps(entries() | {"__metadata__": {"x": "y" * (1 << 20)}}).encode()),
    "metadata that are nested": header(entries(__metadata__={"format": {"pt": 1}})),
    "a key that stands twice": header(DOUBLE),
    "a rank without end": header(entries(**{FIRST: ONE | {"shape": [1] * 100_000}})),
    "a million empty tensors": header(json.dumps({str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(30_000)})
                                      .encode(), 0),
    "an empty file": b"",
    "a header that is no object": header(b"[" * 100_000 + b"]" * 100_000),
    "a size that is no number": header(entries(**{FIRST: ONE | {"shape": [4, True]}})),
}  # fmt: skip


def refused(path, content, expected=SHAPES):
    path.write_bytes(content)
    began = time.process_time()
    with pytest.raises(Refused) as caught:
        check_adapter(path, expected)
    took = time.process_time() - began
    assert str(path.parent) not in str(caught.value)
    assert len(str(caught.value)) < 2000
    return caught.value, took


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_at_once(tmp_path, name):
    error, took = min((refused(tmp_path / "a", MALFORMED[name]) for _ in range(3)), key=lambda one: one[1])
    assert (error.code, error.status) == ("not-safetensors", 415)
    assert took < 0.05


def test_other_formats_under_its_name_are_refused(tmp_path):
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("data.pkl", "x")
    for content in (pickle.dumps(adapter()), zipped.getvalue(), b"GGUF" + bytes(100), b"\x93NUMPY" + bytes(100), b"{}", b"<html>"):
        assert refused(tmp_path / "a", content)[0].code == "not-safetensors"


@pytest.mark.parametrize("name", ["../../etc/passwd", "\u200b", "base_model.model.lm_head.lora_A.weight", "tokenizer", ""])
def test_names_of_other_things_are_refused(tmp_path, name):
    error, _ = refused(tmp_path / "a", safetensors.numpy.save(adapter(**{name: np.zeros(4, np.float32)})))
    assert (error.code, error.status) == ("wrong-tensors", 422)
    assert repr(name) in str(error)


def test_what_is_unlike_is_listed_to_the_fifth(tmp_path):
    changed = {name: np.zeros((5, 32), np.float16) for name in SHAPES}
    error, _ = refused(tmp_path / "a", safetensors.numpy.save(changed))
    assert str(error).count("has to be F32") == 5
    assert "and 1 more" in str(error)
    fewer = dict(list(adapter().items())[:3])
    error, _ = refused(tmp_path / "a", safetensors.numpy.save(fewer))
    assert str(error).count("is missing") == 3
    error, _ = refused(tmp_path / "a", safetensors.numpy.save(adapter(), {"format": "pt", "chat_template": "{{ x }}"}))
    assert "metadata" in str(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(tmp_path, value):
    broken = adapter()
    broken[SECOND].flat[17] = value
    error, _ = refused(tmp_path / "a", safetensors.numpy.save(broken))
    assert (error.code, error.status) == ("not-finite", 422)
    assert SECOND in str(error)


def test_of_files_that_are_almost_adapters_none_is_let_in_and_none_breaks_the_gate(tmp_path):
    """12: a small share of the 100,000 cases of `python -m benches.hub.fuzz`."""
    found = fuzz.fuzz(1000, tmp_path)
    assert (found.wrong, found.crashes) == (0, 0)
    assert 0 < found.let_in < 200
    assert found.slowest_s < 0.2
    assert found.grown_bytes < 50 << 20


def test_what_training_makes_is_let_in_and_its_config_made_here_says_the_same(store, seed, tmp_path):
    corpus = build_corpus(tmp_path / "text", store, some_sentences(("the {0} sailed {1}",), 4, 8))
    for fields in ({}, {"alpha": 6.0, "targets": ("q_proj", "up_proj")}, {"late": 0.5}):
        recipe = Recipe(method="lora", steps=2, batch=2, length=32, learning_rate=1e-2, rank=3, **fields)
        expert = train(seed, corpus.train, recipe, store)
        expected = expected_tensors(seed, recipe, store)
        check_adapter(store.get(expert.files[WEIGHTS]), expected)
        config = adapter_config(recipe, seed, expected)
        made = expert.model_copy(update={"files": {WEIGHTS: expert.files[WEIGHTS], CONFIG: store.put(config)}})
        assert isinstance(made, Expert)
        product_22 = products([expert, made], seed, store)
        assert product_22[0, 0] > 0
        np.testing.assert_allclose(product_22, product_22[0, 0], rtol=1e-6)
    with pytest.raises(Refused, match="missing"):
        check_adapter(
            store.get(expert.files[WEIGHTS]), expected_tensors(tiny_seed(store, 3), Recipe(method="lora", steps=1, rank=3), store)
        )
