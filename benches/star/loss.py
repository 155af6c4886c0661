"""A star against one machine and against data-parallel training, at equal tokens.

    python -m benches.star.loss [TEXT ...] [--machines 4] [--versions 10] [--steps 20] [--warm 200] [--runs int8,int4,top,apart]
        [--seeds 0,1,2] [--width 64]

`ddp` is one machine with batches as large as those of all machines together, which is what data-parallel training computes, for as many
steps as a machine of the star takes; `alone` is one machine of the star without the others (a quarter of the tokens, of four). All start
from the same weights: those of one machine after `--warm` steps.

One line for each point of a curve (`star.curve`): `tokens` of all machines together since the warm start, `loss` on held-out rows in nats
a token, bytes that one machine has `sent` and `received`; data-parallel training sends and receives about twice its gradients at each
step (a ring). One line for each run (`star.loss`): `gap` is relative to `ddp`. At the end the mean `gap` over the seeds, with its standard
error.
"""

import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import integers, parser, say, words
from benches.star.simulation import held_out, open_place, run_alone, run_star
from elmwood.lm.load import load_model

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
    options.add_argument("--runs", type=words, default=["int8", "int4", "top", "apart"])
    options.add_argument("--seeds", type=integers, default=[0, 1, 2])
    defaults = {"machines": 4, "versions": 10, "steps": 20, "warm": 200, "width": 64, "batch": 8, "length": 64}
    for name, default in defaults.items():
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    gaps: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        place = open_place(root / "store", given.sources, given.width, 1024, given.length)
        model, size = load_model(place.seed, place.store, device="cpu"), place.seed.parameters
        plain: dict[str, Any] = {"length": given.length, "learning_rate": 3e-3}
        row = given.batch * given.length
        for rng_seed in given.seeds:

            def curve(method: str, machines: int, number: int, weights: Path, sent: int, received: int, rng_seed: int = rng_seed) -> float:
                loss = held_out(place, model, weights, given.length)
                say(
                    "star.curve", method=method, workers=machines, rng_seed=rng_seed, parameters=size, warm=given.warm * row,
                    tokens=number * given.steps * row * machines, loss=loss, sent=sent // machines, received=received,
                )  # fmt: skip
                return loss

            start = run_alone(
                place, root / f"warm-{rng_seed}", versions=1, steps=given.warm, batch=given.batch, rng_seed=1000 + rng_seed,
                schedule="constant", **plain,
            )  # fmt: skip
            warm = held_out(place, model, place.store.get(start), given.length)
            say("star.loss", run="warm", rng_seed=rng_seed, loss=warm)
            both: dict[str, Any] = {"versions": given.versions, "steps": given.steps, "rng_seed": rng_seed, "start": start} | plain
            last: dict[str, float] = {}
            for name, machines in (("ddp", given.machines), ("alone", 1)):

                def each(
                    number: int, weights: Path, sent: int, name: str = name, machines: int = machines, last: dict[str, float] = last
                ) -> None:
                    moved = 8 * size * number * given.steps * (machines - 1) // machines
                    last[name] = curve(name, machines, number, weights, moved * machines, moved)

                each(0, place.store.get(start), 0)
                run_alone(place, root / f"{name}-{rng_seed}", batch=given.batch * machines, each=each, **both)
            for name in given.runs:

                def told(number: int, weights: Path, sent: int, name: str = name, last: dict[str, float] = last) -> None:
                    last[name] = curve(f"star {name}", given.machines, number, weights, sent, 4 * size * number)

                told(0, place.store.get(start), 0)
                ran = run_star(
                    place, root / f"{name}-{rng_seed}", machines=given.machines, batch=given.batch, each=told, **both, **RUNS[name]
                )
                refused = dict(Counter(code for round in ran.fates for _, code in round if code))
                say("star.loss", run=name, rng_seed=rng_seed, rejected=refused, bits=8 * ran.sent / given.machines / given.versions / size)
            for name, loss in last.items():
                gaps[name].append(loss / last["ddp"] - 1)
                say("star.loss", run=name, rng_seed=rng_seed, loss=loss, gap=gaps[name][-1])
    for name, found in gaps.items():
        error = float(np.std(found, ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None
        say("star.loss", run=name, seeds=len(found), gap=float(np.mean(found)), error=error)


if __name__ == "__main__":
    main()
