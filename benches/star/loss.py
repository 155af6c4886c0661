"""A star against one machine and against data-parallel training, at equal tokens.

    python -m benches.star.loss [TEXT ...] [--machines 4] [--versions 10] [--steps 20] [--warm 200] [--runs ddp,alone,int8,int4,top,apart]
        [--seeds 0,1,2] [--width 64] [--learning-rate 3e-3]

`ddp` is one machine with batches as large as those of all machines together, which is what data-parallel training computes, for as many
steps as a machine of the star takes; `alone` is one machine of the star without the others (a quarter of the tokens, of four). All start
from the same weights: those of one machine after `--warm` steps.

One line for each point of a curve (`star.curve`): `tokens` of all machines together since the warm start, `loss` on held-out rows in nats
a token, bytes that one machine has `sent` and `received`; data-parallel training sends and receives about twice its gradients at each
step (a ring). One line for each run (`star.loss`): `gap` is relative to `ddp`, where that is one of the runs. At the end the mean `gap`
over the seeds, with its standard error.
"""

import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import integers, parser, say, words
from benches.star.simulation import Each, held_out, make_star, open_place, run_alone, run_star, warm_start
from elmwood.lm.load import load_model
from elmwood.records import Recipe

RUNS: dict[str, dict[str, Any]] = {
    "int8": {"form": "int8"},
    "int4": {"form": "int4"},
    "top": {"form": "top"},
    "apart": {"form": "int8", "apart": True},
    "plain": {"form": "int8", "rate": 1.0, "momentum": 0.0},
    "top plain": {"form": "top", "rate": 1.0, "momentum": 0.0},
    "momentum 0.8": {"form": "int8", "momentum": 0.8},
    "top 0.8": {"form": "top", "momentum": 0.8},
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("sources", nargs="*", default=["sample"])
    options.add_argument("--runs", type=words, default=["ddp", "alone", "int8", "int4", "top", "apart"])
    options.add_argument("--seeds", type=integers, default=[0, 1, 2])
    defaults = {"machines": 4, "versions": 10, "steps": 20, "warm": 200, "width": 64, "batch": 8, "length": 64}
    for name, default in defaults.items():
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--learning-rate", type=float, default=3e-3, help="of the inner steps after the warm start")
    given = options.parse_args()
    gaps: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        place = open_place(root / "store", given.sources, given.width, 1024, given.length)
        model, size = load_model(place.seed, place.store, device="cpu"), place.seed.parameters
        row = given.batch * given.length
        for rng_seed in given.seeds:

            def curve(method: str, machines: int, number: int, weights: Path, sent: int, received: int, rng_seed: int = rng_seed) -> float:
                loss = held_out(place, model, weights, given.length)
                say(
                    "star.curve", method=method, workers=machines, rng_seed=rng_seed, parameters=size, warm=given.warm * row,
                    tokens=number * given.steps * row * machines, loss=loss, sent=sent, received=received, steps=given.steps,
                    learning_rate=given.learning_rate,
                )  # fmt: skip
                return loss

            start = warm_start(place, root / f"warm-{rng_seed}", given.warm, given.batch, given.length, rng_seed)
            say("star.loss", run="warm", rng_seed=rng_seed, loss=held_out(place, model, place.store.get(start), given.length))
            recipe = Recipe(
                steps=given.versions * given.steps, batch=given.batch, length=given.length, learning_rate=given.learning_rate,
                rng_seed=rng_seed,
            )  # fmt: skip
            last: dict[str, float] = {}
            for name in given.runs:
                machines, ring = 1 if name == "alone" else given.machines, 0
                if name == "ddp":
                    ring = 8 * size * given.steps * (machines - 1) // machines
                method = f"star {name}" if name in RUNS else name

                def told(
                    number: int, weights: Path, sent: int, received: int, name: str = name, method: str = method, machines: int = machines,
                    last: dict[str, float] = last,
                ) -> None:  # fmt: skip
                    last[name] = curve(method, machines, number, weights, sent, received)

                def each(number: int, weights: Path, told: Each = told, ring: int = ring) -> None:
                    told(number, weights, ring * number, ring * number)

                folder = root / f"{name}-{rng_seed}"
                each(0, place.store.get(start))
                if name in RUNS:
                    star = make_star(place, recipe, given.steps, **RUNS[name])
                    ran = run_star(place, folder, star, machines, start, each=told)
                    refused = dict(Counter(code for round in ran.fates for _, code in round if code))
                    bits = 8 * ran.sent / machines / given.versions / size
                    say("star.loss", run=name, rng_seed=rng_seed, rejected=refused, bits=bits)
                else:
                    run_alone(place, folder, recipe.model_copy(update={"batch": given.batch * machines}), given.steps, start, each)
            for name, loss in last.items():
                gap = {"gap": loss / last["ddp"] - 1} if "ddp" in last else {}
                gaps[name] += gap.values()
                say("star.loss", run=name, rng_seed=rng_seed, loss=loss, **gap)
    for name, found in gaps.items() if "ddp" in given.runs else ():
        error = float(np.std(found, ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None
        say("star.loss", run=name, seeds=len(found), gap=float(np.mean(found)), error=error)


if __name__ == "__main__":
    main()
