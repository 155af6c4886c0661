"""Train several adapters at once on one frozen base: a pass holds the rows of all experts, and the base multiplies them together.

E experts, B rows of each, L tokens of a row, N = B·L positions of each, R rank, P numbers of one adapter; I and O: inputs and outputs
of a linear layer. Rows are ordered by expert.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from elmwood.corpus.tokens import Packed, pack
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.lm.adapters.peft_import import LoraLayer
from elmwood.lm.files import tokenizer
from elmwood.records import Digest, Expert, Point, Recipe, Seed, Shard
from elmwood.store import Store
from elmwood.train import checkpoint, loop
from elmwood.train.card.attention import find_cuts
from elmwood.train.card.path import fast_path
from elmwood.train.card.precision import autocast
from elmwood.train.data import UNSCORED, Batch, batches, count_scored
from elmwood.train.loop import rate
from elmwood.train.loss import Abilities, ChunkedLoss, model_inputs
from elmwood.train.task_names import together_keys
from elmwood.train.tasks import check_length, finish, open_log, open_trainable, said_by, store_trained

FILE = "together.safetensors"


# ---- the adapters -----------------------------------------------------------------------------------------------


class StackedLayer(NamedTuple):
    """The adapters of one linear layer, whose gradients are set: views of flat memory."""

    base: nn.Module
    scale: float
    a_ERI: Tensor
    b_EOR: Tensor
    flat_EP: Tensor


class Stack:
    """E copies of a PEFT model's adapter as one flat matrix; the layers of the model become views of it."""

    def __init__(self, model: Any, experts: int):
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        self.weights = [model.get_parameter(name) for name in names]
        self.flat_EP = nn.Parameter(torch.cat([weight.detach().flatten() for weight in self.weights]).repeat(experts, 1))
        self.flat_EP.grad = torch.zeros_like(self.flat_EP)
        places = dict(zip(names, zip(self._views(self.flat_EP.detach()), self._views(self.flat_EP.grad), strict=True), strict=True))
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
                a, b = (_leaf(*places[f"{name}.lora_{half}.default.weight"]) for half in "AB")
                kept: Any = module
                kept.stacked = StackedLayer(module.base_layer, module.scaling["default"], a, b, self.flat_EP)
                kept.__class__ = _stacked(type(module))

    def _views(self, flat_EP: Tensor) -> list[Tensor]:
        """Each weight, of all experts [E, …]."""
        parts = flat_EP.split([weight.numel() for weight in self.weights], 1)
        return [part.unflatten(1, weight.shape) for part, weight in zip(parts, self.weights, strict=True)]

    @torch.no_grad()
    def put(self, expert: int) -> None:
        """Copy one expert's parameters into the PEFT model, which can then be saved."""
        for weight, view in zip(self.weights, self._views(self.flat_EP.detach()), strict=True):
            weight.copy_(view[expert])


def _leaf(view: Tensor, grad: Tensor) -> Tensor:
    """A tensor whose gradient is added into another."""
    leaf = view.detach().requires_grad_()
    leaf.grad = grad
    return leaf


@cache
def _stacked(kind: type) -> Any:
    """A class of PEFT's with the forward pass of a stack; a class, for a compiler takes each function of an object for another program."""
    return type(kind.__name__, (kind,), {"forward": _forward})


def _forward(module: Any, x: Tensor) -> Tensor:
    layer = module.stacked
    if torch.compiler.is_compiling():  # which fuses what the function below does by hand
        a_ERI, b_EOR = layer.a_ERI.to(x.dtype), layer.b_EOR.to(x.dtype)
        low_ENR = (x.reshape(len(a_ERI), -1, x.shape[-1]) @ a_ERI.mT) * layer.scale
        return layer.base(x) + (low_ENR @ b_EOR.mT).view(*x.shape[:-1], -1)
    if type(layer.base) is nn.Linear:
        return StackedFunction.apply(x, layer.flat_EP, layer.base.weight, layer.base.bias, layer).view(*x.shape[:-1], -1)
    # a quantised base, or a transposed one
    return layer.base(x) + StackedFunction.apply(x, layer.flat_EP, None, None, layer).view(*x.shape[:-1], -1)


class StackedFunction(torch.autograd.Function):
    """x Wᵀ + bias, one product for all rows, + scale · x Aᵀ Bᵀ with the A and B of each row's expert.

    Gradients of A and B are added into `layer`; flat_EP is an argument only so that autograd calls the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat_EP: Tensor, weight_OI: Tensor | None, bias_O: Tensor | None, layer: StackedLayer) -> Tensor:  # type: ignore[override]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            a_ERI, b_EOR = layer.a_ERI.to(dtype), layer.b_EOR.to(dtype)
            x_ENI = x.to(dtype).reshape(len(a_ERI), -1, x.shape[-1])
            low_ENR = (x_ENI @ a_ERI.mT).mul_(layer.scale)
            if weight_OI is None:
                y_NO = (low_ENR @ b_EOR.mT).flatten(0, 1)
            else:
                weight_OI, bias_O = weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype)
                y_NO = nn.functional.linear(x_ENI.flatten(0, 1), weight_OI, bias_O)
                y_NO.unflatten(0, x_ENI.shape[:2]).baddbmm_(low_ENR, b_EOR.mT)
        ctx.save_for_backward(x_ENI, weight_OI, a_ERI, b_EOR, low_ENR)
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return y_NO

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override]
        x_ENI, weight_OI, a_ERI, b_EOR, low_ENR = ctx.saved_tensors
        grad_ENO = grad.to(low_ENR.dtype).reshape(len(a_ERI), -1, grad.shape[-1])
        low_grad_ENR = (grad_ENO @ b_EOR).mul_(ctx.layer.scale)
        ctx.layer.a_ERI.grad.add_(low_grad_ENR.mT @ x_ENI)
        ctx.layer.b_EOR.grad.add_(grad_ENO.mT @ low_ENR)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        if weight_OI is None:
            grad_x = low_grad_ENR @ a_ERI
        else:
            grad_x = (grad_ENO.flatten(0, 1) @ weight_OI).view(x_ENI.shape).baddbmm_(low_grad_ENR, a_ERI)
        return grad_x.view(ctx.shape).to(ctx.dtype), None, None, None, None


def expert_losses(
    model: Any,
    able: Abilities,
    tokens_BL: Tensor,
    targets_BL: Tensor,
    positions_BL: Tensor | None,
    experts: int,
    cut_S: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy [E] of each expert over the scored targets of its own rows. positions_BL None: every row is one document."""
    model, kind = model.get_base_model(), tokens_BL.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    given = model_inputs(able.packed, tokens_BL, positions_BL, dtype, cut_S)
    target_EN = targets_BL.view(experts, -1)
    if not able.chunked:
        logit_ENV = model(**given).logits.float().unflatten(0, (experts, -1)).flatten(1, 2)
        summed = [cross_entropy(*pair, ignore_index=UNSCORED, reduction="sum") for pair in zip(logit_ENV, target_EN, strict=True)]
        return torch.stack(summed) / (target_EN != UNSCORED).sum(1).clamp(min=1)
    hidden_BLD = model.base_model(**given)[0]
    return ChunkedLoss.apply(hidden_BLD.flatten(0, 1), model.get_output_embeddings().weight, targets_BL.flatten(), experts)


# ---- the loop ---------------------------------------------------------------------------------------------------


class GroupPosition(NamedTuple):
    """Everything beside tensors that the next step depends on, and the clock."""

    step: int = 0  # steps done
    losses: tuple[float, ...] = ()  # per expert: sum since the last point of its curve, nats per token
    curves: tuple[tuple[Point, ...], ...] = ()
    seconds: float = 0.0


def run(
    model: Any, packed: Sequence[Packed], recipe: Recipe, work: Path, log: Callable[..., None], progress: Progress = silent
) -> tuple[Stack, list[loop.Trained]]:
    """Train a copy of a PEFT model's adapter on each text, all at once. Raises BadInput, Damaged.

    `log(expert, …)` gets the points of the curves. Each expert's seconds are its share. An interrupted run resumes from the checkpoint in
    `work`; on a CPU the result is bit-identical.
    """
    recipe = recipe.model_copy(update={"together": len(packed)})
    with (
        loop.use_threads(recipe.threads),
        torch.random.fork_rng(),
        loop.recompute_activations(model, recipe),
        fast_path(model, recipe) as able,
    ):
        stack = Stack(model, len(packed))
        weights: dict[str, Tensor] = {"flat": stack.flat_EP}
        optimizer = loop.adamw(weights, recipe)
        position = checkpoint.read(work / FILE, _from_plain, weights, optimizer) or GroupPosition()
        model.train()
        clock, last, pause, saving = time.monotonic() - position.seconds, time.monotonic(), loop.EVERY, 0.0
        place = stack.flat_EP.device
        running_E = torch.tensor(position.losses or [0.0] * len(packed), dtype=torch.float64, device=place)
        given = zip(*(batches(one, recipe, position.step) for one in packed), strict=True)
        for step, parts in zip(range(position.step, recipe.steps), given):  # noqa: B905  # one has no end
            torch.manual_seed((recipe.rng_seed << 32) + step)
            running_E += _step(model, able, stack, parts, optimizer, recipe, step)
            position = _record(position, step + 1, running_E, recipe, time.monotonic() - clock, log)
            progress(f"train on {place}", (step + 1) * recipe.batch * recipe.length, recipe.tokens, "tokens")
            if (now := time.monotonic()) - last >= pause and step + 1 < recipe.steps:
                here = position._replace(losses=tuple(running_E.tolist()), seconds=now - clock)
                checkpoint.write(work / FILE, _to_plain(here), weights, optimizer)
                last = time.monotonic()
                saving, pause = saving + last - now, max(loop.EVERY, (last - now) / loop.SHARE)
        model.eval()
        share = (time.monotonic() - clock) / len(packed)  # per expert
        return stack, [loop.Trained(curve, share, able, position.step, str(place), saving / len(packed)) for curve in position.curves]


def _step(
    model: Any, able: Abilities, stack: Stack, parts: Sequence[Batch], optimizer: torch.optim.Optimizer, recipe: Recipe, step: int
) -> Tensor:
    """One optimiser step of all experts; their losses [E], still on the device."""
    flat_EP = stack.flat_EP
    scored_E = loop.send(np.array([max(1, count_scored(part)) for part in parts]), flat_EP.device)
    flat_EP.grad.zero_()  # type: ignore[union-attr]
    loss_E = torch.zeros(len(parts), device=flat_EP.device)
    several = any((part.positions_BL[:, -1] != recipe.length - 1).any() for part in parts)
    for piece in _passes(parts, recipe.accumulate):
        tokens_BL, targets_BL, positions_BL = (loop.send(part, flat_EP.device) for part in piece)
        cut_S = loop.send(find_cuts(piece.positions_BL), flat_EP.device) if several and able.packed == "documents" else None
        with autocast(model, flat_EP.device):
            part_E = expert_losses(model, able, tokens_BL, targets_BL, positions_BL if several else None, len(parts), cut_S)
        if recipe.accumulate > 1:
            part_E = part_E * (targets_BL.view(len(parts), -1) != UNSCORED).sum(1) / scored_E
        part_E.sum().backward()
        loss_E += part_E.detach()
    for group in optimizer.param_groups:
        group["lr"] = rate(recipe, step)
    norm_E1 = torch.linalg.vector_norm(flat_EP.grad, dim=1, keepdim=True)
    flat_EP.grad.mul_((recipe.clip / (norm_E1 + 1e-6)).clamp(max=1))  # type: ignore[union-attr]  # each expert on its own
    optimizer.step()
    return loss_E


def _passes(parts: Sequence[Batch], count: int) -> Iterator[Batch]:
    """The rows of a step in `count` passes; each has its share of every expert's rows."""
    kinds_EBL = [np.stack(kind) for kind in zip(*parts, strict=True)]
    for pieces in zip(*(np.array_split(kind, min(count, kind.shape[1]), axis=1) for kind in kinds_EBL), strict=True):
        yield Batch(*(piece.reshape(-1, piece.shape[-1]) for piece in pieces))


def _record(
    position: GroupPosition, done: int, running_E: Tensor, recipe: Recipe, seconds: float, log: Callable[..., None]
) -> GroupPosition:
    """Count the step; about POINTS times per run, add the mean losses to the curves and logs. Raises BadInput."""
    every = max(1, recipe.steps // loop.POINTS)
    if done % every and done < recipe.steps:
        return position._replace(step=done)
    curves = position.curves or ((),) * len(running_E)
    means = (running_E / (done - (curves[0][-1].step if curves[0] else 0))).tolist()
    if not all(map(math.isfinite, means)):
        raise BadInput(
            f"a loss became infinite before step {done}: the learning rate {recipe.learning_rate:g} is too high here, try a third"
        )
    running_E.zero_()
    points = [Point(step=done, tokens=done * recipe.batch * recipe.length, loss=mean) for mean in means]
    for expert, point in enumerate(points):
        log(expert, event="point", **point.model_dump(), rate=rate(recipe, done - 1), elapsed=round(seconds, 3))
    return position._replace(step=done, losses=(), curves=tuple((*curve, point) for curve, point in zip(curves, points, strict=True)))


def _to_plain(position: GroupPosition) -> dict[str, Any]:
    return position._asdict() | {"curves": [[point.model_dump() for point in curve] for curve in position.curves]}


def _from_plain(plain: dict[str, Any]) -> GroupPosition:
    return GroupPosition(**plain | {"losses": tuple(plain["losses"]), "curves": tuple(map(checkpoint.parse_curve, plain["curves"]))})


# ---- the task ---------------------------------------------------------------------------------------------------


def train_together(
    seed: Seed, data: Sequence[Sequence[Shard]], recipe: Recipe, store: Store, *, partition: Digest | None = None,
    domains: Sequence[int | None] = (), device: torch.device | str | None = None, progress: Progress = silent,
    report_to: Sequence[str] = (),
) -> list[Expert]:  # fmt: skip
    """Branch the seed once for each list of shards, and train all branches at once over one copy of it, by the same recipe.

    Done once per inputs; interrupted runs resume. Each expert equals what `train` makes of the same batches, up to the rounding of
    sums. `report_to` as in `train`. Raises BadInput, BadCorpus, MissingExtra.
    """
    _check(recipe, seed)
    domains = domains or [None] * len(data)
    recipe = recipe.model_copy(update={"together": len(data)})
    keys = together_keys(seed, data, recipe, partition, domains)
    with store.held(keys[0], progress) as work:
        if all(done := [store.done(key) for key in keys]):
            return [store.load(digest, Expert) for digest in done if digest]
        words = tokenizer(seed, store)
        packed = [pack(shards, words, seed.separator, store, progress) for shards in data]
        model = open_trainable(seed, recipe, store, device, progress)
        with ExitStack() as trackers:
            logs = [
                trackers.enter_context(open_log(store, seed, key, recipe, domain, report_to))
                for key, domain in zip(keys, domains, strict=True)
            ]
            stack, trained = run(model, packed, recipe, work, lambda expert, **facts: logs[expert](**facts), progress)
        experts, said = [], said_by(model, recipe, seed, len(keys))
        for place in reversed(range(len(keys))):  # the first one last: the unfinished work has its name
            stack.put(place)
            expert = Expert(
                seed=seed.digest, partition=partition, domain=domains[place], data=tuple(shard.blob for shard in data[place]),
                recipe=recipe, files=store_trained(model, words, recipe, store), curve=trained[place].curve, probe=said[place],
            )  # fmt: skip
            finish(store, keys[place], expert, recipe, trained[place], together=len(keys))
            experts.append(expert)
        return experts[::-1]


def _check(recipe: Recipe, seed: Seed) -> None:
    check_length(recipe, seed.context)
    if recipe.method not in ("lora", "qlora"):
        raise BadInput(f"--together trains plain adapters only, not --method {recipe.method}: choose lora or qlora, or train alone")
    if recipe.patience is not None:
        raise BadInput("experts trained together end together, so none can stop early: leave out --patience or --together")
    if recipe.optimiser != "adamw":
        raise BadInput(f"--together has one optimiser, adamw, not --optimiser {recipe.optimiser}: leave out one of the two")
