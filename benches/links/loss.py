"""DiLoCo and Streaming DiLoCo against data-parallel training at equal tokens, from the warm start of benches.star.loss and with its keys.

    python -m benches.links.loss [TEXT ...] [--runs "ddp,alone,one machine,diloco 0.7/0.9,streaming 0.4/0.9"] [--workers 4] [--seeds 0,1,2]
        [--learning-rates 3e-3] [--warm 200] [--rounds 10] [--steps 20] [--width 64] [--each 1] [--folder FOLDER]

`ddp` is one process with the batch of all workers; `alone` one worker, with its share of the tokens; `one machine` one worker that reads
all of them. `diloco` and `streaming` are followed by the rate and the momentum of the outer step (1/0: plain averaging); `streaming` has
the layers in --fragments, exchanged during --delay steps, after which a worker keeps --keep of its own weights. Workers take turns in this
process; their arithmetic is that of `elmwood seed diloco`, and tests/train/test_sites.py holds `run_sites` against real sites. Every run is
repeated at each of --learning-rates, which are of AdamW after the warm start.

One line for each point of a curve, after every --each rounds: `tokens` of all workers together since the warm start, `loss` on held-out
rows in nats a token, bytes that one worker has `sent` and `received` in sums of float32 that go round a ring, and the tokens that the run
was `planned` for. FOLDER keeps the text and the warm starts for further runs.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice, product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from benches.common import integers, numbers, parser, say, words
from benches.star.simulation import WARM, Place, held_out, open_place, run_alone, warm_start
from elmwood.lm.load import load_model
from elmwood.records import Diloco, Recipe
from elmwood.train.card.path import fast_path
from elmwood.train.data import Batch, batches, split_batch
from elmwood.train.inner.phase import set_weights
from elmwood.train.loop import adamw, add_gradients, update_weights
from elmwood.train.sites.site import divide, go_on_from, take_outer_step

RUNS = ["ddp", "alone", "one machine", "diloco 0.7/0.9", "diloco 0.7/0.5", "diloco 1/0", "streaming 0.4/0.9"]


def run_sites(
    models: list[Any], plan: Diloco, rows: Iterator[Batch], each: Callable[[int, dict[str, Tensor]], None] = lambda *_: None
) -> dict[str, Tensor]:
    """The rounds of `train_at_site`, by sites that take turns: the weights that all share in the end. `each` is told the inner steps that
    were done, and these weights, after every round."""
    recipe, own = plan.recipe, plan.recipe.model_copy(update={"batch": plan.recipe.batch // plan.sites})
    weights = [dict(model.named_parameters()) for model in models]
    optimizers = [adamw(one, recipe) for one in weights]
    whole = {name: weight.detach().clone() for name, weight in weights[0].items()}
    velocity = {name: torch.zeros_like(weight) for name, weight in whole.items()}
    fragments = divide(models[0], plan.fragments)
    with ExitStack() as around:
        able = [around.enter_context(fast_path(model, own)) for model in models]

        def train(first: int, steps: int) -> None:
            taken = [list(split_batch(batch, plan.sites)) for batch in islice(rows, steps)]
            for site, model in enumerate(models):
                model.train()
                for number, batch in enumerate(taken):
                    add_gradients(model, able[site], batch[site], own)
                    update_weights(optimizers[site], recipe, first + number)

        for number in range(plan.rounds):
            first, begins = number * plan.apart, (number + 1) * plan.apart - plan.delay
            train(first, begins - first)
            with torch.no_grad():
                sent = {
                    name: whole[name] - torch.stack([one[name] for one in weights]).mean(0) for name in fragments[number % len(fragments)]
                }
            train(begins, plan.delay)
            with torch.no_grad():
                for name, delta in sent.items():
                    take_outer_step(plan, whole[name], velocity[name], delta)
                    for one in weights:
                        go_on_from(plan, whole[name], one[name])
            each(first + plan.apart, whole)
    return whole


class Runs:
    """The runs of one rng seed and number of workers, from one warm start. `told`: (method, inner steps done, weights, bytes sent)."""

    def __init__(self, place: Place, start: str, workers: int, rng_seed: int, given: Any, scratch: Path, told: Callable[..., None]):
        self.place, self.start, self.workers, self.rng_seed = place, start, workers, rng_seed
        self.given, self.scratch, self.told = given, scratch, told

    @property
    def ring(self) -> int:
        """Bytes that a worker sends for a sum over all weights."""
        return 8 * self.place.seed.parameters * (self.workers - 1) // self.workers

    def run(self, name: str, learning_rate: float) -> None:
        """Train as `name` says."""
        kind, _, outer = name.partition(" ")
        if kind not in ("diloco", "streaming"):
            return self._plain(name, learning_rate)
        given, rate, momentum = self.given, *(float(one) for one in outer.split("/"))
        recipe = Recipe(
            steps=given.rounds * given.steps, batch=given.batch * self.workers, length=given.length, learning_rate=learning_rate,
            rng_seed=self.rng_seed,
        )  # fmt: skip
        parts = {"fragments": given.fragments, "delay": given.delay, "keep": given.keep} if kind == "streaming" else {}
        plan = Diloco(
            seed=self.place.seed.digest, corpus=self.place.corpus, recipe=recipe, sites=self.workers, steps=given.steps, rate=rate,
            momentum=momentum, **parts,
        )  # fmt: skip
        models = [load_model(self.place.seed, self.place.store, device="cpu", dtype=torch.float32) for _ in range(self.workers)]
        for model in models:
            set_weights(dict(model.named_parameters()), self.place.store.get(self.start))
        path, every = self.scratch / "now.safetensors", given.each * given.steps

        def each(steps: int, whole: dict[str, Tensor]) -> None:
            if steps % every == 0 or steps == recipe.steps:
                safetensors.torch.save_file({one: weight.contiguous() for one, weight in whole.items()}, path)
                self.told(name, steps, path, self.ring * steps // given.steps)

        self.told(name, 0, self.place.store.get(self.start), 0)
        run_sites(models, plan, batches(self.place.train, recipe), each)

    def _plain(self, name: str, learning_rate: float) -> None:
        """One process."""
        given, every = self.given, self.given.each * self.given.steps
        batch, times = given.batch * (self.workers if name == "ddp" else 1), self.workers if name == "one machine" else 1

        def each(number: int, weights: Path) -> None:
            self.told(name, number * every, weights, self.ring * number * every if name == "ddp" else 0)

        each(0, self.place.store.get(self.start))
        recipe = Recipe(
            steps=given.rounds // given.each * every * times, batch=batch, length=given.length, learning_rate=learning_rate,
            rng_seed=self.rng_seed,
        )  # fmt: skip
        run_alone(self.place, Path(tempfile.mkdtemp(dir=self.scratch)), recipe, every * times, self.start, each)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("sources", nargs="*", default=["sample"])
    options.add_argument("--workers", type=integers, default=[4])
    options.add_argument("--seeds", type=integers, default=[0, 1, 2])
    options.add_argument("--runs", type=words, default=RUNS)
    options.add_argument("--learning-rates", type=numbers, default=[WARM])
    options.add_argument("--folder", type=Path)
    options.add_argument("--keep", type=float, default=0.5)
    defaults = {"rounds": 10, "steps": 20, "warm": 200, "width": 64, "batch": 8, "length": 64, "fragments": 2, "delay": 5, "each": 1}
    for name, default in defaults.items():
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    if given.rounds % given.each:
        raise SystemExit(f"--each {given.each}: --rounds {given.rounds} is no multiple of it")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        root = given.folder or scratch / "kept"
        place = open_place(root / f"store-{given.width}", given.sources, given.width, 1024, given.length)
        judged, row = load_model(place.seed, place.store, device="cpu"), given.batch * given.length
        for rng_seed in given.seeds:
            folder = root / f"warm-{given.width}-{given.warm}-{rng_seed}"
            start = warm_start(place, folder, given.warm, given.batch, given.length, rng_seed)
            for workers, learning_rate, name in product(given.workers, given.learning_rates, given.runs):

                def told(
                    method: str, steps: int, weights: Path, sent: int, workers: int = workers, learning_rate: float = learning_rate,
                    rng_seed: int = rng_seed,
                ) -> None:  # fmt: skip
                    streams = method.startswith("streaming")
                    say(
                        "links.curve", method=method, workers=1 if method == "alone" else workers, rng_seed=rng_seed,
                        parameters=place.seed.parameters, warm=given.warm * row, tokens=steps * row * (1 if method == "alone" else workers),
                        loss=held_out(place, judged, weights, given.length), sent=sent, received=sent, learning_rate=learning_rate,
                        steps=given.steps, fragments=given.fragments if streams else 1, delay=given.delay if streams else 0,
                        keep=given.keep if streams else 0.0,
                        planned=given.rounds * given.steps * row * (1 if method == "alone" else workers),
                    )  # fmt: skip

                Runs(place, start, workers, rng_seed, given, scratch, told).run(name, learning_rate)


if __name__ == "__main__":
    main()
