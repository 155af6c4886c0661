"""The loop: the same for a seed from scratch, a full expert and an adapter. What is trained is what requires a gradient.

B rows of a batch, L tokens of a row
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from elmwood.corpus.tokens import Packed
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.records import Point, Recipe
from elmwood.train.data import Batch, batches
from elmwood.train.loss import Abilities, abilities, loss
from elmwood.train.schedule import rate
from elmwood.train.state import Stand, load, save

POINTS = 50  # of a training curve
EVERY = 5.0  # seconds between two saved states, more where saving is slow:
SHARE = 0.01  # at most this share of the time is spent saving


class Trained(NamedTuple):
    """What a finished run tells of itself, beside the weights it changed in place."""

    curve: tuple[Point, ...]
    seconds: float
    able: Abilities


def run(model: Any, packed: Packed, recipe: Recipe, work: Path, log: Callable[..., None], progress: Progress = silent) -> Trained:
    """Train what requires a gradient, in place, from where the last run in folder `work` stood. Raises BadInput, BadCorpus, Damaged.

    On a CPU the result is the same bytes however often the run was cut short.
    """
    with threads(recipe.threads), torch.random.fork_rng():
        able = abilities(model.eval(), min(8, recipe.length // 2))
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        optimizer = adamw(weights, recipe)
        stand = load(work, weights, optimizer)
        model.train()
        clock, saved, pause = time.monotonic() - stand.seconds, time.monotonic(), EVERY
        device = next(iter(weights.values())).device
        running = torch.tensor(stand.loss, dtype=torch.float64, device=device)
        for step, batch in zip(range(stand.step, recipe.steps), batches(packed, recipe, stand.step)):  # noqa: B905  # one has no end
            torch.manual_seed((recipe.rng_seed << 32) + step)  # dropout, where a model has it, is a function of the step
            running += _step(model, able, batch, optimizer, recipe, step)
            stand = _record(stand, step + 1, running, recipe, time.monotonic() - clock, log)
            progress("train", (step + 1) * recipe.batch * recipe.length, recipe.tokens, "tokens")
            if (now := time.monotonic()) - saved >= pause and step + 1 < recipe.steps:
                save(work, stand._replace(loss=running.item(), seconds=now - clock), weights, optimizer)
                saved = time.monotonic()
                pause = max(EVERY, (saved - now) / SHARE)
        model.eval()
        return Trained(stand.curve, time.monotonic() - clock, able)


def _step(model: Any, able: Abilities, batch: Batch, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> Tensor:
    """One optimiser step; its loss, not yet waited for."""
    device = optimizer.param_groups[0]["params"][0].device
    tokens_BL, targets_BL, positions_BL = (torch.from_numpy(part).to(device) for part in batch)
    several = bool((batch.positions_BL[:, -1] != recipe.length - 1).any())  # some row holds more than one document
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        value = loss(model, able, tokens_BL, targets_BL, positions_BL if several else None)
    value.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate(recipe, step)
    clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    return value.detach()


def _record(stand: Stand, done: int, running: Tensor, recipe: Recipe, seconds: float, log: Callable[..., None]) -> Stand:
    """Count the step; about POINTS times per run add the mean loss to the curve, and to the log. Raises BadInput."""
    every = max(1, recipe.steps // POINTS)
    if done % every and done < recipe.steps:
        return stand._replace(step=done)
    mean = running.item() / (done - (stand.curve[-1].step if stand.curve else 0))
    if not math.isfinite(mean):
        raise BadInput(
            f"the loss became {mean} before step {done}: the learning rate {recipe.learning_rate:g} is too high here, try a third of it"
        )
    running.zero_()
    point = Point(step=done, tokens=done * recipe.batch * recipe.length, loss=mean)
    log(event="point", **point.model_dump(), rate=rate(recipe, done - 1), elapsed=round(seconds, 3))
    return stand._replace(step=done, loss=0.0, curve=(*stand.curve, point))


def adamw(weights: dict[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms and biases do not decay."""
    decayed = [weight for weight in weights.values() if weight.ndim >= 2]
    others = [weight for weight in weights.values() if weight.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads: float sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
