"""The files of a checkpoint, looked at before a library opens them. Free of torch."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from elmwood.errors import BadSeed, copied_to
from elmwood.records.plain_json import parse_json
from elmwood.store.headers import read_header

INDEX = 64 << 20  # bytes of an index of shards
# constants that older versions of transformers stored with the parameters, by the end of their names
BUFFERS = ("inv_freq", "masked_bias", "position_ids", "cos_cached", "sin_cached", "causal_mask", "attn_mask")
MASKS = ("attn.bias", "attention.bias")  # causal masks, of at least three dimensions
# heads for other tasks than the next token, by the first part of their names
HEADS = ("v_head", "value_head", "critic_head", "reward_head", "score", "classifier", "qa_outputs", "pooler")


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers takes a model's weights from, and their index. Raises BadSeed."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        if found := sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith(("adapter_", "consolidated"))):
            raise BadSeed(
                f"{folder} has {found[0]!r}, and neither model.safetensors nor model.safetensors.index.json: "
                "add the index, or rename a single file to model.safetensors"
            )
        raise BadSeed(
            f"{folder} has no *.safetensors, and pickled weights (*.bin) are never opened: "
            "convert them, or name a hub revision that holds converted ones (id@refs/pr/N)"
        )
    try:
        names = set(parse_json(index.read_bytes(), INDEX)["weight_map"].values())
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError("its weight_map names no files of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadSeed(f"{index} is damaged ({said(error)}): copy it again") from error
    if absent := sorted(name for name in names if not (folder / name).is_file()):
        raise BadSeed(f"{folder}: {len(absent)} of {len(names)} weight files are missing, first {absent[0]!r}: copy the checkpoint again")
    return [*(folder / name for name in sorted(names)), index]


def stored_tensors(paths: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of these files, from their headers. Raises BadSeed for a name that stands in two of them, Damaged."""
    found: dict[str, Stored] = {}
    for path in paths:
        for name, entry in read_header(path).tensors.items():
            if name in found:
                raise BadSeed(f"{path.parent}: {said(name)} stands in two files, also in {path.name!r}: copy the checkpoint again")
            found[name] = Stored(entry["dtype"], tuple(entry["shape"]))
    return found


def harmless(name: str, stored: Stored | None) -> bool:
    """Whether a tensor that a model has no place for changes nothing: a constant, or the head of another task."""
    mask = name.endswith(MASKS) and stored is not None and len(stored.shape) > 2
    return mask or name.rpartition(".")[2] in BUFFERS or name.partition(".")[0] in HEADS


@contextmanager
def linked(paths: Iterable[Path]) -> Iterator[Path]:
    """A folder with links to these files and nothing else. Errors name the folder that the files are in."""
    files = list(paths)
    with tempfile.TemporaryDirectory() as scratch, copied_to(scratch, files[0].parent if files else "the checkpoint"):
        for path in files:
            os.symlink(path.resolve(), Path(scratch) / path.name)
        yield Path(scratch)


def read_json(path: Path) -> dict[str, Any]:
    """Raises BadSeed."""
    try:
        value = parse_json(path.read_bytes(), infinity=True)
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
        return value
    except (OSError, ValueError) as error:
        raise BadSeed(f"{path} cannot be read ({said(error)}): copy the checkpoint again") from error


def said(error: object) -> str:
    """The first line of what a library or a stranger's file says, safe to print."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
    return "".join(letter if letter.isprintable() else "�" for letter in line)
