"""A bank of LoRA adapters over one base model: any row of a batch may use any adapter, in one pass over the base weights.

Shapes: S slots (rows of a batch, or groups of them), P numbers in one adapter; per layer I inputs, O outputs, R rank;
T tokens.

An adapter is one flat row of numbers: for each layer A [R, I], then B [O, R] times its scale. So adding
one is filling a row, and giving a slot another adapter is one copy, whatever the number of layers. Adapters of smaller
rank, or without some layer, have zeros there. (PEFT loops over the adapters of a mixed batch, and adding its n-th costs
time in proportion to n.)
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from elmwood.errors import BadInput
from elmwood.lm.adapters.peft_config import check_floats, read_settings, scale, split_key
from elmwood.lm.products import is_mkls_own, linear
from elmwood.records import Expert, Merged, Mixture
from elmwood.store import Store
from elmwood.store.headers import read_header

MEMORY = 2 << 30  # bytes of adapters that have been used and may be again


class Adapter(NamedTuple):
    """The two files of a PEFT adapter folder."""

    config: Path
    weights: Path


class Layer(NamedTuple):
    """A linear layer that some adapter changes, and the place of its numbers in a flat adapter."""

    name: str
    inputs: int
    outputs: int
    rank: int
    start: int

    @property
    def numbers(self) -> int:
        return (self.inputs + self.outputs) * self.rank


def adapter_of(branch: Expert | Merged | Mixture, store: Store) -> Adapter:
    """The files of an adapter. Raises BadInput."""
    try:
        return Adapter(store.get(branch.files["adapter_config.json"]), store.get(branch.files["adapter_model.safetensors"]))
    except KeyError as error:
        raise BadInput(
            f"{branch.kind} {branch.digest[:8]} has no {error}: an adapter is a folder that PEFT's save_pretrained wrote"
        ) from error


class Adapted(nn.Module):
    """A linear layer with an adapter for each slot: W x + B A x. Rows of a batch are divided evenly among the slots."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.a_SRI: Tensor | None = None
        self.b_SOR: Tensor | None = None

    def folds(self, x: Tensor) -> bool:
        """Whether W + B A, and one product, take less time than three: many rows, on a CPU in float32, where that rounds no more."""
        if type(self.base) is not nn.Linear or x.device.type != "cpu" or x.dtype != torch.float32:
            return False
        outputs, inputs = self.base.weight.shape
        return x.numel() >= outputs * inputs // (outputs + inputs) * inputs

    def forward(self, x: Tensor) -> Tensor:
        if self.a_SRI is None or self.b_SOR is None:
            return product(self.base, x)
        slots, _, inputs = self.a_SRI.shape
        if slots == 1 and self.folds(x):
            base: Any = self.base
            return linear(x, torch.addmm(base.weight, self.b_SOR[0], self.a_SRI[0]), base.bias)
        y = product(self.base, x)
        h_STR = torch.bmm(x.reshape(slots, -1, inputs), self.a_SRI.mT)
        return torch.baddbmm(y.view(slots, -1, y.shape[-1]), h_STR, self.b_SOR.mT).view(y.shape)


def product(base: nn.Module, x: Tensor) -> Tensor:
    """base(x). On a CPU that is not of Intel a few rows are computed transposed, as W times xᵀ, which is up to four times faster.

    Measured with torch 2.13 on one kind of CPU: two or three rows were faster at every size, four only in narrow layers. On a Xeon it
    takes up to twice as long (docs/log/serving.md).
    """
    rows = x.numel() // x.shape[-1]
    few = 1 < rows < 4 or (rows == 4 and x.shape[-1] < 1024)
    if not few or x.device.type != "cpu" or type(base) is not nn.Linear or hasattr(base, "elmwood_joined") or is_mkls_own():
        return base(x)
    y_OB = torch.mm(base.weight, x.reshape(rows, -1).T)
    y_BO = y_OB.T if base.bias is None else y_OB.T + base.bias
    return y_BO.contiguous().view(*x.shape[:-1], -1)  # in order: some models look at pairs of it as complex numbers


class Bank:
    """Adapters over `model`, whose linear layers it wraps. Number len(bank) is the base alone.

    Opening one reads the headers of all adapters and no weights. Adapters that were used stay in main memory up to a
    limit; on a GPU the slots hold the ones in use.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]):
        """Raises BadInput if an adapter belongs to another base model or is of a kind that is not supported."""
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.adapters = tuple(adapters)
        self.settings = [read_settings(adapter.config) for adapter in adapters]
        self.layers = layout(model, adapters)
        self.numbers = sum(layer.numbers for layer in self.layers)
        self.adapted = [wrap(model, layer.name) for layer in self.layers]
        if (head := head_of(model)) and len(adapters) > 1:
            wrap(model, head)  # for `product`: it is the widest layer
        self.rows: dict[int, Tensor] = {}  # adapter -> its numbers [P], the most recently used last
        self.slots_SP = torch.empty(0, self.numbers, dtype=self.dtype, device=self.device)
        self.held: list[int | None] = []  # adapter in each slot
        self.selected: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.adapters)

    def select(self, slots: Sequence[int]) -> None:
        """Let the slots of the next batches use these adapters. One slot serves a whole batch. Raises BadInput."""
        if tuple(slots) == self.selected:
            return
        self.selected = ()  # until everything is in place
        if all(number == len(self) for number in slots):
            for module in self.adapted:
                module.a_SRI = module.b_SOR = None
        elif len(slots) == 1 and self.device.type == "cpu":
            self._bind(self._row(slots[0]).unsqueeze(0))
        else:
            self._bind(self._fill(slots))
        self.selected = tuple(slots)

    def mix(self, rows: Sequence[Mapping[int, float]]) -> None:
        """Let slot s of the next batches use the sum of rows[s][n] times adapter n, until the next `select` or `mix`.

        The adapters are concatenated, so their ranks add up: this is exact, and no product B A is computed.
        """
        wanted = tuple(tuple(sorted(row.items())) for row in rows)
        if wanted == self.selected:
            return
        self.selected = ()  # until everything is in place
        many = max(map(len, rows))
        if not many:
            self.select([len(self)])
            return
        flat_SP = torch.zeros(len(rows), self.numbers * many, dtype=self.dtype, device=self.device)
        wide = [layer._replace(rank=layer.rank * many, start=layer.start * many) for layer in self.layers]
        for number in sorted({number for row in rows for number in row}):
            mine_1P = self._row(number).unsqueeze(0).to(self.device)
            for slot, row in enumerate(wanted):
                for place, (found, weight) in enumerate(row):
                    if found == number:
                        _lay(mine_1P, self.layers, flat_SP[slot : slot + 1], wide, place, weight)
        self._bind(flat_SP, wide)
        self.selected = wanted

    def _fill(self, slots: Sequence[int]) -> Tensor:
        """Copy adapters into their slots, except those that are there already."""
        if len(slots) > len(self.held):
            self.slots_SP = self.slots_SP.new_empty(len(slots), self.numbers)
            self.held = [None] * len(slots)
        for slot, number in enumerate(slots):
            if self.held[slot] != number:
                self.held[slot] = None  # until it is complete
                self.slots_SP[slot] = self._row(number) if number < len(self) else 0
                self.held[slot] = number
        return self.slots_SP[: len(slots)]

    def _row(self, number: int) -> Tensor:
        """An adapter's numbers [P], from memory or from its files."""
        flat_P = self.rows.pop(number, None)
        if flat_P is None:
            full = (len(self.rows) + 1) * self.numbers * self.dtype.itemsize > MEMORY
            oldest = self.rows.pop(next(iter(self.rows))) if full and self.rows else None
            flat_P = torch.empty(self.numbers, dtype=self.dtype) if oldest is None else oldest
            _read(self.adapters[number], self.settings[number], self.layers, flat_P)
        self.rows[number] = flat_P
        return flat_P

    def _bind(self, flat_SP: Tensor, layers: Sequence[Layer] | None = None) -> None:
        """Point the layers to their numbers: views, nothing is copied."""
        for layer, module in zip(layers or self.layers, self.adapted, strict=True):
            module.a_SRI, module.b_SOR = _halves(flat_SP, layer)


def _lay(one_1P: Tensor, layers: Sequence[Layer], flat_1P: Tensor, wide: Sequence[Layer], place: int, weight: float) -> None:
    """Copy an adapter to its place among the concatenated ones, B times its weight."""
    for layer, room in zip(layers, wide, strict=True):
        (a_1RI, b_1OR), (wide_a, wide_b) = _halves(one_1P, layer), _halves(flat_1P, room)
        span = slice(place * layer.rank, (place + 1) * layer.rank)
        wide_a[:, span] = a_1RI
        torch.mul(b_1OR, weight, out=wide_b[:, :, span])


def _halves(flat_SP: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """A [S, R, I] and B [S, O, R] of one layer, as views of flat adapters."""
    middle = layer.start + layer.inputs * layer.rank
    a_SRI = flat_SP[:, layer.start : middle].unflatten(1, (layer.rank, layer.inputs))
    return a_SRI, flat_SP[:, middle : layer.start + layer.numbers].unflatten(1, (layer.outputs, layer.rank))


def wrap(model: nn.Module, name: str) -> Adapted:
    parent, _, leaf = name.rpartition(".")
    adapted = Adapted(model.get_submodule(name))  # type: ignore[arg-type]  # layout has looked
    setattr(model.get_submodule(parent), leaf, adapted)
    return adapted


def head_of(model: nn.Module) -> str | None:
    """The name of the layer that makes logits, unless it is wrapped already or something else."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, module in model.named_modules() if module is head), None) if type(head) is nn.Linear else None


def layout(model: nn.Module, adapters: Sequence[Adapter]) -> list[Layer]:
    """The layers that some adapter changes, in the model's order, each at the largest rank that any adapter has there."""
    linear = {name: _size(module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for name, (rank, inputs, outputs) in shapes(adapter).items():
            if name not in linear:
                raise BadInput(f"{adapter.weights}: {name!r} is not a linear layer of the base: it belongs to another base model")
            if (inputs, outputs) != linear[name]:
                wanted = "{} -> {}".format(*linear[name])
                raise BadInput(
                    f"{adapter.weights}: {name} maps {inputs} -> {outputs}, the base {wanted}: the adapter belongs to another base model"
                )
            ranks[name] = max(ranks.get(name, 0), rank)
    sizes = [(name, *size, ranks[name]) for name, size in linear.items() if name in ranks]
    starts = accumulate(((inputs + outputs) * rank for _, inputs, outputs, rank in sizes), initial=0)
    return [Layer(*size, start) for size, start in zip(sizes, starts, strict=False)]


def _size(module: Any) -> tuple[int, int]:
    """Inputs and outputs. GPT-2's Conv1D stores its matrix transposed; an adapter on it does not."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def shapes(adapter: Adapter) -> dict[str, tuple[int, int, int]]:
    """Layer name -> (rank, inputs, outputs), from the header alone."""
    found: dict[str, dict[str, list[int]]] = {}
    tensors = read_header(adapter.weights).tensors
    check_floats(adapter.weights, {key: entry["dtype"] for key, entry in tensors.items()})
    for key, entry in sorted(tensors.items()):
        layer, half = split_key(key) or ("", "m")
        if half == "m" or len(entry["shape"]) != 2:
            raise BadInput(f"{adapter.weights}: {key!r} is not a lora_A or lora_B weight: only LoRA of linear layers is supported")
        found.setdefault(layer, {})[half] = entry["shape"]
    if torn := [name for name, halves in found.items() if len(halves) != 2 or halves["A"][0] != halves["B"][1]]:
        raise BadInput(f"{adapter.weights}: A and B of {torn[0]} do not fit each other: the file is incomplete; download it again")
    return {name: (halves["A"][0], halves["A"][1], halves["B"][0]) for name, halves in found.items()}


def _read(adapter: Adapter, settings: dict[str, Any], layers: Sequence[Layer], flat_P: Tensor) -> None:
    """Read the numbers of one adapter into flat_P."""
    with safe_open(adapter.weights, "pt") as file:
        present = set(file.keys())
        for layer in layers:
            a_SRI, b_SOR = _halves(flat_P.unsqueeze(0), layer)
            key = f"base_model.model.{layer.name}.lora_"
            rank = 0
            if f"{key}A.weight" in present:
                a_RI, b_OR = file.get_tensor(f"{key}A.weight"), file.get_tensor(f"{key}B.weight")
                rank = a_RI.shape[0]
                a_SRI[0, :rank] = a_RI
                torch.mul(b_OR, scale(settings, layer.name, rank), out=b_SOR[0, :, :rank])
            if rank < layer.rank:
                a_SRI[:, rank:] = b_SOR[:, :, rank:] = 0
    if not torch.isfinite(flat_P.sum()):
        raise BadInput(f"{adapter.weights} contains NaN or Inf; training diverged: train it again at a lower learning rate")
