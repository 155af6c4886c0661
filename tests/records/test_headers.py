"""One strict check of safetensors headers stands before every reader."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from elmwood.errors import Damaged
from elmwood.evaluate.columns import open_tensors
from elmwood.store.headers import LARGEST, load_arrays, read_header, sort_metadata
from elmwood.weights.tensors import places


def write_file(path: Path, header: str | bytes | dict, values: int = 16) -> Path:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(values))
    return path


def tensor(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


ONE = json.dumps(tensor())
BAD: dict[str, tuple[str | bytes | dict, str]] = {
    "a list": ("[]", "no JSON object"),
    "deep": ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "damaged"),
    "latin": (b'{"\xe9": 1}', "damaged"),
    "twice": (f'{{"a": {ONE}, "a": {ONE}}}', "twice"),
    "twice inside": ('{"a": {"dtype": "F32", "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}', "twice"),
    "half a pair": (f'{{"\\ud800": {ONE}}}', "surrogates"),
    "half a pair in metadata": (f'{{"__metadata__": {{"n": "\\uD800"}}, "a": {ONE}}}', "surrogates"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, "needs a dtype"),
    "more keys": ({"a": tensor(more=1)}, "nothing else"),
    "an entry of text": ({"a": "F32"}, "needs a dtype"),
    "texts as offsets": ({"a": tensor(offsets=["0", "16"])}, "data_offsets"),
    "three offsets": ({"a": tensor(offsets=[0, 8, 16])}, "data_offsets"),
    "negative offsets": ({"a": tensor(offsets=[-16, 0])}, "data_offsets"),
    "unknown dtype": ({"a": tensor("X9")}, "unknown dtype"),
    "dtype a list": ({"a": tensor(["F32"])}, "unknown dtype"),
    "negative shape": ({"a": tensor(shape=[-2, -2])}, "shape"),
    "true as a number": ({"a": tensor(shape=[True, 4])}, "shape"),
    "half a number": ({"a": tensor(shape=[4.0])}, "shape"),
    "empty and vast": ({"a": tensor(shape=[1 << 61, 0], offsets=[0, 0])}, "shape"),
    "shape against offsets": ({"a": tensor(shape=[3])}, "shape"),
    "overlap": ({"a": tensor(), "b": tensor(shape=[2], offsets=[8, 16])}, "begins at byte 8"),
    "gap": ({"a": tensor(shape=[1], offsets=[0, 4]), "b": tensor(shape=[2], offsets=[8, 16])}, "begins at byte 8"),
    "short": ({"a": tensor(shape=[8], offsets=[0, 32])}, "has 16"),
    "long": ({"a": tensor(shape=[2], offsets=[0, 8])}, "has 16"),
    "metadata a list": ({"__metadata__": [], "a": tensor()}, "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"n": 1}, "a": tensor()}, "__metadata__"),
    "NaN": ('{"a": NaN}', "no JSON"),
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_headers_are_refused_by_every_reader(kind, tmp_path):
    header, reason = BAD[kind]
    path = write_file(tmp_path / "model.safetensors", header)
    for read in (read_header, load_arrays, open_tensors, lambda one: places([one])):
        with pytest.raises(Damaged, match=reason) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 500


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "vast").write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    with (tmp_path / "large").open("wb") as file:
        file.write(struct.pack("<Q", LARGEST + 1))
        file.truncate(LARGEST + 100)
    for name in ("fifo", "folder", "empty", "vast", "large", "absent"):
        with pytest.raises(Damaged, match=name):
            read_header(tmp_path / name)


def test_a_key_twice_among_many_is_found_at_once(tmp_path):
    names = [f'"{number}": 1' for number in range(200_000)]
    path = write_file(tmp_path / "many", f"{{{', '.join([*names, names[-1]])}}}")
    with pytest.raises(Damaged, match="'199999' stands there twice"):
        read_header(path)


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.float16).reshape(2, 3), "a": np.zeros((0, 4), np.float32), "c": np.array(7, np.int64)}
    safetensors.numpy.save_file(tensors, path := tmp_path / "x.safetensors", {"format": "np"})
    top = read_header(path)
    assert top.metadata == {"format": "np"}
    assert {name: tuple(one["shape"]) for name, one in top.tensors.items()} == {name: array.shape for name, array in tensors.items()}
    read = load_arrays(path, "a", "b", "c")
    assert all(np.array_equal(read[name], array) for name, array in tensors.items())
    with pytest.raises(Damaged, match="no tensor 'd'"):
        load_arrays(path, "d")
    with pytest.raises(Damaged, match="BF16"):
        load_arrays(write_file(tmp_path / "bf", {"a": tensor("BF16", [8])}))


def test_metadata_in_any_order_are_the_same_bytes(tmp_path):
    """Eight names: the library would write the same order twice once in 40,320 runs."""
    facts = {f"n{number}": f"é{number}" for number in range(8)}
    written = set()
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        safetensors.numpy.save_file({"a": np.arange(4.0, dtype=np.float32)}, path, dict(reversed(facts.items())) if number else facts)
        sort_metadata(path)
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata() == facts
            assert (file.get_tensor("a") == np.arange(4)).all()
        written.add(path.read_bytes())
    assert len(written) == 1
