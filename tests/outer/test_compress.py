"""Deltas in few bytes: what is read is what was written, sizes are known before, and nothing hostile is read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmwood.errors import BadInput, Damaged
from elmwood.outer.compress import BLOCK, CHUNK, FORMS, KEPT, expand, open_delta, shrink, size_of, write_delta

SHAPES = {"a.weight": (70, 60), "b": (3,), "c": (257,)}


def normal(shapes=SHAPES, rng_seed=0, scale=1e-3):
    rng = np.random.default_rng(rng_seed)
    return {name: (rng.standard_normal(int(np.prod(shape))) * scale).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_says_what_its_writer_was_told(form, tmp_path):
    delta, path = normal(), tmp_path / "delta"
    told = write_delta(path, delta, SHAPES, form)
    assert path.stat().st_size == size_of(SHAPES, form)
    sent = open_delta(path, SHAPES, form)
    for name in SHAPES:
        assert np.array_equal(sent.values(name), told[name])
    error = np.linalg.norm(told["a.weight"] - delta["a.weight"]) / np.linalg.norm(delta["a.weight"])
    assert error < {"int8": 0.01, "int4": 0.15, "top": 0.95}[form]


@pytest.mark.parametrize(("form", "bits"), [("int8", 8.125), ("int4", 4.125), ("top", 0.453125)])
def test_bits_of_a_value(form, bits):
    shapes = {"large": (1024, 1024)}
    assert size_of(shapes, form) * 8 / 1024**2 == pytest.approx(bits, rel=1e-2)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=600), st.sampled_from(["int8", "int4"]))
@settings(max_examples=60, deadline=None)
def test_the_error_of_a_code_is_at_most_half_a_step_of_its_block(values, form):
    value_N = np.array(values, np.float32)
    parts = shrink(value_N, form)
    step_N = np.repeat(parts["scale"], BLOCK)[: len(value_N)]
    assert (np.abs(expand(parts, form, len(value_N)).astype(float) - value_N) <= 0.5001 * step_N.astype(float) + 1e-44).all()


def test_top_keeps_the_largest_of_each_chunk():
    value_N = normal({"x": (CHUNK + 900,)})["x"]
    read_N = expand(shrink(value_N, "top"), "top", len(value_N))
    first = np.flatnonzero(read_N[:CHUNK])
    assert set(first) == set(np.argsort(-np.abs(value_N[:CHUNK]))[:KEPT])
    assert (np.sign(read_N[first]) == np.sign(value_N[first])).all()
    assert np.count_nonzero(read_N[CHUNK:]) == KEPT


def test_what_is_not_finite_is_neither_sent_nor_read():
    with pytest.raises(BadInput, match="NaN or infinity"):
        shrink(np.array([1, np.nan], np.float32), "int8")
    parts = shrink(np.ones(4, np.float32), "int8")
    with pytest.raises(BadInput, match="the whole proposal is dropped"):
        expand(parts | {"scale": np.array([np.inf], np.float32)}, "int8", 4)


def test_a_place_that_stands_twice_is_refused():
    parts = shrink(normal({"x": (CHUNK,)})["x"], "top")
    with pytest.raises(BadInput, match="do not ascend"):
        expand(parts | {"place": np.zeros_like(parts["place"])}, "top", CHUNK)


def test_a_file_of_another_size_form_or_model_is_refused(tmp_path):
    path = tmp_path / "delta"
    write_delta(path, normal(), SHAPES, "int8")
    with pytest.raises(BadInput, match="bytes"):
        open_delta(path, SHAPES, "int4")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"b|code"', b'"B|code"'))
    with pytest.raises(BadInput, match="another model"):
        open_delta(path, SHAPES, "int8")
    path.write_bytes(b"\xff" * len(raw))
    with pytest.raises(Damaged):
        open_delta(path, SHAPES, "int8")
