"""Adapters in numbered slots over one base model: each token of a pass may use any slot, and an adapter is there once for all its users.

Shapes: S slots, P numbers of one adapter, N tokens of a pass; per layer I inputs, O outputs, R rank

An adapter is one flat record of numbers: for each layer A [R, I], then its scale times Bᵀ [R, O], which products of one row read in order
(1.2 to 2.2 times as fast as B [O, R]; docs/log/serving.md). The tokens of a pass come in the order of their slots: first runs of tokens
that use consecutive slots, one each, then spans of tokens that share one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from elmwood.errors import BadInput
from elmwood.lm.adapters.lora import Adapter, Layer, head_of, product, shapes
from elmwood.lm.adapters.lora import wrap as wrap_plain
from elmwood.lm.adapters.peft_config import read_settings, scale


class Run(NamedTuple):
    """Tokens first, first + 1, ... use slots low, low + 1, ... below high."""

    low: int
    high: int
    first: int


class Span(NamedTuple):
    """Tokens first ... last - 1 use one slot."""

    slot: int
    first: int
    last: int


class Plan(NamedTuple):
    """Which tokens of a pass use which slots; those it does not name use the base alone."""

    tokens: int
    runs: tuple[Run, ...] = ()
    spans: tuple[Span, ...] = ()


class Slotted(nn.Module):
    """A linear layer with an adapter in each slot."""

    def __init__(self, base: nn.Module, flat_SP: Tensor, layer: Layer):
        super().__init__()
        self.base, self.place = base, (layer.start, layer.rank, layer.inputs, layer.outputs)
        self.a_SRI, self.b_SRO = halves(flat_SP, layer)
        self.plan = Plan(0)
        self.views: list[tuple[bool, slice, Tensor, Tensor]] = []

    def follow(self, plan: Plan) -> None:
        self.plan = plan
        self.views = [
            (True, slice(first, first + high - low), self.a_SRI[low:high].mT, self.b_SRO[low:high]) for low, high, first in plan.runs
        ]
        self.views += [(False, slice(first, last), self.a_SRI[slot].T, self.b_SRO[slot]) for slot, first, last in plan.spans]

    def forward(self, x: Tensor) -> Tensor:
        y = product(self.base, x)
        if not self.views:
            return y
        x_NI, y_NO = x.reshape(-1, x.shape[-1]), y.contiguous().view(-1, y.shape[-1])
        if len(x_NI) != self.plan.tokens:
            raise ValueError(f"a layer with adapters sees {len(x_NI)} of {self.plan.tokens} tokens: this model is not read row by row")
        self.add(x_NI, y_NO)
        return y_NO.view(y.shape)

    def add(self, x_NI: Tensor, y_NO: Tensor) -> None:
        """Add to the outputs of the base what the adapters make of its inputs."""
        for single, tokens, a, b in self.views:
            if single:
                y_NO[tokens, None].baddbmm_(torch.bmm(x_NI[tokens, None], a), b)
            else:
                y_NO[tokens].addmm_(torch.mm(x_NI[tokens], a), b)


class Slots:
    """Slots over `model`, whose linear layers it wraps."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], count: int):
        weight = next(model.parameters())
        self.layers, self.count = tuple(layers), count
        self.numbers = sum(layer.numbers for layer in layers)
        self.flat_SP = torch.zeros(count, self.numbers, dtype=weight.dtype, device=weight.device)
        self.modules = []
        for layer in self.layers:
            parent, _, leaf = layer.name.rpartition(".")
            module = Slotted(model.get_submodule(layer.name), self.flat_SP, layer)
            setattr(model.get_submodule(parent), leaf, module)
            self.modules.append(module)
        if head := head_of(model):
            wrap_plain(model, head)  # for `product`: it is the widest layer
        self.plan = Plan(0)
        self.slot_N = np.zeros(0, np.int64)  # of each token of the plan; -1: none

    def fill(self, slot: int, flat_P: Tensor) -> None:
        """Copy an adapter into a slot."""
        self.flat_SP[slot].copy_(flat_P, non_blocking=True)

    def follow(self, plan: Plan) -> None:
        """Let the tokens of the next passes use these slots."""
        if plan != self.plan:
            for module in self.modules:
                module.follow(plan)
            self.plan, self.slot_N = plan, np.full(plan.tokens, -1, np.int64)
            for low, high, first in plan.runs:
                self.slot_N[first : first + high - low] = np.arange(low, high)
            for slot, first, last in plan.spans:
                self.slot_N[first:last] = slot


def halves(flat_SP: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """A [S, R, I] and Bᵀ [S, R, O] of one layer, as views of flat adapters."""
    middle = layer.start + layer.inputs * layer.rank
    a_SRI = flat_SP[:, layer.start : middle].unflatten(1, (layer.rank, layer.inputs))
    return a_SRI, flat_SP[:, middle : layer.start + layer.numbers].unflatten(1, (layer.rank, layer.outputs))


def read_record(adapter: Adapter, layers: Sequence[Layer], flat_P: Tensor) -> None:
    """Read one adapter. Every tensor of its file is used, or it is refused: raises BadInput where it is incomplete, of another base model,
    of a larger rank than the layers', not finite, or adds nothing to the base."""
    settings, known = read_settings(adapter.config), {layer.name: layer for layer in layers}
    for name, (rank, inputs, outputs) in shapes(adapter).items():
        layer = known.get(name)
        if layer is None or (layer.inputs, layer.outputs) != (inputs, outputs) or rank > layer.rank:
            room = "has no such layer" if layer is None else f"{layer.inputs} -> {layer.outputs} at most at rank {layer.rank}"
            raise BadInput(f"{adapter.weights}: {name} maps {inputs} -> {outputs} at rank {rank}, the base {room}: it belongs to another")
    acts = False
    with safe_open(adapter.weights, "pt") as file:
        present = set(file.keys())
        for layer in layers:
            a_SRI, b_SRO = halves(flat_P.unsqueeze(0), layer)
            key, rank = f"base_model.model.{layer.name}.lora_", 0
            if f"{key}A.weight" in present:
                a_RI, b_OR = file.get_tensor(f"{key}A.weight"), file.get_tensor(f"{key}B.weight")
                rank = a_RI.shape[0]
                a_SRI[0, :rank] = a_RI
                torch.mul(b_OR.T, scale(settings, layer.name, rank), out=b_SRO[0, :rank])
                acts = acts or bool(a_RI.any() and b_OR.any())
            if rank < layer.rank:
                a_SRI[:, rank:] = b_SRO[:, rank:] = 0
    if not torch.isfinite(flat_P.sum()):
        raise BadInput(f"{adapter.weights} contains NaN or Inf; training diverged: train it again at a lower learning rate")
    if not acts:
        raise BadInput(f"{adapter.weights} adds nothing to its base: it was never trained, or is not what was trained")
