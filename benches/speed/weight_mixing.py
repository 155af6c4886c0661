"""What mixing the weights of adapters for each prompt costs and gains, beside the ensemble of outputs, a static merge, and the seed.

    python -m benches.speed.weight_mixing STORE FOREST [--top-k 2] [--temperature 0.1] [--scale 0.5] [--documents 60] [--rounds 5]

Make STORE and a FOREST of LoRA experts with benches/forest.py (lab/lora-forest). One JSON line for each way: bits per byte on the test
half at these settings (benches/quality/merge_quality.py chooses them), forward passes of the base for a prompt and 32 new tokens (experts
of one base are rows of one pass), tokens per second of the prompt and of new tokens, medians of interleaved rounds, and ratios to the
seed in the same round. Seconds need a quiet machine; `cpu of seed` can be compared on a busy one.
"""

from argparse import Namespace
from functools import partial
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch

from benches.common import Lines, open_forest, parser, say
from elmwood.ensemble.mixture import open_model
from elmwood.evaluate.columns import column
from elmwood.evaluate.holdout import open_holdout
from elmwood.evaluate.losses import bits_per_byte
from elmwood.evaluate.partial import score
from elmwood.lm.interface import LM
from elmwood.merge.adapters import merge_adapters
from elmwood.merge.layer_weights import everywhere
from elmwood.records import Ensemble, Forest, Record, Seed
from elmwood.store import Store

PROMPT, NEW = 128, 32  # tokens


class Spent(NamedTuple):
    """Seconds, and forward passes of a base."""

    prompt: float
    new: float
    cpu: float
    passes: int


def ways(forest: Forest, seed: Seed, asked: Namespace, store: Store) -> dict[str, Record]:
    settings: dict[str, Any] = {"forest": forest.digest, "top_k": asked.top_k, "temperature": asked.temperature}
    members = {digest: everywhere(1.0) for digest in forest.experts}
    static, small = merge_adapters(seed, members, [("concat", {"scale": asked.scale}), ("svd", {"scale": asked.scale, "rank": 16})], store)
    made: dict[str, Record] = {
        "seed": seed,
        f"outputs, top-{asked.top_k}": Ensemble(**settings),
        f"weights for each prompt, top-{asked.top_k}": Ensemble(**settings, mixing="weights"),
        "weights for each prompt, all": Ensemble(**{**settings, "top_k": len(forest.experts)}, mixing="weights"),
        "static merge, concat": static,
        "static merge, svd of rank 16": small,
    }
    for one in made.values():
        store.add(one)
    return made


def spent(lm: LM, tokens: list[int]) -> Spent:
    """Read a prompt, then a token at a time."""
    bodies = [body.model for body in lm.experts._bodies.values()]  # type: ignore[attr-defined]
    passes = 0

    def counted(*_: object) -> None:
        nonlocal passes
        passes += 1

    hooks = [model.register_forward_pre_hook(counted) for model in bodies]
    cpu, started = process_time(), perf_counter()
    _, text = lm.extend(tokens[:PROMPT], lm.start())
    read = perf_counter()
    for token in tokens[PROMPT : PROMPT + NEW]:
        _, text = lm.extend([token], text)
    done = perf_counter()
    for hook in hooks:
        hook.remove()
    return Spent(read - started, done - read, process_time() - cpu, passes)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store")
    options.add_argument("forest")
    options.add_argument("--top-k", type=int, default=2)
    options.add_argument("--temperature", type=float, default=0.1)
    options.add_argument("--scale", type=float, default=0.5)
    options.add_argument("--documents", type=int, default=60)
    options.add_argument("--rounds", type=int, default=5)
    asked = options.parse_args()
    store = Store(asked.store)
    opened = open_forest(store, asked.forest)
    forest, seed = opened.forest, opened.seed
    made = ways(forest, seed, asked, store)
    progress = Lines()
    held = open_holdout(opened.holdout(asked.documents), store)
    scores = {one.digest: score(one, partial(open_model, one, store), held, store, progress) for one in made.values()}
    long = max(range(len(held.windows.length_W)), key=lambda w: held.windows.length_W[w])
    tokens = held.windows.rows_WL[long, : PROMPT + NEW].tolist()
    torch.set_num_threads(1)
    lms = {name: open_model(one, store) for name, one in made.items()}
    rounds = [{name: spent(lm, tokens) for name, lm in lms.items()} for _ in range(asked.rounds + 1)][1:]
    for name, one in made.items():
        mine, seeds = [each[name] for each in rounds], [each["seed"] for each in rounds]
        loss = bits_per_byte(column(scores[one.digest], held, store), held, ~held.tune_D)
        line: dict[str, object] = {"bits_per_byte": loss.value, "error": loss.standard_error, "passes": mine[0].passes}
        for field, count in (("prompt", PROMPT), ("new", NEW)):
            line[f"{field}_tokens_per_second"] = round(count / median(getattr(each, field) for each in mine), 1)
            line[f"{field} of seed"] = round(median(getattr(a, field) / getattr(b, field) for a, b in zip(mine, seeds, strict=True)), 3)
        line["cpu of seed"] = round(median(a.cpu / b.cpu for a, b in zip(mine, seeds, strict=True)), 3)
        say("weight_mixing", forest=asked.forest, way=name, **line)


if __name__ == "__main__":
    main()
