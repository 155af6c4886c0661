"""What a training run will take, and what would fit: the prediction, and two real steps beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from elmwood.engine import cores
from elmwood.errors import BadInput, UnknownName
from elmwood.ranges import Count, checked
from elmwood.records import Mixture, Recipe, Seed
from elmwood.report.notebook import facts
from elmwood.store import AnyStore, Named, Store
from elmwood.study.tasks import THREADS, default_threads
from elmwood.study.training import default_length, make_record
from elmwood.train.seeds.shapes import names_shape
from elmwood.units import parse_count, short

if TYPE_CHECKING:
    from elmwood.train.fit.gpu_table import CardRecipe
    from elmwood.train.fit.measure import Measured
    from elmwood.train.fit.mixture import TuningPrediction
    from elmwood.train.fit.predict import Prediction


class Fitting(NamedTuple):
    """What a run will take, and, where it was measured, what two steps took."""

    recipe: Recipe
    answer: "Prediction | TuningPrediction"
    measured: "Measured | None" = None
    predicted: int = 0  # bytes, for the process that was measured

    @property
    def speeds(self) -> tuple[float, float] | None:
        """Tokens per second, from the least to the most to be expected; None if the device is not here."""
        from elmwood.train.fit.predict import SPEEDS  # torch

        speed = self.answer.tokens_per_second
        return (SPEEDS[0] * speed, SPEEDS[1] * speed) if speed else None

    def _repr_html_(self) -> str:
        values = {part: f"{short(size)}B" for part, size in self.answer.components.items() if size}
        speeds = self.speeds
        values |= {
            "total": f"{short(self.answer.total)}B", "speed": f"{short(speeds[0])} to {short(speeds[1])} tokens/s" if speeds else "",
        }  # fmt: skip
        return facts(self.answer.verdict, values)


@checked
def fit(
    seed: Named, *, method: str = "lora", batch: int = 8, length: int | None = None, rank: int = 16, late: float = 1.0,
    accumulate: int = 1, checkpointing: bool = False, checkpointed: float = 1.0, optimiser: str = "adamw", together: int = 1,
    tuned: str = "routers", processes: Count = 1, memory: int | str | None = None,
    device: str | None = None, measure: bool = False, store: AnyStore = None,
) -> Fitting:  # fmt: skip
    """Predict the memory and time of training a seed, or of tuning a mixture. The config is enough: a seed may be a folder with a
    config.json, such a file, a shape of `seed train --like`, or a hub id. Raises BadInput, BadSeed, DoesNotFit, UnknownName.

    `processes`: what one of so many takes, each with a copy of the model and its share of the rows (DDP).
    `memory`: what there is, such as "24GB"; `device`: cpu or cuda; by default this machine's. `measure`: train two steps as well.
    """
    store = Store(store)
    known = _find(seed, store)
    start = store.load(known.seed, Seed) if isinstance(known, Mixture) else known
    length = default_length(start.context if start else 1024) if length is None else length
    if processes > 1 and (measure or processes > batch or method not in ("full", "router")):
        raise BadInput(
            f"--processes {processes} is of --method full, without --measure, and of at most --batch {batch}: correct one of them"
        )
    common = {
        "batch": -(-batch // processes), "length": length, "accumulate": accumulate, "checkpointing": checkpointing, "optimiser": optimiser,
        "threads": min(cores(), default_threads(start) if start else THREADS),
    }  # fmt: skip
    size = None if memory is None else parse_count(memory)
    if isinstance(known, Mixture) or method == "router":
        if not isinstance(known, Mixture):
            raise BadInput(f"{seed} is no mixture, and routers are of mixtures: make one with `elmwood mix`, or ask for another --method")
        if measure:
            raise BadInput("--measure is of seeds and experts: of a mixture there is a prediction only; leave it out")
        return _fit_mixture(known, _recipe(method=method, tuned=tuned, **common), store, size, device)
    return _fit_seed(
        known or str(seed),
        _recipe(method=method, rank=rank, late=late, together=together, checkpointed=checkpointed, **common),
        store,
        size,
        device,
        measure,
    )


def _find(seed: Named, store: Store) -> Seed | Mixture | None:
    """The record, if the seed is not a folder, a shape, a config's file or a hub id, which has a slash. Raises UnknownName."""
    elsewhere = isinstance(seed, str) and (names_shape(seed) or "/" in seed or Path(seed).expanduser().is_dir())
    if elsewhere and seed not in store.names():
        return None
    try:
        record = store.load(seed)
    except UnknownName as error:
        raise UnknownName(f"{error}, folders and hub ids, such as org/model, are read too") from error
    return record if isinstance(record, Mixture) else store.load(record, Seed)


def _recipe(**fields: object) -> Recipe:
    return make_record(Recipe, "fit", steps=1, **fields)


def _fit_mixture(mixture: Mixture, recipe: Recipe, store: Store, memory: int | None, device: str | None) -> Fitting:
    from elmwood.train.fit.mixture import fit_mixture  # torch

    for option in ("optimiser", "checkpointing"):
        if getattr(recipe, option) != Recipe.model_fields[option].default:
            raise BadInput(f"--{option}: predictions for mixtures do not know it yet; leave it out")
    return Fitting(recipe, fit_mixture(mixture, recipe, store, memory=memory, device=device))


def _fit_seed(seed: Seed | str, recipe: Recipe, store: Store, memory: int | None, device: str | None, measure: bool) -> Fitting:
    from elmwood.lm.devices import best_device  # torch
    from elmwood.train.fit import measure as two_steps
    from elmwood.train.fit import predict

    answer = predict.fit(seed, recipe, store, memory=memory, device=device)
    if not measure:
        return Fitting(recipe, answer)
    if answer.device != best_device().type:
        raise BadInput(f"there is no {answer.device} here to measure on: leave --device out")
    found = two_steps.measure(seed if isinstance(seed, Seed) else predict.load_config(seed, store), recipe, store, answer.device)
    return Fitting(recipe, answer, found, two_steps.predict_peak(answer.components, found))


def gpu_table() -> "tuple[tuple[int, ...], list[tuple[str, list[CardRecipe | None]]]]":
    """Memory of common cards in GB, and for seeds of common shapes the recipe that trains most of them on each card; None: none fits."""
    from elmwood.train.fit.gpu_table import MEMORY  # torch
    from elmwood.train.fit.gpu_table import gpu_table as rows

    return MEMORY, rows()
