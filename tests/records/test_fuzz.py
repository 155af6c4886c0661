"""Files of strangers, changed at random: they are read, or an error of elmwood says why not. Nothing else comes out."""

import contextlib
import json
import struct
from random import Random

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benches.faults.mutations import change
from elmwood.errors import ElmwoodError
from elmwood.evaluate.columns import open_tensors
from elmwood.lm.adapters.peft_config import read_settings, scale
from elmwood.records import Comparison, Expert, Partition, Recipe, Row, State, canonical, parse, references
from elmwood.store.headers import load_arrays, read_header

BLOB, DIGEST = "sha256:" + "0" * 64, "1" * 64
EMBEDDER = {"name": "e", "dimension": 3, "files": {"embedder.json": BLOB}}
SHARD = {"blob": BLOB, "documents": 1, "bytes": 9}
SHARE = {"expert": DIGEST, "weight": [{"values": [1.0]}], "whole": True, "reach": 5}
RECORDS = [
    Expert(seed=DIGEST, domain=1, data=(BLOB,), recipe=Recipe(steps=4, alpha=2.0), files={"a": BLOB}),
    Partition(corpus=DIGEST, embedder=EMBEDDER, centroids=BLOB, domains=[{"name": "d", "train": [SHARD]}]),
    State(seed=DIGEST, method="ties", settings={"density": 0.5}, part=(1, 2), contributions=[SHARE], files={"sums": BLOB}),
    Comparison(holdout="h", rows=[Row(name="r", bits_per_byte=1.5, standard_error=0.1, perplexity=3.0, domains=(1.0, None))]),
]  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none", "use_rslora": False,
    "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.q_proj": 3}, "init_lora_weights": True, "layers_pattern": "layers",
}  # fmt: skip
HEADER = {
    "__metadata__": {"format": "np"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "loglik": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
}
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def changed(draw, values):
    """JSON bytes of one of these values, changed as the fuzz bench changes them."""
    return change(json.dumps(draw(st.sampled_from(values))).encode(), Random(draw(st.integers(0, 2**32 - 1))))


@FUZZ
@given(data=changed([json.loads(canonical(record)) for record in RECORDS]))
def test_a_changed_record_is_read_or_refused(data):
    try:
        record = parse(data)
    except ElmwoodError as error:
        assert len(str(error)) < 1000  # noqa: PT017
    else:
        list(references(record))
        again = parse(canonical(record))
        assert canonical(again) == canonical(record)


@FUZZ
@given(raw=changed([HEADER]), missing=st.integers(0, 2))
def test_a_changed_header_is_read_alike_by_all_or_refused(raw, missing, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(24 - missing))
    try:
        top = read_header(path)
    except ElmwoodError:
        for read in (load_arrays, open_tensors):
            with pytest.raises(ElmwoodError):
                read(path)
        return
    with safetensors.safe_open(path, "numpy") as file:  # the library agrees
        assert set(file.keys()) == set(top.tensors)
    for read in (load_arrays, open_tensors):
        with contextlib.suppress(ElmwoodError):  # a dtype that is not read there
            assert all(isinstance(one, np.ndarray) for one in read(path).values())


@FUZZ
@given(raw=changed([ADAPTER]))
def test_changed_settings_of_an_adapter_are_read_or_refused(raw, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(raw)
    try:
        found = read_settings(path)
    except ElmwoodError:
        return
    assert isinstance(scale(found, "model.layers.0.q_proj", 4), float)
