"""What a coordinator computes for a version: CPU seconds per million parameters, losses apart.

    python -m benches.star.decision [--parameters 8000000] [--machines 4] [--form int8] [--repeats 5]

Deltas are random numbers, matrices have 1,024 columns. The least of the repeats: norms, copies and the outer step, from files to files.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
from safetensors.numpy import save_file

from benches.common import parser, say
from benches.star.kills import keys
from elmwood.outer import round
from elmwood.outer.compress import Floats, write_delta
from elmwood.outer.gates import Gains
from elmwood.outer.round import Pending, State, Terms, Worker
from elmwood.outer.settle import Base, settle
from elmwood.outer.step import OUTER, shapes_of
from elmwood.records import Recipe, Star, Version

TERMS = Terms(grace_s=0)


class Content:
    """A judge to whom everything is right."""

    def gains(self, one: Pending, delta: Callable[[str], Floats]) -> Gains:
        return Gains(np.ones(2), np.ones(2))

    def losses(self, weights: Path) -> Floats:
        return np.ones(2)


def main() -> None:
    options = parser(__doc__)
    for name, default in (("parameters", 8_000_000), ("machines", 4), ("repeats", 5)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--form", default="int8")
    given = options.parse_args()
    rng, zero = np.random.default_rng(0), f"sha256:{0:064x}"
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = Path(scratch), given.parameters // 4 // 1024
        tensors = {f"layer.{n}": rng.standard_normal((rows, 1024)).astype(np.float32) for n in range(4)}
        save_file(tensors, folder / "weights")
        shapes, size = shapes_of(folder / "weights"), 4 * rows * 1024
        star = Star(
            name="bench", seed="0" * 64, corpus="0" * 64, recipe=Recipe(steps=100, batch=1, length=8), steps=1, parts=64, form=given.form,
            outer=OUTER,
        )  # fmt: skip
        version = Version(star=star.digest, number=0, weights=zero, how="start")
        state, files = State(head=version.digest, workers={key: Worker(name=key[-4:]) for key in keys(given.machines)}), dict[str, Path]()
        for key in keys(given.machines):
            state, held = round.grant(state, star, TERMS, key, 0.0)
            assert isinstance(held, round.Grant)
            files[held.id] = folder / held.id
            write_delta(
                files[held.id], {name: rng.standard_normal(value.size) * 1e-3 for name, value in tensors.items()}, shapes, star.form
            )
            state = round.keep_part(round.begin_upload(state, key, held.id, 1, 1), key, held.id, 0, 1, zero)
            state = round.propose(state, star, key, held.id, 0, zero)
        state, taken = round.close(state, star, TERMS, 0.0), list[float]()
        base = Base(version, folder / "weights", None)
        for _ in range(given.repeats):
            (out := folder / "out").mkdir(exist_ok=True)
            began = process_time()
            made = settle(star, base, state, files, Content(), out)
            taken.append(process_time() - began)
            assert made.written, "nothing was merged"
        say("star.decision", machines=given.machines, form=given.form, parameters=size, seconds_a_million=min(taken) / size * 1e6)


if __name__ == "__main__":
    main()
