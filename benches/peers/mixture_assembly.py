"""A mixture assembled from full experts, against mergekit-moe from PyPI: CPU seconds, wall clock, peak memory.

    python -m benches.peers.mixture_assembly FOLDER --mergekit VENV/bin/python [--shapes 300M,1B] [--experts 4,8] [--shared seed,average]

Llamas become Mixtrals. Both sides read the same bf16 files, whose pages are dropped from the cache first, are whole commands
with their imports, draw random gates, and have one thread for arithmetic. mergekit-moe takes what the experts share from a base
model and never averages it, so its peer is `seed`; `average` beside it does more work. Inputs are random, made in FOLDER and
kept until `--clean` (300M: 0.6 GB for the seed and for each expert; 1B: 2.1 GB); results are deleted as soon as they are
compared (eight experts of the 1B shape: 11 GB on each side).

`peak_MB`: of the process. `beyond_layer_MB`: what remains of it without one layer's experts, which the claim allows besides 300 MB.
`trial_cpu`, `trial_peak_MB`: the first assembly of an architecture tries itself on a small mixture of copies, with torch; that is
remembered, so it is paid once for all sizes, and shown by itself. One JSON line for each; 300M: about three minutes, everything
about twenty.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import rmtree

import numpy as np

from benches.common import integers, say, words
from benches.peers.merge import SHAPES, Run, drop, measure, prepare, sizes
from elmwood.merge.moe.build import Mixing, mix
from elmwood.merge.moe.gates import random_rows
from elmwood.merge.states import seed_places
from elmwood.records import Expert, Forest, Mixture, Seed
from elmwood.store import Store
from elmwood.weights.tensors import places


def assemble(root: Path, forest: str, shared: str) -> None:
    """What is measured on our side; run in a process of its own."""
    store = Store(root)
    record = store.load(forest, Forest)
    rows = random_rows(seed_places(store.load(record.seed, Seed), store), record.experts, 0, 1.0)
    made = mix(record, rows, Mixing(method=shared), store)
    sys.stdout.write(f"{made.digest}\n")


def ours(store: Store, seed: Seed, experts: Sequence[Expert], shared: str, folder: Path) -> tuple[Run, Mixture]:
    forest = Forest(seed=seed.digest, partition="0" * 64, experts=tuple(one.digest for one in experts))
    command = [sys.executable, "-m", __spec__.name, str(store.root), "--assemble", store.add(forest), "--shared", shared]
    run = measure(command, folder / "ours.log")
    return run, store.load((folder / "ours.log").read_text().split()[-1], Mixture)


def forget(store: Store, made: Mixture) -> None:
    """Delete a result, so that the next run starts from scratch."""
    for digest in set(made.files.values()):
        if store.has(digest) and store.path(digest).stat().st_size > 1 << 16:
            store.path(digest).unlink()
    store.path(made.digest).unlink()
    for kept in ("views", "refs/done"):
        rmtree(store.root / kept, ignore_errors=True)


def theirs(python: Path, store: Store, seed: Seed, experts: Sequence[Expert], folder: Path) -> tuple[Run, Path]:
    """`mergekit-moe` of the environment of `python`."""
    from elmwood.corpus.tokens import train_tokenizer  # takes as long to import as all that is measured

    base = folder / "base"  # it wants a tokenizer, also where it copies none
    rmtree(base, ignore_errors=True)
    base.mkdir()
    for name, digest in seed.files.items():
        (base / name).symlink_to(store.get(digest).resolve())
    train_tokenizer(["the cat sat on the mat"], 300).save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    members = [{"source_model": str(store.folder(one.files).resolve()), "positive_prompts": [str(e)]} for e, one in enumerate(experts)]
    recipe = {
        "base_model": str(base), "gate_mode": "random", "dtype": "bfloat16", "experts_per_token": 2,
        "experts": members, "architecture": "mixtral",
    }  # fmt: skip
    (folder / "mergekit.yaml").write_text(json.dumps(recipe))
    out = folder / "theirs"
    rmtree(out, ignore_errors=True)
    command = [str(python.parent / "mergekit-moe"), str(folder / "mergekit.yaml"), str(out), "--quiet", "--no-copy-tokenizer"]
    return measure(command, folder / "theirs.log"), out


def differing(mine: Path, its: Path, count: int) -> float:
    """The share of numbers of layer 1's experts that are not the same bits; mergekit writes them in one tensor."""
    left, right = places(sorted(mine.glob("*.safetensors"))), places(sorted(its.glob("*.safetensors")))
    differ = total = 0
    for e in range(count):
        for part, name in (("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj")):
            one = left[f"model.layers.1.block_sparse_moe.experts.{e}.{part}.weight"]
            apart = right.get(f"model.layers.1.block_sparse_moe.experts.{e}.{part}.weight")
            other = apart or right[f"model.layers.1.mlp.experts.{name}"]
            first = 0 if apart else 2 * one.numbers * e + one.numbers * (part == "w3") if name == "gate_up_proj" else one.numbers * e
            a_N = np.fromfile(one.path, "<u2", one.numbers, offset=one.start)
            b_N = np.fromfile(other.path, "<u2", one.numbers, offset=other.start + 2 * first)
            differ, total = differ + int((a_N != b_N).sum()), total + one.numbers
    return differ / total


def bench(asked: argparse.Namespace, shape: str, count: int, trial: Mapping[str, float]) -> None:
    store, seed, experts = prepare(asked.folder, shape, max(integers(asked.experts)))
    # a mixture orders its experts by digest
    experts = sorted(experts[:count], key=lambda one: one.digest)
    inputs = [store.get(one.files["model.safetensors"]) for one in (seed, *experts)]
    layer = count * 3 * SHAPES[shape][0] * SHAPES[shape][1] * 2 / 1e6
    other, its = None, None
    if asked.mergekit:
        drop(inputs)
        other, its = theirs(asked.mergekit, store, seed, experts, asked.folder)
    for shared in words(asked.shared):
        drop(inputs)
        run, made = ours(store, seed, experts, shared, asked.folder)
        found = {"shape": shape, "experts": count, "shared": shared, **trial}
        found |= {"bytes_out": sum(store.get(digest).stat().st_size for digest in set(made.files.values()))}
        found |= {"cpu": run.cpu, "wall": run.wall, "peak_MB": run.rss, "layer_MB": layer, "beyond_layer_MB": run.rss - layer}
        if other and its:
            found |= {"mergekit_cpu": other.cpu, "mergekit_wall": other.wall, "mergekit_peak_MB": other.rss}
            found |= {"cpu_ratio": other.cpu / run.cpu, "wall_ratio": other.wall / run.wall}
            found |= {"differing": differing(store.folder(made.files), its, count)}
        say("mixture assembly", **found)
        forget(store, made)
    if its:
        rmtree(its)


def main() -> None:
    options = sizes(__doc__)
    options.add_argument("--shared", default="seed,average")
    options.add_argument("--clean", action="store_true", help="delete the inputs of a shape when it is done")
    options.add_argument("--assemble", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.assemble:
        assemble(asked.folder, asked.assemble, asked.shared)
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    for shape in words(asked.shapes):
        store, seed, experts = prepare(asked.folder, shape, 2)
        first, made = ours(store, seed, experts, "seed", asked.folder)  # tries itself, if it never has
        forget(store, made)
        again, made = ours(store, seed, experts, "seed", asked.folder)
        forget(store, made)
        for count in integers(asked.experts):
            bench(asked, shape, count, {"trial_cpu": max(0.0, first.cpu - again.cpu), "trial_peak_MB": first.rss})
        if asked.clean:
            rmtree(asked.folder / shape)


if __name__ == "__main__":
    main()
