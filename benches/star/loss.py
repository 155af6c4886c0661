"""A star against one machine and against data-parallel training, at equal tokens.

    python -m benches.star.loss [TEXT ...] [--machines 4] [--versions 10] [--steps 20] [--warm 100] [--runs int8,top,apart,plain]
        [--seeds 0] [--width 64]

`dense` is one machine with batches as large as those of all machines together, which is what DDP computes, for as many steps as a machine
of the star takes; `alone` is one machine of the star without the others (a quarter of the tokens, of four). All start from the same
weights: those of one machine after `--warm` steps. `loss` is on held-out rows, nats a token; `gap` is relative to `dense`; `bytes` are
those that a machine sends for each parameter, over the whole run; DDP would send 4 for each parameter and step.
"""

import tempfile
from pathlib import Path
from typing import Any

from benches.common import integers, parser, say, words
from benches.star.simulation import Place, held_out, open_place, run_star
from elmwood.lm.load import load_model
from elmwood.outer.step import OUTER
from elmwood.records import Recipe, Star
from elmwood.train.loop import run as train

RUNS: dict[str, dict[str, Any]] = {
    "int8": {"form": "int8"},
    "int4": {"form": "int4"},
    "top": {"form": "top"},
    "top plain": {"form": "top", "rate": 1.0, "momentum": 0.0},
    "apart": {"form": "int8", "apart": True},
    "plain": {"form": "int8", "rate": 1.0, "momentum": 0.0},
}


def one_machine(place: Place, folder: Path, recipe: Recipe, start: str | None = None) -> tuple[float, str]:
    """Train in one process; the loss and the blob of the weights."""
    import torch
    from safetensors.torch import save

    from elmwood.train.inner.phase import set_weights

    model = load_model(place.seed, place.store, device="cpu", dtype=torch.float32)
    if start:
        set_weights(dict(model.named_parameters()), place.store.get(start))
    folder.mkdir(parents=True)
    train(model, place.train, recipe, folder, lambda **facts: None)
    blob = place.store.put(save({name: weight.detach().contiguous() for name, weight in model.named_parameters()}, {"format": "pt"}))
    star = Star(name="b", seed=place.seed.digest, corpus=place.corpus, recipe=recipe, steps=1, parts=1, form="int8", outer=OUTER)
    return held_out(place, star, model, place.store.get(blob)), blob


def main() -> None:
    options = parser(__doc__)
    options.add_argument("sources", nargs="*", default=["sample"])
    options.add_argument("--runs", type=words, default=list(RUNS))
    options.add_argument("--seeds", type=integers, default=[0])
    defaults = {"machines": 4, "versions": 10, "steps": 20, "warm": 100, "width": 64, "batch": 8, "length": 64}
    for name, default in defaults.items():
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        place = open_place(root / "store", given.sources, given.width, 1024, given.length)
        plain: dict[str, Any] = {"batch": given.batch, "length": given.length, "learning_rate": 3e-3}
        for rng_seed in given.seeds:
            first = Recipe(steps=given.warm, rng_seed=1000 + rng_seed, schedule="constant", **plain)
            warm, start = one_machine(place, root / f"warm-{rng_seed}", first)
            recipe = Recipe(steps=given.versions * given.steps, rng_seed=rng_seed, **plain)
            large = recipe.model_copy(update={"batch": given.batch * given.machines})
            dense, _ = one_machine(place, root / f"dense-{rng_seed}", large, start)
            alone, _ = one_machine(place, root / f"alone-{rng_seed}", recipe, start)
            say("star.loss", run="warm", rng_seed=rng_seed, loss=warm)
            say("star.loss", run="dense", rng_seed=rng_seed, loss=dense, gap=0.0, bytes=4.0 * recipe.steps)
            say("star.loss", run="alone", rng_seed=rng_seed, loss=alone, gap=alone / dense - 1, bytes=0.0)
            for name in given.runs:
                ran = run_star(
                    place, root / f"{name}-{rng_seed}", machines=given.machines, versions=given.versions, steps=given.steps,
                    learning_rate=3e-3,
                    batch=given.batch, length=given.length, rng_seed=rng_seed, start=start, **RUNS[name],
                )  # fmt: skip
                size = ran.sent / given.machines / place.seed.parameters
                refused = sum(code != "" for told in ran.fates for _, code in told)
                say("star.loss", run=name, rng_seed=rng_seed, loss=ran.loss, gap=ran.loss / dense - 1, bytes=size, rejected=refused)


if __name__ == "__main__":
    main()
