"""The loop: the same for a seed from scratch, a full expert and an adapter. What is trained is what requires a gradient.

`run` is made of pieces that stand alone, for whoever trains in another order: `passes` (rows -> gradients), `turn` (gradients -> weights),
`adamw`, `checkpoint.save` and `checkpoint.load`, `data.batches`, `schedule.rate`, `loss.loss`.

B rows of a batch, L tokens of a row
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from elmwood.corpus.tokens import Packed
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.records import Point, Recipe
from elmwood.registry import require
from elmwood.train.checkpoint import Stand, keep_best, load, load_best, save
from elmwood.train.data import Batch, apart, batches, parts, scored
from elmwood.train.loss import Abilities, abilities, bare, loss
from elmwood.train.schedule import rate

POINTS = 50  # of a training curve; the validation loss is looked at as often
EVERY = 5.0  # seconds between two saved states, more where saving is slow:
SHARE = 0.01  # at most this share of the time is spent saving


class Trained(NamedTuple):
    """What a finished run tells of itself, beside the weights it changed in place."""

    curve: tuple[Point, ...]
    seconds: float
    able: Abilities
    steps: int  # done, fewer than the recipe's where patience ran out
    saving: float = 0.0  # seconds of this process spent writing states


class Work(NamedTuple):
    """What every step of a run is given."""

    model: Any
    able: Abilities
    weights: dict[str, Tensor]  # those that are trained
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    validation: tuple[Batch, ...]  # none where the recipe has no patience


def run(
    model: Any, packed: Packed, recipe: Recipe, work: Path, log: Callable[..., None], progress: Progress = silent,
    more: Callable[[], Tensor | None] = lambda: None,
) -> Trained:  # fmt: skip
    """Train what requires a gradient, in place, from where the last run in folder `work` stood. Raises BadInput, BadCorpus, Damaged.

    On a CPU the result is the same bytes however often the run was cut short.
    """
    with threads(recipe.threads), torch.random.fork_rng(), recomputed(model, recipe):
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        chosen_N, validation = _validation(packed, recipe)
        job = Work(model, abilities(model.eval(), min(8, recipe.length // 2)), weights, adamw(weights, recipe), recipe, validation)
        stand = load(work, weights, job.optimizer)
        model.train()
        began, saved, pause, saving = time.monotonic() - stand.seconds, time.monotonic(), EVERY, 0.0
        running = torch.tensor(stand.loss, dtype=torch.float64, device=next(iter(weights.values())).device)
        for step, batch in zip(range(stand.step, recipe.steps), batches(packed, recipe, stand.step, chosen_N)):  # noqa: B905  # one has no end
            if spent(stand, recipe):
                break
            torch.manual_seed((recipe.rng_seed << 32) + step)  # dropout, where a model has it, is a function of the step
            running += passes(model, job.able, batch, recipe, more)
            turn(job.optimizer, recipe, step)
            stand = _record(job, stand._replace(step=step + 1), running, work, time.monotonic() - began, log)
            progress("train", (step + 1) * recipe.batch * recipe.length, recipe.tokens, "tokens")
            if (now := time.monotonic()) - saved >= pause and step + 1 < recipe.steps:
                save(work, stand._replace(loss=running.item(), seconds=now - began), weights, job.optimizer)
                saved = time.monotonic()
                saving, pause = saving + saved - now, max(EVERY, (saved - now) / SHARE)
        model.eval()
        if recipe.patience is not None:
            load_best(work, stand, weights)
        return Trained(stand.curve, time.monotonic() - began, job.able, stand.step, saving)


def passes(model: Any, able: Abilities, batch: Batch, recipe: Recipe, more: Callable[[], Tensor | None] = lambda: None) -> Tensor:
    """Add the gradients of one step's rows, in `recipe.accumulate` passes; the mean loss of its scored tokens, not yet waited for.

    `more` is asked after each pass for a further loss, which is no part of the mean.
    """
    total, whole = scored(batch), torch.zeros((), dtype=torch.float32)
    for part in parts(batch, recipe.accumulate):
        value = value_of(model, able, part) * (scored(part) / max(1, total))
        extra = more()
        (value if extra is None else value + extra * (scored(part) / max(1, total))).backward()
        whole = whole.to(value.device) + value.detach()
    return whole


def value_of(model: Any, able: Abilities, batch: Batch) -> Tensor:
    """The mean loss of a batch, in the precision the device is best at."""
    device = next(model.parameters()).device
    tokens_BL, targets_BL, positions_BL = (torch.from_numpy(part).to(device) for part in batch)
    several = bool((batch.positions_BL[:, -1] != batch.positions_BL.shape[1] - 1).any())  # some row holds more than one document
    with torch.autocast(device.type, torch.bfloat16, enabled=halved(device)):
        return loss(model, able, tokens_BL, targets_BL, positions_BL if several else None)


def turn(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """One step of the optimiser by the gradients that stand, which are then gone."""
    for group in optimizer.param_groups:
        group["lr"] = rate(recipe, step)
    clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], recipe.clip)
    optimizer.step()
    optimizer.zero_grad()


def halved(device: torch.device) -> bool:
    """Whether to multiply in bf16: on GPUs, and on CPUs with matrix units for it (AMX).

    AVX-512's bf16 instructions are faster than fp32 as well (docs/training.md), but not used: predictions and figures here are of fp32.
    """
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cuda" or bool(able.get("amx_bf16"))


# ---- the curve, and when to stop --------------------------------------------------------------------------------


def spent(stand: Stand, recipe: Recipe) -> bool:
    """Whether the last `patience` looks at the validation loss found nothing better."""
    return recipe.patience is not None and stand.waited >= recipe.patience


def _validation(packed: Packed, recipe: Recipe) -> tuple[Any, tuple[Batch, ...]]:
    """The documents to train on (None: all), and batches of the others, few, so that looking at them costs little."""
    if recipe.patience is None:
        return None, ()
    chosen_N, apart_N = apart(packed)
    whole = max(1, int(np.diff(packed.starts, append=len(packed.tokens))[apart_N].sum()) // recipe.length)  # rows there are
    size = min(recipe.batch, whole)
    count = min(whole // size, max(4, recipe.steps // POINTS // 4))
    few = recipe.model_copy(update={"batch": size, "rng_seed": 0})
    return chosen_N, tuple(islice(batches(packed, few, 0, apart_N), count))


@torch.no_grad()
def validate(model: Any, able: Abilities, validation: tuple[Batch, ...]) -> float:
    """Mean loss over the scored tokens of these batches. The model is in training mode before and after."""
    model.eval()
    total = sum(value_of(model, able, batch).double().item() * scored(batch) for batch in validation)
    model.train()
    return total / max(1, sum(map(scored, validation)))


def _record(job: Work, stand: Stand, running: Tensor, work: Path, seconds: float, log: Callable[..., None]) -> Stand:
    """About POINTS times per run add the mean loss to the curve, and to the log, and look at the validation loss. Raises BadInput."""
    recipe, done = job.recipe, stand.step
    if done % max(1, recipe.steps // POINTS) and done < recipe.steps:
        return stand
    mean = running.item() / (done - (stand.curve[-1].step if stand.curve else 0))
    if not math.isfinite(mean):
        raise BadInput(
            f"the loss became {mean} before step {done}: the learning rate {recipe.learning_rate:g} is too high here, try a third of it"
        )
    running.zero_()
    seen = validate(job.model, job.able, job.validation) if job.validation else None
    point = Point(step=done, tokens=done * recipe.batch * recipe.length, loss=mean, validation=seen)
    log(event="point", **point.model_dump(exclude_none=True), rate=rate(recipe, done - 1), elapsed=round(seconds, 3))
    stand = stand._replace(loss=0.0, curve=(*stand.curve, point))
    if seen is None:
        return stand
    if stand.best_loss is not None and seen >= stand.best_loss:
        return stand._replace(waited=stand.waited + 1)
    stand = stand._replace(best=done, best_loss=seen, waited=0)
    keep_best(work, stand, job.weights)
    return stand


# ---- what it is made of -----------------------------------------------------------------------------------------


def adamw(weights: dict[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms and biases do not decay. With moments of 8 bits in blocks if asked (arXiv:2110.02861). Raises MissingExtra."""
    decayed = [weight for weight in weights.values() if weight.ndim >= 2]
    others = [weight for weight in weights.values() if weight.ndim < 2]
    groups = [
        group
        for group in ({"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0})
        if group["params"]
    ]
    betas = (recipe.beta1, recipe.beta2)
    if recipe.optimiser == "adamw8bit":
        return require("bitsandbytes", "qlora").optim.AdamW8bit(groups, lr=recipe.learning_rate, betas=betas)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, fused=True)


@contextmanager
def recomputed(model: Any, recipe: Recipe) -> Iterator[None]:
    """Keep no activations inside the layers, if the recipe says so: the backward pass computes them again (arXiv:1604.06174)."""
    if not recipe.checkpointing:
        yield
        return
    within, name = bare(model), "activation_checkpointing"
    if not hasattr(within, f"{name}_enable"):
        name = "gradient_checkpointing"  # before transformers 5.23
    getattr(within, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(within, f"{name}_disable")()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads: float sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
