"""DiLoCo against data-parallel training at equal tokens, from the warm start of benches.star.loss and with its keys.

    python -m benches.links.loss [TEXT ...] [--workers 4,8] [--seeds 0,1,2] [--rounds 10] [--steps 20] [--warm 200] [--width 64]
        [--runs "diloco,diloco 0.5,diloco plain"]

One line for each point of a curve: `tokens` of all workers together since the warm start, `loss` on held-out rows in nats a token, bytes
that one worker has `sent` and `received` in sums of float32 that go round a ring. All workers compute in this process; tests/train/
test_sites.py holds the same rounds against real processes.
"""

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benches.common import integers, parser, say, words
from benches.star.simulation import Place, held_out, open_place, run_alone
from elmwood.lm.load import load_model
from elmwood.records import Recipe
from elmwood.train.card.path import fast_path
from elmwood.train.data import batches, split_batch
from elmwood.train.inner.phase import set_weights
from elmwood.train.loop import adamw, add_gradients, update_weights

RUNS = {"diloco": (0.7, 0.9), "diloco 0.5": (0.7, 0.5), "diloco plain": (1.0, 0.0)}  # rate and momentum of the outer step


def run_diloco(place: Place, start: Path, recipe: Recipe, workers: int, steps: int, outer: tuple[float, float], each: Any) -> None:
    """Rounds of `steps` steps of every worker, on its share of the rows of each batch; `each` is told of every round."""
    rate, momentum = outer
    whole = load_model(place.seed, place.store, device="cpu", dtype=torch.float32)
    set_weights(dict(whole.named_parameters()), start)
    models = [load_model(place.seed, place.store, device="cpu", dtype=torch.float32) for _ in range(workers)]
    optimizers = [adamw(dict(model.named_parameters()), recipe) for model in models]
    step = torch.optim.SGD(whole.parameters(), lr=rate, momentum=momentum, nesterov=momentum > 0)
    own, rows = recipe.model_copy(update={"batch": recipe.batch // workers}), batches(place.train, recipe)
    for number in range(recipe.steps // steps):
        taken = [list(split_batch(batch, workers)) for batch in islice(rows, steps)]
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            model.load_state_dict(whole.state_dict())
            model.train()
            with fast_path(model, own) as able:
                for place_, batch in enumerate(taken):
                    add_gradients(model, able, batch[worker], own)
                    update_weights(optimizer, recipe, number * steps + place_)
        with torch.no_grad():
            for weight, *others in zip(whole.parameters(), *(model.parameters() for model in models), strict=True):
                weight.grad = weight - torch.stack(others).mean(0)
        step.step()
        each(number + 1, whole)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("sources", nargs="*", default=["sample"])
    options.add_argument("--workers", type=integers, default=[4, 8])
    options.add_argument("--seeds", type=integers, default=[0, 1, 2])
    options.add_argument("--runs", type=words, default=list(RUNS))
    options.add_argument("--ddp", type=integers, default=[], help="numbers of workers whose data-parallel curve is computed too")
    defaults = {"rounds": 10, "steps": 20, "warm": 200, "width": 64, "batch": 8, "length": 64}
    for name, default in defaults.items():
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        place = open_place(root / "store", given.sources, given.width, 1024, given.length)
        judged, size, row = load_model(place.seed, place.store, device="cpu"), place.seed.parameters, given.batch * given.length
        plain: dict[str, Any] = {"length": given.length, "learning_rate": 3e-3}
        for rng_seed in given.seeds:
            start = run_alone(
                place, root / f"warm-{rng_seed}", versions=1, steps=given.warm, batch=given.batch, rng_seed=1000 + rng_seed,
                schedule="constant", **plain,
            )  # fmt: skip
            for workers in given.workers:

                def curve(method: str, number: int, weights: Path, sent: int, workers: int = workers, rng_seed: int = rng_seed) -> None:
                    loss = held_out(place, judged, weights, given.length)
                    say(
                        "links.curve", method=method, workers=workers, rng_seed=rng_seed, parameters=size, warm=given.warm * row,
                        tokens=number * given.steps * row * workers, loss=loss, sent=sent, received=sent,
                    )  # fmt: skip

                ring = 8 * size * (workers - 1) // workers
                for name in given.runs:

                    def told(number: int, whole: Any, name: str = name, ring: int = ring, curve: Any = curve) -> None:
                        path = root / "now.safetensors"
                        safetensors.torch.save_file({one: w.detach().contiguous() for one, w in whole.named_parameters()}, path)
                        curve(name, number, path, ring * number)

                    curve(name, 0, place.store.get(start), 0)
                    recipe = Recipe(steps=given.rounds * given.steps, batch=given.batch * workers, rng_seed=rng_seed, **plain)
                    run_diloco(place, place.store.get(start), recipe, workers, given.steps, RUNS[name], told)
                if workers in given.ddp:

                    def step(number: int, weights: Path, sent: int, ring: int = ring * given.steps, curve: Any = curve) -> None:
                        curve("ddp", number, weights, ring * number)

                    step(0, place.store.get(start), 0)
                    run_alone(
                        place, root / f"ddp-{workers}-{rng_seed}", versions=given.rounds, steps=given.steps, batch=given.batch * workers,
                        rng_seed=rng_seed, start=start, each=step, **plain,
                    )  # fmt: skip


if __name__ == "__main__":
    main()
