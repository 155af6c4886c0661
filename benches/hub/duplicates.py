"""Is a new expert a copy or a blend of one of many? The time that the answer takes with a sketch as prefilter, and whether it is right.

    python -m benches.hub.duplicates STORE [--experts 10000] [--rank 16]

Adapters of the demo's packaged seed, with random factors: `--real` of them are files in STORE, the others are known by their sketches
alone, as a verifier keeps them. Candidates: a stranger, a copy in another basis, the mean of two, the mean of five. One JSON line each:
seconds (and CPU seconds) of the whole comparison, cosine and novelty, and how many were compared exactly. Exactly all: `exact_seconds`
is the time of comparing with `--real` files without a sketch, times experts / real.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from benches.common import parser, say
from benches.hub import forgeries as forge
from elmwood.evaluate.admission import cosine, novelty
from elmwood.hub.client.gate import CONFIG, WEIGHTS, adapter_config, expected_tensors
from elmwood.records import Expert, Recipe, Seed
from elmwood.store import Store
from elmwood.study.demo_seed import PACKAGED, packaged_seed
from elmwood.study.quality.admission import compare_deltas
from elmwood.weights.experts import seed_places
from elmwood.weights.similarity import products
from elmwood.weights.sketch import kept_sketches, row_type, sketch_size


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store", type=Path)
    options.add_argument("--experts", type=int, default=10_000)
    options.add_argument("--real", type=int, default=50)
    options.add_argument("--rank", type=int, default=16)
    given = options.parse_args()
    store, seed = Store(given.store), packaged_seed()
    for name in seed.files:
        store.put(PACKAGED.joinpath(name).read_bytes())
    store.add(seed)
    recipe = Recipe(method="lora", steps=1, rank=given.rank)
    shapes = expected_tensors(seed, recipe, store)
    config = store.put(adapter_config(recipe, seed, shapes))
    rng = np.random.default_rng(0)

    def keep(tensors: forge.Tensors, **fields: Any) -> Expert:
        files = {CONFIG: config, WEIGHTS: store.put(safetensors.numpy.save(tensors, {"format": "pt"}))}
        expert = Expert(seed=seed.digest, data=(), recipe=recipe, files=files, **fields)
        store.add(expert)
        return expert

    own = [{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(given.real)]
    real = [keep(tensors) for tensors in own]
    known = [real[n % given.real].model_copy(update={"contributor": str(n)}) for n in range(given.experts - given.real)]
    fill_sketches(known, seed, store, rng)
    others = [*known, *real]
    candidates = {
        "a stranger": {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
        "a copy in another basis": forge.turned(own[3], rng), "the mean of two": wide([own[1], own[2]]),
        "the mean of five": wide(own[5:10]),
    }  # fmt: skip
    began = time.process_time()
    products([real[0], *real], seed, store)
    exact = (time.process_time() - began) * given.experts / given.real
    for what, tensors in candidates.items():
        rank = len(next(value for name, value in tensors.items() if "lora_A" in name))
        larger = recipe.model_copy(update={"rank": rank})
        files = {
            CONFIG: store.put(adapter_config(larger, seed, shapes)),
            WEIGHTS: store.put(safetensors.numpy.save(tensors, {"format": "pt"})),
        }
        one = real[0].model_copy(update={"files": files, "recipe": larger})
        store.add(one)
        wall, cpu = time.perf_counter(), time.process_time()
        length2, with_E, gram_EE = compare_deltas(one, others, seed, store)
        found = cosine(length2, with_E, gram_EE), novelty(length2, with_E, gram_EE)
        say(
            "hub duplicates", candidate=what, experts=len(others), compared=len(with_E), cosine=found[0], novelty=found[1],
            seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu, exact_seconds=exact,
        )  # fmt: skip


def wide(several: list[forge.Tensors]) -> forge.Tensors:
    """The mean of deltas exactly, with the ranks of all. Rank-stabilised scales shrink with the rank; a blend's length does not matter."""
    made = {}
    for a, b in forge.pairs(several[0]):
        made[a] = np.concatenate([one[a] for one in several])
        made[b] = np.ascontiguousarray(np.concatenate([one[b] for one in several], 1))
    return made


def fill_sketches(experts: list[Expert], seed: Seed, store: Store, rng: np.random.Generator) -> None:
    """Keep sketches of experts that have none of their own: random ones, as those of unrelated adapters are to each other."""
    size = sketch_size(seed_places(seed, store))
    rows = np.zeros(len(experts), row_type(size))
    for place, expert in enumerate(experts):
        rows["digest"][place] = np.void(bytes.fromhex(expert.digest))
    rows["sketch"] = rng.standard_normal((len(experts), size)).astype(np.float32)
    path = store.root / "sketches" / f"{seed.digest[:16]}-{size}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rows.tobytes())
    assert len(kept_sketches(experts, seed, seed_places(seed, store), size, store)) == len(experts)


if __name__ == "__main__":
    main()
