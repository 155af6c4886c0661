"""One to three hostile machines of eight: what the gates reject, and what the loss becomes.

    python -m benches.star.attacks [TEXT ...] [--attacks flip,times50,zero,old,copy,nan,squat,drift,back] [--hostile 1,3]
        [--versions 8] [--steps 8] [--warm 200] [--width 32] [--gates losses,median] [--form int8] [--seeds 0,1,2]

All start from one machine after `--warm` steps. `loss` is on held-out rows, nats a token; `worse` is relative to all honest with the same
gates (0.01: 1 %), and `fewer` to a run of the honest ones alone. `rejected` counts proposals of hostile machines, `wrong` those of honest
ones. At the end the means over the seeds, with standard errors.
"""

import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import integers, parser, say, words
from benches.star.simulation import Change, Ran, held_out, make_star, open_place, run_alone, run_star
from elmwood.lm.load import load_model
from elmwood.outer.compress import open_delta
from elmwood.outer.step import read_tensors
from elmwood.records import Recipe


def flip(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: -value for name, value in delta.items()}


def times50(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: 50 * value for name, value in delta.items()}


def zero(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: 0 * value for name, value in delta.items()}


def old(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    """The first delta again and again, said to be new."""
    return known.setdefault("first", delta)


def copy(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    """The first honest one of the round, if it were seen; else the last step, which everybody sees."""
    for path in known["others"].values():
        other = open_delta(path, known["shapes"], known["form"])
        return {name: other.values(name) for name in delta}
    return dict(read_tensors(known["base"].velocity)) if known["base"].velocity else delta


def nan(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.full_like(value, np.nan) for name, value in delta.items()}


def squat(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    """Its whole norm, reversed, on the values that the delta itself moves least: where few others send."""
    made = {}
    for name, value in delta.items():
        few = np.argsort(np.abs(value))[: max(1, len(value) // 32)]
        made[name] = np.zeros_like(value)
        made[name][few] = -np.sign(value[few]) * np.linalg.norm(value) / np.sqrt(len(few))
    return made


def back(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    """A useful delta with half as much of the way back to the first version."""
    now = dict(read_tensors(known["base"].weights))
    first = known.setdefault("first weights", now)
    gone = np.sqrt(sum(np.square(now[name] - first[name], dtype=float).sum() for name in now))
    norm = np.sqrt(sum(np.square(value, dtype=float).sum() for value in delta.values()))
    return {name: value - np.float32(0.5 * norm / gone) * (now[name] - first[name]) if gone else value for name, value in delta.items()}


def drift(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    """A useful delta with half as much of one direction that never changes."""
    if "way" not in known:
        rng = np.random.default_rng(99)
        known["way"] = {name: rng.standard_normal(len(value)).astype(np.float32) for name, value in sorted(delta.items())}
    way = known["way"]
    return {name: value + 0.5 * way[name] * np.linalg.norm(value) / np.linalg.norm(way[name]) for name, value in delta.items()}


ATTACKS: dict[str, Change] = {
    "flip": flip, "times50": times50, "zero": zero, "old": old, "copy": copy, "nan": nan, "squat": squat, "drift": drift,
    "back": back,
}  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("sources", nargs="*", default=["sample"])
    options.add_argument("--attacks", type=words, default=[*ATTACKS])
    options.add_argument("--hostile", type=integers, default=[1, 3])
    options.add_argument("--gates", type=words, default=["losses"])
    options.add_argument("--seeds", type=integers, default=[0, 1, 2])
    options.add_argument("--form", default="int8")
    sizes = {"machines": 8, "versions": 8, "steps": 8, "warm": 200, "width": 32, "batch": 4, "length": 64}
    for name, default in sizes.items():
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        place = open_place(Path(scratch) / "store", given.sources, given.width, 512, given.length)
        inner = Recipe(steps=given.warm, batch=given.batch, length=given.length, learning_rate=3e-3)

        def run(machines: int, hostile: dict[int, Change], gates: str, rng_seed: int) -> Ran:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                recipe = inner.model_copy(update={"steps": given.versions * given.steps, "rng_seed": rng_seed})
                star = make_star(place, recipe, given.steps, given.form)
                return run_star(place, Path(folder), star, machines, start, gates=gates == "losses", hostile=hostile)

        for rng_seed in given.seeds:
            warm = inner.model_copy(update={"rng_seed": 1000 + rng_seed, "schedule": "constant"})
            start = run_alone(place, Path(scratch) / f"warm-{rng_seed}", warm, given.warm)
            before = held_out(place, load_model(place.seed, place.store, device="cpu"), place.store.get(start), given.length)
            say("star.attacks", attack="start", rng_seed=rng_seed, loss=before)
            for gates in given.gates:
                honest = run(given.machines, {}, gates, rng_seed)
                wrong = sum(code != "" for told in honest.fates for _, code in told)
                say("star.attacks", attack="none", gates=gates, rng_seed=rng_seed, loss=honest.loss, wrong=wrong)
                for number in given.hostile:
                    alone = run(given.machines - number, {}, gates, rng_seed).loss
                    say("star.attacks", attack="fewer", hostile=number, gates=gates, rng_seed=rng_seed, worse=alone / honest.loss - 1)
                    for attack in given.attacks:
                        bad = {given.machines - 1 - n: ATTACKS[attack] for n in range(number)}
                        ran, names = run(given.machines, bad, gates, rng_seed), {f"{n:04x}" for n in bad}
                        told = [(worker in names, code) for told in ran.fates for worker, code in told]
                        found[gates, attack, number].append(ran.loss / honest.loss - 1)
                        say(
                            "star.attacks", attack=attack, hostile=number, gates=gates, rng_seed=rng_seed, loss=ran.loss,
                            worse=ran.loss / honest.loss - 1, fewer=ran.loss / alone - 1,
                            codes=dict(Counter(code or "applied" for is_bad, code in told if is_bad)),
                            rejected=sum(is_bad and code != "" for is_bad, code in told), of=number * given.versions,
                            wrong=sum(not is_bad and code != "" for is_bad, code in told),
                        )  # fmt: skip
    for (gates, attack, number), worse in found.items():
        error = float(np.std(worse, ddof=1) / np.sqrt(len(worse))) if len(worse) > 1 else None
        say("star.attacks", attack=attack, hostile=number, gates=gates, seeds=len(worse), worse=float(np.mean(worse)), error=error)


if __name__ == "__main__":
    main()
