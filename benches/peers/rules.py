"""Merge rules against mergekit's in-memory interface, and against the promise that order does not matter.

    python -m benches.peers.rules oracle FOLDER --mergekit ENV/bin/python   # a minute
    python -m benches.peers.rules trees FOLDER                              # 100 random trees for each rule; some minutes

oracle: the largest difference in float64, and the share of bf16 values that are not the nearest to mergekit's float64 result, for ours and
for mergekit's own bf16 output with its default arithmetic and with float32. trees: states are added in random trees and orders; the line
counts distinct digests. Then an expert is added and removed again.
"""

import json
import random
import subprocess
from pathlib import Path
from shutil import rmtree

import numpy as np
from safetensors.numpy import load_file, save_file

from benches.common import parser, say
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.rules.table import RULES
from elmwood.merge.states import add, remove, state
from elmwood.records import Expert, Recipe, Seed, Statistics
from elmwood.store import Store
from elmwood.weights.tensors import decode, encode

SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.embed_tokens.weight": (320, 64),
}
WEIGHTS = [
    1.0,
    0.5,
    2.0,
    0.75,
]  # binary fractions: with others a number may fall nearer to the middle of two bf16 numbers than float64 can say
# rule -> mergekit's method, its parameters, experts, whether the seed is given as base
PEERS = {
    "average": ("linear", {"normalize": True}, 4, False),
    "task_arithmetic": ("task_arithmetic", {"normalize": False}, 4, True),
    "ties": ("ties", {"density": 0.3, "normalize": True}, 4, True),
    "breadcrumbs": ("breadcrumbs", {"density": 0.6, "gamma": 0.1, "normalize": False}, 4, True),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.1, "normalize": True}, 4, True),
    "sce": ("sce", {"select_topk": 1.0}, 4, True),
    "sce_select": ("sce", {"select_topk": 0.25}, 4, True),
    "model_stock": ("model_stock", {}, 4, True),
    "slerp": ("slerp", {"t": 0.3}, 2, None),
    "nuslerp": ("nuslerp", {}, 2, True),
    "multislerp": ("multislerp", {"eps": 1e-30}, 4, True),
    "karcher": ("karcher", {"max_iter": 10, "tol": 1e-5}, 4, False),
}
OURS = {
    "ties": {"density": 0.3}, "breadcrumbs": {"density": 0.6, "gamma": 0.1}, "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
    "sce_select": {"density": 0.25},
}  # fmt: skip
EQUAL = ("karcher", "model_stock", "sce", "sce_select")  # weights are not theirs to give
PEER = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from mergekit.merge_methods.api import merge_tensors
folder, asked = sys.argv[1], json.loads(sys.argv[2])
tensors, halves = ([load_file(f"{folder}/{n}.{kind}.safetensors") for n in range(5)] for kind in ("F64", "BF16"))
failed = {}
for rule, (method, parameters, count, base, weights) in asked.items():
    ways = {"f64": (torch.float64, None), "f64 of bf16": (torch.float64, None), "default": (torch.bfloat16, None),
            "f32": (torch.float32, torch.bfloat16)}
    for way, (dtype, out) in ways.items():
        made = {}
        for name in tensors[0]:
            inputs = [one[name] for one in (tensors if way == "f64" else halves)[0 if base else 1 : count + 1]]
            inputs = [value if way.startswith("f64") else value.bfloat16() for value in inputs]
            given = dict(parameters)
            if weights:
                given["weight"] = weights[:count]
            try:
                made[name] = merge_tensors(inputs, method, parameters=given, base_index=0 if base or base is None else None,
                                           name=name, dtype=dtype, out_dtype=out).contiguous()
            except Exception as error:
                failed[f"{rule} {way} {name}"] = repr(error)[:200]
        save_file({k: v.float() if v.dtype == torch.bfloat16 else v for k, v in made.items()}, f"{folder}/{rule}.{way}.safetensors")
print(json.dumps(failed))
"""


def prepare(folder: Path, dtype: str) -> tuple[Store, Seed, list[Expert]]:
    """A seed and four experts; in bf16 the same numbers, rounded."""
    store, rng = Store(folder / dtype), np.random.default_rng(0)
    base = {name: 0.05 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    made = [base] + [{name: value + 0.01 * rng.standard_normal(value.shape) for name, value in base.items()} for _ in range(4)]

    def put(number: int, tensors: dict[str, np.ndarray]) -> dict[str, str]:
        if dtype == "BF16":
            tensors = {
                name: decode(encode(value.ravel(), dtype), dtype).astype(np.float64).reshape(value.shape) for name, value in tensors.items()
            }
        save_file(tensors, folder / f"{number}.{dtype}.safetensors")
        path = folder / "model.safetensors"
        if dtype == "F64":
            save_file(tensors, path, {"format": "pt"})
        else:
            _save_bf16(tensors, path)
        return {"config.json": store.put(b"{}"), "model.safetensors": store.put(path)}

    files = [put(number, tensors) for number, tensors in enumerate(made)]
    seed = Seed(name="s", architecture="A", parameters=1, vocabulary=1, context=1, separator=0, files=files[0])
    store.add(seed)
    experts = [Expert(seed=seed.digest, data=(), recipe=Recipe(steps=1), files=one) for one in files[1:]]
    for number, expert in enumerate(experts):
        store.add(expert)
        left = {f"fisher|{name}": rng.exponential(1e-4, shape).astype(np.float32) for name, shape in SHAPES.items()}
        x_TI = rng.standard_normal((200, 64))
        save_file(
            left | {"gram|model.layers.0.mlp.up_proj.weight": (x_TI.T @ x_TI / 200).astype(np.float32)},
            path := folder / "statistics.safetensors",
        )
        store.add(Statistics(expert=expert.digest, rows=number + 1, tokens=1, fisher=1e-4, files={path.name: store.put(path)}))
    return store, seed, experts


def _save_bf16(tensors: dict[str, np.ndarray], path: Path) -> None:
    from elmwood.weights.tensors import pack_header

    entries = [(name, "BF16", value.shape, 2 * value.size) for name, value in tensors.items()]
    path.write_bytes(
        pack_header(entries, {"format": "pt"}) + b"".join(encode(value.ravel(), "BF16").tobytes() for value in tensors.values())
    )


def ours(folder: Path, dtype: str, rule: str, count: int) -> dict[str, np.ndarray]:
    store, seed, experts = prepare(folder, dtype)
    weights = [0.7, 0.3] if rule == "slerp" else [1.0] * 4 if rule in EQUAL else WEIGHTS
    members = {one.digest: everywhere(weight) for one, weight in zip(experts[:count], weights, strict=False)}
    if rule in ("slerp", "nuslerp") and experts[0].digest > experts[1].digest:  # experts are ordered by digest: the arc is the same
        members = dict(reversed(members.items()))
    (made,) = merge(seed, members, [Answer(rule, OURS.get(rule, {}))], store)
    raw = store.get(made.files["model.safetensors"])
    if dtype == "F64":
        return load_file(raw)
    from elmwood.weights.tensors import Files, places

    files = Files()
    return {name: decode(files.read(place, 0, place.numbers), "BF16").reshape(place.shape) for name, place in places([raw]).items()}


def oracle(folder: Path, python: Path) -> None:
    for dtype in ("F64", "BF16"):
        prepare(folder, dtype)
    asked = {rule: (*peer, None if rule in EQUAL or rule == "slerp" else WEIGHTS) for rule, peer in PEERS.items()}
    done = subprocess.run([str(python), "-c", PEER, str(folder), json.dumps(asked)], capture_output=True, text=True, check=True)
    failed = json.loads(done.stdout.splitlines()[-1])
    for rule, (method, _, count, _) in PEERS.items():
        exact, half = ours(folder, "F64", rule, count), ours(folder, "BF16", rule, count)
        ways = ("f64", "f64 of bf16", "default", "f32")
        theirs, rounded, default, single = (load_file(folder / f"{rule}.{way}.safetensors") for way in ways)
        far = {name: float(np.abs(exact[name] - value).max()) for name, value in theirs.items()}
        nearest = {name: decode(encode(value.ravel(), "BF16"), "BF16").reshape(value.shape) for name, value in rounded.items()}

        def wrong(found: dict[str, np.ndarray], nearest: dict[str, np.ndarray] = nearest) -> float:
            return round(float(np.mean(np.concatenate([(found[name] != value).ravel() for name, value in nearest.items()]))), 6)

        line = {"rule": rule, "mergekit": method, "difference": max(far.values(), default=None)}
        line |= {"not_nearest": wrong(half), "mergekit_default": wrong(default), "mergekit_float32": wrong(single)} if theirs else {}
        line |= {"failed": {key: value for key, value in failed.items() if key.startswith(f"{rule} ")}}
        say("rules", **line)


def trees(folder: Path, count: int) -> None:
    for rule in sorted(RULES):
        store, seed, experts = prepare(folder, "F64")
        experts = experts[:2] if "slerp" in rule and rule != "multislerp" else experts
        alone = [state(seed, {one.digest: everywhere(weight)}, rule, {}, store) for one, weight in zip(experts, WEIGHTS, strict=False)]
        chance, digests = random.Random(0), set()
        for _ in range(count):
            heap = list(alone)
            while len(heap) > 1:
                chance.shuffle(heap)
                heap.append(add(heap.pop(), heap.pop(), store))
            digests.add(heap[0].digest)
        restored = remove(heap[0], alone[0].contributions[0].expert, store)
        rest = alone[1]
        for one in alone[2:]:
            rest = add(rest, one, store)
        same = restored.digest == rest.digest
        say("trees", rule=rule, sums=RULES[rule].sums, trees=count, digests=len(digests), restored=same)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=["oracle", "trees"])
    options.add_argument("folder", type=Path)
    options.add_argument("--mergekit", type=Path, help="python of an environment with mergekit")
    options.add_argument("--trees", type=int, default=100)
    asked = options.parse_args()
    rmtree(asked.folder, ignore_errors=True)
    asked.folder.mkdir(parents=True)
    if asked.what == "oracle":
        oracle(asked.folder, asked.mergekit)
    else:
        trees(asked.folder, asked.trees)


if __name__ == "__main__":
    main()
