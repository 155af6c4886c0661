"""The training loop: the same for a seed from scratch, a full expert and an adapter. It trains the weights that require a gradient.

The pieces of `run` can be used alone, to train in another order: `add_gradients` (rows -> gradients), `update_weights` (gradients ->
weights), `adamw`, `checkpoint.save` and `checkpoint.load`, `data.batches`, `rate`, `loss.loss`.

B rows of a batch, L tokens of a row
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from elmwood.corpus.tokens import Packed
from elmwood.engine import LEVEL, Progress, silent
from elmwood.errors import BadInput
from elmwood.records import Point, Recipe
from elmwood.records.models import DECAY
from elmwood.registry import require
from elmwood.train.card.attention import find_cuts
from elmwood.train.card.compiled import layers_of
from elmwood.train.card.path import fast_path
from elmwood.train.card.peak import find_share
from elmwood.train.card.precision import autocast, uses_bf16
from elmwood.train.card.processes import ALONE, CHECK, Group, Spread, spread_over
from elmwood.train.checkpoint import Position, keep_best, load, load_best, save
from elmwood.train.data import Batch, batches, count_scored, split_batch, split_validation
from elmwood.train.loss import Abilities, base_model, loss

POINTS = 50  # of a training curve; the validation loss is computed as often
EVERY = 5.0  # seconds between two checkpoints; more if saving is slow:
SHARE = 0.01  # at most this share of the time is spent saving


Stream = Callable[[int], Iterator[Batch]]  # a step -> the batches from there on


class Trained(NamedTuple):
    """The result of a finished run, beside the weights it changed in place."""

    curve: tuple[Point, ...]
    seconds: float
    able: Abilities
    steps: int  # done; fewer than in the recipe if it stopped early
    place: str  # the device
    saving: float = 0.0  # seconds that this process spent writing checkpoints
    model: Any = None  # the trained one; None on all processes but the first, where the weights were divided among them


class Run(NamedTuple):
    """What every step of a run needs."""

    model: Any
    able: Abilities
    weights: dict[str, Tensor]  # the trained ones
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    validation: tuple[Batch, ...]  # empty if the recipe has no patience
    share: float | None  # of a second of the device's peak that a token takes
    spread: Spread


def run(
    model: Any, packed: Packed | Stream, recipe: Recipe, work: Path, log: Callable[..., None], progress: Progress = silent,
    more: Callable[[], Tensor | None] = lambda: None, *, group: Group = ALONE, keep: Callable[[Any, Position], None] | None = None,
    keep_every: int | None = None,
) -> Trained:  # fmt: skip
    """Train the weights that require a gradient, in place. Raises BadInput, BadCorpus, Damaged.

    An interrupted run resumes from the checkpoint in folder `work`; on a CPU the result is bit-identical. `packed` may be a function from
    a step to the batches from there on. `group`: the processes that call this together, each with its own copy of the model. `keep` is
    called with the model after every `keep_every` steps but the last, in the first process.
    """
    with use_threads(recipe.threads), torch.random.fork_rng(), recompute_activations(model, recipe), fast_path(model, recipe) as able:
        stream, validation = _open_text(packed, recipe, group)
        device = next(model.parameters()).device
        share = find_share(base_model(model), recipe.length, torch.bfloat16 if uses_bf16(device) else torch.float32)
        share = share and share / group.size
        spread = spread_over(group, model, lambda model, *rows: loss(model, able, *rows))
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        job = Run(model, able, weights, adamw(weights, recipe), recipe, validation, share, spread)
        position = load(work, weights, job.optimizer)
        group.wait()  # nobody writes before all have read
        model.train()
        began, saved, pause, saving = time.monotonic() - position.seconds, time.monotonic(), EVERY, 0.0
        place = next(iter(weights.values())).device
        running = torch.tensor(position.loss if group.first else 0.0, dtype=torch.float64, device=place)
        for step, batch in zip(range(position.step, recipe.steps), stream(position.step)):  # noqa: B905  # one has no end
            if out_of_patience(position, recipe):
                break
            # dropout, where a model has it, is a function of the step and the process
            torch.manual_seed((recipe.rng_seed << 32) + step * group.size + group.rank)
            running += add_gradients(model, job.able, batch, recipe, more, spread)
            update_weights(job.optimizer, recipe, step)
            position = _record(job, position._replace(step=step + 1), running, work, time.monotonic() - began, log, progress)
            progress(f"train on {place}", (step + 1) * recipe.batch * recipe.length, recipe.tokens, "tokens")
            if keep and keep_every and (step + 1) % keep_every == 0 and step + 1 < recipe.steps:
                whole = spread.gather(weights)
                if group.first:
                    keep(whole, position)
            if step + 1 < recipe.steps and _is_due(time.monotonic() - saved >= pause, step, group):
                now = time.monotonic()
                save(work, position._replace(loss=group.sum(running).item(), seconds=now - began), weights, job.optimizer, group.first)
                saved = time.monotonic()
                saving, pause = saving + saved - now, max(EVERY, (saved - now) / SHARE)
        model.eval()
        if recipe.patience is not None:
            load_best(work, position, weights)
        whole = spread.gather(weights)
        return Trained(position.curve, time.monotonic() - began, job.able, position.step, str(place), saving, whole)


def _is_due(due: bool, step: int, group: Group) -> bool:
    """Whether to write a checkpoint: by the first process's clock, which several processes ask every few steps."""
    return due if group.size == 1 else (step + 1) % CHECK == 0 and bool(group.tell(due))


def add_gradients(
    model: Any, able: Abilities, batch: Batch, recipe: Recipe, more: Callable[[], Tensor | None] = lambda: None,
    spread: Spread | None = None,
) -> Tensor:  # fmt: skip
    """Add the gradients of one step's rows, in `recipe.accumulate` passes; return the mean loss of its scored tokens, still on the device.

    `more` is called after each pass for a further loss, which is not part of the mean. Of a group each process takes its share of the
    rows, and returns what these add to the mean; the gradients become those of all.
    """
    total, parts, group = max(1, count_scored(batch)), [], spread.group if spread else ALONE
    own = batch if group.size == 1 else next(islice(split_batch(batch, group.size), group.rank, None))
    for part in split_batch(own, recipe.accumulate):
        share = count_scored(part) / total
        value = batch_loss(model, able, part, spread and spread.score) * share
        extra = more()
        loss_of_all = value if extra is None else value + extra * share
        (loss_of_all if group.size == 1 else loss_of_all * group.size).backward()  # DDP and FSDP2 take the mean of their processes
        parts.append(value.detach())
    return sum(parts[1:], start=parts[0])


def batch_loss(model: Any, able: Abilities, batch: Batch, score: Callable[..., Tensor] | None = None) -> Tensor:
    """The mean loss of a batch, in the precision that suits the device. `score` computes it instead of the model's own pass."""
    device = next(model.parameters()).device
    tokens_BL, targets_BL, positions_BL = (send(part, device) for part in batch)
    several = bool((batch.positions_BL[:, -1] != batch.positions_BL.shape[1] - 1).any())  # some row holds more than one document
    cut_S = send(find_cuts(batch.positions_BL), device) if several and able.packed == "documents" else None
    rows = tokens_BL, targets_BL, positions_BL if several else None, cut_S
    with autocast(model, device):
        return score(*rows) if score else loss(model, able, *rows)


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device. CUDA copies it beside its work, which pageable memory would have it finish first."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and type(tensor) is Tensor:  # a pretended one has no memory
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def update_weights(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Take one step of the optimiser, and clear the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate(recipe, step)
    clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], recipe.clip)
    optimizer.step()
    optimizer.zero_grad()


# ---- the curve, and when to stop --------------------------------------------------------------------------------


def out_of_patience(position: Position, recipe: Recipe) -> bool:
    """Whether the last `patience` validation losses were no better than the best."""
    return recipe.patience is not None and position.waited >= recipe.patience


def _open_text(packed: "Packed | Stream", recipe: Recipe, group: Group) -> tuple[Stream, tuple[Batch, ...]]:
    """The batches from a step on; and a few of documents that are set aside, if the recipe has patience. Raises BadInput, BadCorpus."""
    if group.size > recipe.batch:
        raise BadInput(f"--batch {recipe.batch}: each of {group.size} processes takes rows of every batch; choose --batch {group.size}")
    if recipe.patience is None:
        return partial(batches, packed, recipe) if isinstance(packed, Packed) else packed, ()
    if group.size > 1 or not isinstance(packed, Packed):
        raise BadInput("--patience is of one process: leave it out, or do not start several")
    chosen_N, apart_N = split_validation(packed)
    whole = max(1, int(np.diff(packed.starts, append=len(packed.tokens))[apart_N].sum()) // recipe.length)  # number of rows
    size = min(recipe.batch, whole)
    count = min(whole // size, max(4, recipe.steps // POINTS // 4))
    few = recipe.model_copy(update={"batch": size, "rng_seed": 0})
    return partial(batches, packed, recipe, chosen_N=chosen_N), tuple(islice(batches(packed, few, 0, apart_N), count))


@torch.no_grad()
def validate(model: Any, able: Abilities, validation: tuple[Batch, ...]) -> float:
    """Mean loss over the scored tokens of these batches. The model is in training mode before and after."""
    model.eval()
    total = sum(batch_loss(model, able, batch).double().item() * count_scored(batch) for batch in validation)
    model.train()
    return total / max(1, sum(map(count_scored, validation)))


def _record(
    job: Run, position: Position, running: Tensor, work: Path, seconds: float, log: Callable[..., None], progress: Progress
) -> Position:
    """About POINTS times per run: add the mean loss to the curve and the log, and compute the validation loss. Raises BadInput."""
    recipe, done = job.recipe, position.step
    if done % max(1, recipe.steps // POINTS) and done < recipe.steps:
        return position
    mean = job.spread.group.sum(running).item() / (done - (position.curve[-1].step if position.curve else 0))
    if not math.isfinite(mean):
        raise BadInput(
            f"the loss became {mean} before step {done}: the learning rate {recipe.learning_rate:g} is too high here, try a third of it"
        )
    running.zero_()
    seen = validate(job.model, job.able, job.validation) if job.validation else None
    point = Point(step=done, tokens=done * recipe.batch * recipe.length, loss=mean, validation=seen)
    used = {} if job.share is None else {"mfu": round(point.tokens / seconds * job.share, 3)}
    log(event="point", **point.model_dump(exclude_none=True), rate=rate(recipe, done - 1), elapsed=round(seconds, 3), **used)
    if used:
        progress("MFU", 100 * used["mfu"], 100, LEVEL)
    position = position._replace(loss=0.0, curve=(*position.curve, point))
    if seen is None:
        return position
    if position.best_loss is not None and seen >= position.best_loss:
        return position._replace(waited=position.waited + 1)
    position = position._replace(best=done, best_loss=seen, waited=0)
    keep_best(work, position, job.weights)
    return position


# ---- the optimiser ----------------------------------------------------------------------------------------------


def adamw(weights: dict[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms and biases do not decay. `adamw8bit` keeps its moments in 8 bits, in blocks (arXiv:2110.02861). Raises MissingExtra."""
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


# ---- learning rates as functions of the step ---------------------------------------------------------------------


def cosine(done: float) -> float:
    """Half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """A line from 1 to 0."""
    return 1 - done


def constant(done: float) -> float:
    """1 throughout."""
    return 1.0


def wsd(done: float) -> float:
    """Warm up, stay, decay: flat, then down to nothing in the last fifth."""
    return min(1.0, (1 - done) / DECAY)


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate of step 0 ≤ step < recipe.steps: a linear warm-up from one share to the peak, then from the peak to `final` of it."""
    warm = math.ceil(recipe.warmup * recipe.steps)
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    done = (step - warm + 1) / max(1, recipe.steps - warm)  # 1 at the last step
    height = SCHEDULES[recipe.schedule](done)
    floor = 1.0 if recipe.schedule == "constant" else recipe.final
    return recipe.learning_rate * (floor + (1 - floor) * height)


# ---- how a pass is computed -------------------------------------------------------------------------------------


@contextmanager
def recompute_activations(model: Any, recipe: Recipe) -> Iterator[None]:
    """Keep no activations inside the layers, if the recipe says so; the backward pass recomputes them (arXiv:1604.06174)."""
    if not recipe.checkpointing:
        yield
        return
    within, name = base_model(model), "activation_checkpointing"
    if not hasattr(within, f"{name}_enable"):
        name = "gradient_checkpointing"  # before transformers 5.23
    getattr(within, f"{name}_enable")({"use_reentrant": False})
    layers = layers_of(within)
    for layer in layers[math.ceil(recipe.checkpointed * len(layers)) :]:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        getattr(within, f"{name}_disable")()


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads; float sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
