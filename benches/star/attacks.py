"""One to three hostile machines of eight: what the gates reject, and what the loss becomes.

    python -m benches.star.attacks [TEXT ...] [--attacks none,flip,times50,zero,old,copy,nan,squat,drift] [--hostile 1,3]
        [--versions 6] [--steps 10] [--width 32] [--gates losses,median] [--form int8] [--seeds 0]

`loss` is on held-out rows, nats a token; `worse` is the ratio to all honest with the same gates, and `fewer` to a run of the honest ones
alone. `rejected` counts proposals of hostile machines, `wrong` those of honest ones.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import integers, parser, say, words
from benches.star.simulation import Change, open_place, run_star
from elmwood.outer.compress import open_delta
from elmwood.outer.step import read_tensors


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


def drift(delta: dict[str, np.ndarray], known: dict[str, Any]) -> dict[str, np.ndarray]:
    """A useful delta with half as much of one direction that never changes."""
    if "way" not in known:
        rng = np.random.default_rng(99)
        known["way"] = {name: rng.standard_normal(len(value)).astype(np.float32) for name, value in sorted(delta.items())}
    way = known["way"]
    return {name: value + 0.5 * way[name] * np.linalg.norm(value) / np.linalg.norm(way[name]) for name, value in delta.items()}


ATTACKS: dict[str, Change] = {
    "flip": flip, "times50": times50, "zero": zero, "old": old, "copy": copy, "nan": nan, "squat": squat, "drift": drift
}  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("sources", nargs="*", default=["sample"])
    options.add_argument("--attacks", type=words, default=["none", *ATTACKS])
    options.add_argument("--hostile", type=integers, default=[1, 3])
    options.add_argument("--gates", type=words, default=["losses"])
    options.add_argument("--seeds", type=integers, default=[0])
    options.add_argument("--form", default="int8")
    for name, default in (("machines", 8), ("versions", 6), ("steps", 10), ("width", 32), ("batch", 4), ("length", 64)):
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = open_place(Path(scratch) / "store", given.sources, given.width, 512, given.length)
        count = 0

        def run(machines: int, hostile: dict[int, Change], gates: str, rng_seed: int) -> Any:
            nonlocal count
            count += 1
            return run_star(
                place, Path(scratch) / f"run-{count}", machines=machines, versions=given.versions, steps=given.steps, batch=given.batch,
                length=given.length, learning_rate=3e-3, rng_seed=rng_seed, form=given.form, gates=gates == "losses", hostile=hostile,
            )  # fmt: skip

        for gates in given.gates:
            for rng_seed in given.seeds:
                honest = run(given.machines, {}, gates, rng_seed)
                wrong = sum(code != "" for told in honest.fates for _, code in told)
                say("star.attacks", attack="none", gates=gates, rng_seed=rng_seed, loss=honest.loss, wrong=wrong)
                for number in given.hostile:
                    alone = run(given.machines - number, {}, gates, rng_seed).loss
                    for attack in given.attacks:
                        if attack == "none":
                            continue
                        bad = {given.machines - 1 - n: ATTACKS[attack] for n in range(number)}
                        ran, names = run(given.machines, bad, gates, rng_seed), {f"{n:04x}" for n in bad}
                        told = [(worker in names, code) for told in ran.fates for worker, code in told]
                        codes = sorted({code for is_bad, code in told if is_bad and code})
                        say(
                            "star.attacks", attack=attack, hostile=number, gates=gates, rng_seed=rng_seed, loss=ran.loss,
                            worse=ran.loss / honest.loss, fewer=ran.loss / alone, codes=codes,
                            rejected=sum(is_bad and code != "" for is_bad, code in told), of=number * given.versions,
                            wrong=sum(not is_bad and code != "" for is_bad, code in told),
                        )  # fmt: skip


if __name__ == "__main__":
    main()
