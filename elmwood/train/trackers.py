"""Training followed in other people's viewers, through accelerate's trackers. Nothing of it enters a recipe: the bytes are the same."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from elmwood.errors import BadInput, MissingExtra
from elmwood.records import Recipe
from elmwood.registry import require

MODULES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}  # what each needs installed


@contextmanager
def followed(names: Sequence[str], folder: Path, run: str, recipe: Recipe) -> Iterator[Callable[..., None]]:
    """A function that takes the events of a training log and hands the numbers of its points to these trackers.

    Files, where a tracker writes any, go below `folder`. Raises BadInput, MissingExtra.
    """
    for name in names:
        if name not in MODULES:
            raise BadInput(f"{name!r} is no tracker of training: choose among {', '.join(MODULES)}")
        require(MODULES[name], name)
        if name not in {str(found) for found in get_available_trackers()}:
            raise MissingExtra(f"accelerate finds no {name}, though it is installed: upgrade both, pip install -U accelerate {name}")
    if not names:
        yield lambda **_: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=folder)  # for its trackers alone: it places nothing
    accelerator.init_trackers(run, {what: str(value) for what, value in recipe.model_dump().items()})

    def log(event: str, **facts: Any) -> None:
        if event == "point":
            accelerator.log({what: value for what, value in facts.items() if what != "step"}, step=facts["step"])

    try:
        yield log
    finally:
        accelerator.end_training()
