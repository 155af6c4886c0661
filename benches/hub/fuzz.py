"""Files that are almost adapters: does the gate let in anything that is none, fail otherwise than by refusing, or take long or much?

    python -m benches.hub.fuzz [--cases 100000]

Each case changes a whole file of the made-up recipe: bytes of its header, its JSON, its length, a piece of it, or a number to one that is
not finite. What is let in must load with safetensors and have exactly the names, shapes, dtypes and finite numbers of the recipe. One
JSON line: cases, let in (harmless changes: of a number, or of white space), wrong, crashes, the slowest in CPU seconds, and the bytes
that the process grew by.
"""

import json
import random
import resource
import struct
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from benches.common import parser, say
from elmwood.hub.client.gate import Refused, check_adapter

START = "base_model.model.model.layers.0.self_attn"
SHAPES = {f"{START}.{name}_proj.lora_{half}.weight": (4, 32) if half == "A" else (32, 4) for name in "qkv" for half in "AB"}
WORDS = (
    "[]",
    "{}",
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "NaN",
    '"F64"',
    '"F32"',
    '"\\u0000"',
    "[0,512]",
    "9" * 30,
    "[" * 2000,
    '{"a":1,"a":2}',
)


def adapter() -> bytes:
    rng = np.random.default_rng(0)
    return safetensors.numpy.save({name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}, {"format": "pt"})


def bend(whole: bytes, chance: random.Random) -> bytes:
    """A file with a change."""
    top = struct.unpack("<Q", whole[:8])[0] + 8
    content, kind = bytearray(whole), chance.randrange(7)
    if kind == 0:  # bytes of the header
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(top)] = chance.randrange(256)
    elif kind == 1:  # the length of the header
        content[:8] = struct.pack("<Q", chance.choice([0, 1, top - 9, top - 7, top, len(whole), 1 << 20, 1 << 40, 2**64 - 1]))
    elif kind == 2:  # cut, or longer
        return (
            bytes(content[: chance.randrange(len(content))]) if chance.random() < 0.5 else whole + chance.randbytes(chance.randint(1, 99))
        )
    elif kind == 3:  # a piece of the header put elsewhere in it, or twice
        a, b = sorted(chance.randrange(8, top) for _ in range(2))
        at = chance.randrange(8, top)
        return _headed(bytes(content[8:at] + content[a:b] + content[at:top]), whole[top:])
    elif kind == 4:  # a value of the JSON
        text = whole[8:top].decode()
        places = [n for n, letter in enumerate(text) if letter in ":,["]
        at = chance.choice(places) + 1
        end = min((n for n in (text.find(letter, at) for letter in ",]}") if n >= 0), default=len(text))
        return _headed((text[:at] + chance.choice(WORDS) + text[end:]).encode(), whole[top:])
    elif kind == 5:  # a number of the header, off by a little or much
        said = json.loads(whole[8:top])
        entry = said[chance.choice(list(SHAPES))]
        field, n = chance.choice([("shape", 0), ("shape", 1), ("data_offsets", 0), ("data_offsets", 1)])
        entry[field][n] += chance.choice([-1, 1, 4, -entry[field][n], 1 << 31, 1 << 63])
        return _headed(json.dumps(said).encode(), whole[top:])
    else:  # a value, often one that is not finite
        at = top + 4 * chance.randrange((len(whole) - top) // 4)
        content[at : at + 4] = struct.pack("<f", chance.choice([float("nan"), float("inf"), float("-inf"), 0.0, 1e38, chance.random()]))
    return bytes(content)


def _headed(raw: bytes, values: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw + values


class Found(NamedTuple):
    """What came of all cases."""

    cases: int
    let_in: int
    wrong: int  # let in, and not an adapter of the recipe
    crashes: int
    slowest_s: float  # of CPU time
    grown_bytes: int


def fuzz(cases: int, folder: Path, seed: int = 0) -> Found:
    whole, chance, path = adapter(), random.Random(seed), folder / "adapter"
    let_in = wrong = crashes = 0
    slowest, before = 0.0, _peak()
    for _ in range(cases):
        path.write_bytes(bend(whole, chance))
        began = time.process_time()
        try:
            check_adapter(path, SHAPES)
        except Refused:
            pass
        except Exception:
            crashes += 1
        else:
            let_in += 1
            wrong += not is_adapter(path)
        slowest = max(slowest, time.process_time() - began)
    return Found(cases, let_in, wrong, crashes, slowest, _peak() - before)


def is_adapter(path: Path) -> bool:
    """Whether another reader finds the tensors of the recipe in it, and nothing else."""
    held: dict[str, Any] = safetensors.numpy.load_file(path)
    same = {name: (one.shape, one.dtype) for name, one in held.items()} == {name: (shape, np.float32) for name, shape in SHAPES.items()}
    return same and all(np.isfinite(one).all() for one in held.values())


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", type=int, default=100_000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        say("hub fuzz", **fuzz(given.cases, Path(folder))._asdict())


if __name__ == "__main__":
    main()
