"""Merging against mergekit from PyPI: CPU seconds, wall clock, memory, and share of the disk's own speed.

    python -m benches.peers.merge FOLDER --mergekit VENV/bin/python [--shapes 300M,1B] [--experts 4,8] [--rules average,ties] [--parts 8]

Both sides read the same bf16 files, whose pages are dropped from the cache first. Both are whole commands, including imports, with one
thread for arithmetic. Loops that the first merge compiles (some CPU seconds) are compiled before. Inputs are random, made in FOLDER and
kept (300M: 0.6 GB for the seed and for each expert; 1B: 2.1 GB). The same run measures sequential reading and durable writing of the
disk. Results are compared with mergekit's in float32 arithmetic.

`share`: bytes of the experts over wall seconds, over the sequential read speed. `share_in_turn`: over the speed of reading pieces of each
file in turn, as a merge does. `disk`: the seconds that reading and durable writing alone would take, over wall seconds.
One JSON line for each setting. 300M, four experts: about ten minutes, most of them mergekit's TIES; everything: about three hours.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import NamedTuple

import numpy as np

from benches.common import integers, parser, say, words
from elmwood.records import Expert, Recipe, Seed
from elmwood.store import Store
from elmwood.weights.tensors import PIECE, decode, pack_header, places

SHAPES = {  # hidden size, feed-forward, layers, vocabulary: Llamas with plain heads and tied embeddings
    "tiny": (64, 160, 2, 512),
    "300M": (1024, 2816, 22, 32000),
    "1B": (2048, 5632, 18, 50000),
}
OURS = {"average": ["--method", "average"], "ties": ["--method", "ties", "--density", "0.5"]}
THEIRS = {
    "average": {"merge_method": "linear", "parameters": {"normalize": True, "weight": 1.0}},
    "ties": {"merge_method": "ties", "parameters": {"normalize": True, "weight": 1.0, "density": 0.5}},
}


# a small process starts the command and waits: a peak of memory is inherited from the process that starts one
LAUNCH = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, used = os.wait4(process.pid, 0)
open(sys.argv[1], "w").write(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Run(NamedTuple):
    """What one command took."""

    cpu: float
    wall: float
    rss: float  # MB at the peak, pages of mapped files included


# ---- inputs -----------------------------------------------------------------------------------------------------


def layout(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    width, feed_forward, layers, vocabulary = SHAPES[shape]
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocabulary, width))]
    for layer in range(layers):
        top = f"model.layers.{layer}"
        found += [(f"{top}.self_attn.{name}_proj.weight", (width, width)) for name in "qkvo"]
        found += [(f"{top}.mlp.{name}_proj.weight", (feed_forward, width)) for name in ("gate", "up")]
        found += [(f"{top}.mlp.down_proj.weight", (width, feed_forward))]
        found += [(f"{top}.{name}_layernorm.weight", (width,)) for name in ("input", "post_attention")]
    return [*found, ("model.norm.weight", (width,))]


def config(shape: str) -> bytes:
    width, feed_forward, layers, vocabulary = SHAPES[shape]
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": feed_forward,
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "vocab_size": vocabulary,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return json.dumps(settings, sort_keys=True).encode()


def write(path: Path, shape: str, rng_seed: int, base: Path | None = None) -> None:
    """A checkpoint of normal numbers, 0.02 wide; with `base`, that one and steps of 0.002 from it."""
    tensors = layout(shape)
    chance, source = np.random.default_rng(rng_seed), places([base]) if base else {}
    top = pack_header([(name, "BF16", size, 2 * int(np.prod(size))) for name, size in tensors], {"format": "pt"})
    with path.open("wb") as file:
        file.write(top)
        for name, size in tensors:
            numbers = int(np.prod(size))
            for first in range(0, numbers, 1 << 22):
                count = min(1 << 22, numbers - first)
                value_N = chance.standard_normal(count, np.float32) * np.float32(0.002 if base else 0.02)
                if base:
                    value_N += decode(np.fromfile(base, np.uint8, 2 * count, offset=source[name].start + 2 * first), "BF16")
                bits_N = value_N.view(np.uint32)
                ((bits_N + 0x7FFF + ((bits_N >> 16) & 1)) >> 16).astype("<u2").tofile(file)
        file.flush()
        os.fsync(file.fileno())


def prepare(folder: Path, shape: str, count: int) -> tuple[Store, Seed, list[Expert]]:
    """A store with a seed and so many experts; what is there is found again."""
    store, scratch = Store(folder / shape), folder / "scratch.safetensors"
    sizes = sum(int(np.prod(size)) for _, size in layout(shape))

    def made(number: int) -> dict[str, str]:
        key = f"bench/{shape}/{number}"
        kept = store.root / "made" / key
        if not kept.exists():
            base = None if number == 0 else store.get(made(0)["model.safetensors"])
            write(scratch, shape, number, base)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(store.put(scratch))
            scratch.unlink()
        return {"config.json": store.put(config(shape)), "model.safetensors": kept.read_text()}

    seed = Seed(
        name=shape, architecture="LlamaForCausalLM", parameters=sizes, vocabulary=SHAPES[shape][3], context=2048, separator=0, files=made(0)
    )
    store.add(seed)
    recipe = Recipe(method="full", steps=1)
    experts = [Expert(seed=seed.digest, data=(), recipe=recipe, files=made(number + 1)) for number in range(count)]
    for place, expert in enumerate(experts):
        store.name(f"expert/{place}", store.add(expert))
    return store, seed, experts


# ---- measured ---------------------------------------------------------------------------------------------------


def drop(paths: Sequence[Path]) -> None:
    """Let the system forget what it has read of these files."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_speed(paths: Sequence[Path]) -> float:
    """Bytes a second from files that are not in the cache, read one after another."""
    drop(paths)
    buffer, done, started = memoryview(bytearray(4 << 20)), 0, perf_counter()
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        while got := os.readv(handle, [buffer]):
            done += got
        os.close(handle)
    return done / (perf_counter() - started)


def pattern_speed(paths: Sequence[Path]) -> float:
    """The same, as a merge reads: a piece of each file in turn."""
    drop(paths)
    handles = [os.open(path, os.O_RDONLY) for path in paths]
    buffer, place, started = memoryview(bytearray(2 * PIECE)), 0, perf_counter()
    while any([os.preadv(handle, [buffer], place) for handle in handles]):  # noqa: C419  (each is read)
        place += len(buffer)
    seconds = perf_counter() - started
    for handle in handles:
        os.close(handle)
    return sum(path.stat().st_size for path in paths) / seconds


def write_speed(folder: Path, size: int) -> float:
    """Bytes a second to a file that is safe on the disk at the end."""
    path, piece = folder / "written", np.random.default_rng(0).bytes(4 << 20)
    started = perf_counter()
    with path.open("wb") as file:
        for _ in range(max(1, size // len(piece))):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    seconds = perf_counter() - started
    path.unlink()
    return max(1, size // len(piece)) * len(piece) / seconds


def measure(command: Sequence[str], log: Path) -> Run:
    """Run a command to its end. Raises CalledProcessError."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    usage = log.with_suffix(".usage")
    started = perf_counter()
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-S", "-c", LAUNCH, str(usage), *command], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    wall = perf_counter() - started
    if done.returncode:
        sys.stderr.write(log.read_text()[-2000:])
        raise subprocess.CalledProcessError(done.returncode, command)
    cpu, peak = json.loads(usage.read_text())
    return Run(cpu, wall, peak / 1024)


def ours(store: Store, experts: Sequence[Expert], rule: str, folder: Path, parts: int) -> tuple[Run, Path]:
    """`elmwood merge`; its result is moved away, so that the next run starts from scratch."""
    command = [
        sys.executable,
        "-m",
        "elmwood",
        "merge",
        *(one.digest for one in experts),
        *OURS[rule],
        "--store",
        str(store.root),
        "--json",
        *(["--parts", str(parts), "--workers", "2"] if parts else []),
    ]
    before = set(store.root.rglob("*"))
    run = measure(command, folder / "ours.log")
    weights = folder / "ours.safetensors"
    for path in sorted(set(store.root.rglob("*")) - before, key=lambda path: -len(path.parts)):
        if path.is_file() and not path.is_symlink() and path.stat().st_size > 1 << 16:
            path.rename(weights)
        elif not path.is_dir() or path.is_symlink():
            path.unlink()
    return run, weights


def theirs(python: Path, store: Store, seed: Seed, experts: Sequence[Expert], rule: str, folder: Path) -> tuple[Run, Path]:
    """`mergekit-yaml` of the environment of `python`."""
    recipe = {**THEIRS[rule], "dtype": "float32", "out_dtype": "bfloat16"}
    recipe["models"] = [{"model": str(store.folder(one.files).resolve())} for one in experts]
    if rule != "average":
        recipe["base_model"] = str(store.folder(seed.files).resolve())
    (folder / "mergekit.yaml").write_text(json.dumps(recipe))
    out = folder / "theirs"
    rmtree(out, ignore_errors=True)
    command = [str(python.parent / "mergekit-yaml"), str(folder / "mergekit.yaml"), str(out), "--quiet", "--no-copy-tokenizer"]
    run = measure(command, folder / "theirs.log")
    return run, next(out.glob("*.safetensors"))


def differing(mine: Path, its: Path) -> float:
    """The share of numbers that are not the same bits, over a tensor of each kind."""
    left, right = places([mine]), places([its])
    differ = total = 0
    for name in [name for name in left if ".layers." not in name or ".layers.1." in name]:
        a, b = (np.fromfile(one.path, "<u2", one.numbers, offset=one.start) for one in (left[name], right[name]))
        differ, total = differ + int((a != b).sum()), total + a.size
    return differ / total


def bench(asked: argparse.Namespace, shape: str, count: int, rule: str) -> dict[str, object]:
    store, seed, experts = prepare(asked.folder, shape, max(integers(asked.experts)))
    experts = experts[:count]
    inputs = [store.get(one.files["model.safetensors"]) for one in experts]
    size = inputs[0].stat().st_size
    reads, turns, writes = read_speed(inputs[:2]), pattern_speed(inputs), write_speed(asked.folder, size)
    found: dict[str, object] = {"shape": shape, "experts": count, "rule": rule, "parts": asked.parts, "bytes": size * count}
    used = [*inputs, *([store.get(seed.files["model.safetensors"])] if rule != "average" else [])]
    drop(used)
    mine, result = ours(store, experts, rule, asked.folder, asked.parts)
    found |= {"read_GB_s": reads / 1e9, "read_in_turn_GB_s": turns / 1e9, "write_GB_s": writes / 1e9}
    found |= {f"ours_{key}": value for key, value in mine._asdict().items()}
    ideal = len(used) * size / reads + size / writes
    found |= {"share": size * count / mine.wall / reads, "share_in_turn": size * count / mine.wall / turns, "disk": ideal / mine.wall}
    if asked.mergekit:
        drop(used)
        other, its = theirs(asked.mergekit, store, seed, experts, rule, asked.folder)
        found |= {f"mergekit_{key}": value for key, value in other._asdict().items()}
        found |= {"cpu_ratio": other.cpu / mine.cpu, "wall_ratio": other.wall / mine.wall, "differing": differing(result, its)}
        rmtree(its.parent)
    result.unlink()
    return found


def sizes(doc: str | None) -> argparse.ArgumentParser:
    """The arguments of a bench against mergekit: where, against what, of which sizes."""
    options = parser(doc)
    options.add_argument("folder", type=Path)
    options.add_argument("--mergekit", type=Path, help="python of an environment with mergekit")
    options.add_argument("--shapes", default="300M,1B")
    options.add_argument("--experts", default="4,8")
    return options


def main() -> None:
    options = sizes(__doc__)
    options.add_argument("--rules", default="average,ties")
    options.add_argument("--parts", type=int, default=0, help="of ours: so many tasks, two at a time; the peak is of the largest process")
    asked = options.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for rule in words(asked.rules):  # loops are compiled once for all merges to come
        store, _, experts = prepare(asked.folder, "tiny", 2)
        ours(store, experts, rule, asked.folder, 0)[1].unlink()
    for shape in words(asked.shapes):
        for count in integers(asked.experts):
            for rule in words(asked.rules):
                say("merge", **bench(asked, shape, count, rule))


if __name__ == "__main__":
    main()
