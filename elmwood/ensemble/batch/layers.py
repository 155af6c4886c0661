"""Decoder layers of the common kind (pre-norm, rotary positions, a gated feed-forward) in few calls of torch.

transformers makes about fifty small calls for each layer, which take longer than the products of one token (docs/log/serving.md). Here q,
k and v are one product, gate and up another, and a few single tokens pass a layer in one compiled call (loops.py). A layer keeps its type
and its modules; what it is, is asked: `passes.reads_by_rows` compares it with transformers' own.

N tokens of a pass, W width of the model, H heads of queries, K of keys and values, D width of a head, I inputs, O outputs
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from functools import cache
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from elmwood.ensemble.batch.keys import FEW, THREADS, Step, attend
from elmwood.lm.adapters.slots import Slots, Slotted
from elmwood.lm.products import hasten, linear

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
SILU = (type(ACT2FN["silu"]), type(ACT2FN["swish"]))
NOTHING, NOWHERE = np.zeros(0, np.float32), np.zeros(0, np.int64)


class Joined:
    """Linear layers of the same input as one product; the weights of each are a part of one tensor."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers = layers
        self.weight_OI = join([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias_O = torch.cat([bias.detach() for bias in biases]) if biases else None
        self.array_OI = array(self.weight_OI)
        ends = np.cumsum([layer.out_features for layer in layers]).tolist()
        self.parts = [slice(end - layer.out_features, end) for end, layer in zip(ends, layers, strict=True)]
        self.adapted: list[tuple[slice, Slotted]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Joined":
        """Of copied layers with the same weights (`lm.load.twin`)."""
        made = copy(self)
        made.layers, made.adapted = deepcopy(self.layers, memo), []
        return made

    def __call__(self, x_NI: Tensor) -> Tensor:
        y_NO = product(x_NI, self.weight_OI, self.bias_O, self.array_OI)
        for part, slotted in self.adapted:
            slotted.add(x_NI, y_NO[:, part])
        return y_NO


class Loop(NamedTuple):
    """What `loops.read_layer` is told of a layer."""

    norms: tuple[NDArray[Any], NDArray[Any]]
    eps: np.float32
    weights: tuple[NDArray[Any], ...]
    biases: tuple[NDArray[Any], ...]
    slots: Slots | None = None
    flat_SP: NDArray[Any] = np.zeros((0, 0), np.float32)
    adapted_A6: NDArray[np.int64] = np.zeros((0, 6), np.int64)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Loop":
        """Of a copied layer with the same weights."""
        return self


class Fused(NamedTuple):
    """What the forward of a layer uses."""

    attention: Any
    products: tuple[Joined, Joined, Joined, Joined]  # q, k and v; o; gate and up; down
    width: int  # of a head
    loop: Loop | None


def join(weights: Sequence[Tensor]) -> Tensor:
    """Matrices under one another, of which each becomes a view. Those that are that already are not copied."""
    first, rows = weights[0], sum(len(weight) for weight in weights)
    at, whole = first.data_ptr(), first.untyped_storage()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != whole.data_ptr() or weight.data_ptr() != at or not weight.is_contiguous():
            break
        at += weight.numel() * weight.element_size()
    else:
        return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
    made, begin = torch.cat([weight.detach() for weight in weights]), 0
    for weight in weights:
        weight.data = made[begin : begin + len(weight)]
        begin += len(weight)
    return made


def fuse(model: Any) -> bool:
    """Let the layers of a model read in few calls, where their parts have the known names; whether they do."""
    layers: Any = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(map(_known, layers)):
        return False
    layer: Any
    for layer in layers:
        attention, feed = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        products = Joined([q, k, v]), Joined([attention.o_proj]), Joined([feed.gate_proj, feed.up_proj]), Joined([feed.down_proj])
        layer.elmwood_fused = Fused(attention, products, attention.head_dim, _loop(layer, products))
        layer.forward = MethodType(_forward, layer)
    head: Any = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.elmwood_joined = Joined([head])  # type: ignore[assignment]  # torch's stubs know tensors and modules
        head.forward = MethodType(_say, head)  # type: ignore[method-assign]
    return True


def unfuse(model: Any) -> None:
    """Let the layers read as transformers has it."""
    for layer in model.base_model.layers:
        del layer.elmwood_fused, layer.forward
    hasten(model)


def _loop(layer: Any, products: Sequence[Joined]) -> Loop | None:
    """None where the compiled loop cannot read the layer."""
    norms = layer.input_layernorm, layer.post_attention_layernorm
    weights = tuple(joined.array_OI for joined in products if joined.array_OI is not None)
    eps = {norm.variance_epsilon for norm in norms}
    if len(weights) < len(products) or len(eps) > 1 or type(layer.mlp.act_fn) not in SILU:
        return None
    biases = tuple(NOTHING if joined.bias_O is None else joined.bias_O.numpy() for joined in products)
    first, second = (norm.weight.detach().numpy() for norm in norms)
    return Loop((first, second), np.float32(eps.pop()), weights, biases)


def attach(model: Any, slots: Slots | None) -> bool:
    """Note which of the layers' products have got adapters since, in these slots; whether compiled loops know all layers."""
    found = [getattr(layer, "elmwood_fused", None) for layer in getattr(model.base_model, "layers", ())]
    for layer, fused in zip(getattr(model.base_model, "layers", ()), found, strict=True):
        if fused:
            slotted = {id(module.base): module for module in layer.modules() if isinstance(module, Slotted)}
            adapted = []
            for number, joined in enumerate(fused.products):
                pairs = [(part, slotted[id(one)]) for part, one in zip(joined.parts, joined.layers, strict=True) if id(one) in slotted]
                joined.adapted = pairs
                adapted += [(number, part.start, *one.place) for part, one in pairs]
            if fused.loop:
                flat_SP = slots.flat_SP.numpy() if slots else fused.loop.flat_SP
                loop = fused.loop._replace(slots=slots, flat_SP=flat_SP, adapted_A6=np.array(adapted, np.int64).reshape(-1, 6))
                layer.elmwood_fused = fused._replace(loop=loop)
    return bool(found) and all(fused and fused.loop for fused in found)


def _known(layer: Any) -> bool:
    names = layer._modules.keys()
    if names != PARTS or layer.self_attn._modules.keys() != ATTENTION or layer.mlp._modules.keys() != FEED:
        return False
    linears = [module for part in (layer.self_attn, layer.mlp) for name, module in part._modules.items() if name != "act_fn"]
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (
        all(type(module) is nn.Linear and (module.bias is None) == (linears[0].bias is None) for module in linears[:3])
        and all(type(module) is nn.Linear for module in linears)
        and len({linears[0].weight.dtype, *(module.weight.dtype for module in linears)}) == 1
        and linears[4].bias is linears[5].bias is None
        and all(hasattr(norm, "variance_epsilon") and not norm._modules for norm in norms)
        and hasattr(layer.self_attn, "head_dim") and hasattr(layer.self_attn, "scaling")
    )  # fmt: skip


def _forward(layer: Any, hidden_states: Tensor, *arguments: Any, position_embeddings: Any = None, **named: Any) -> Tensor:
    step = named.get("elmwood_step")
    if step is None:
        named["position_embeddings"] = position_embeddings
        return type(layer).forward(layer, hidden_states, *arguments, **named)
    fused: Fused = layer.elmwood_fused
    h_NW = hidden_states[0]
    if fused.loop and step.few is not None and h_NW.shape[0] == len(step.row_n) and uses_loops(h_NW):
        return _read(fused, fused.loop, h_NW, position_embeddings, step)[None]
    qkv, out, gate_up, down = fused.products
    y_NO = qkv(_normal(layer.input_layernorm, h_NW))
    h_NW = h_NW + out(_attend(fused, y_NO, position_embeddings, step))
    both_NO = gate_up(_normal(layer.post_attention_layernorm, h_NW))
    gate, up = gate_up.parts
    gate_NO = layer.mlp.act_fn(both_NO[:, gate]).mul_(both_NO[:, up])
    h_NW += down(gate_NO)
    return h_NW[None]


def _read(fused: Fused, loop: Loop, h_NW: Tensor, positions: tuple[Tensor, Tensor], step: Step) -> Tensor:
    """The layer for single tokens."""
    assert step.few
    heads = loop.weights[0].shape[0] - loop.weights[1].shape[1]
    like_1KND = h_NW.new_empty(1, heads // 2 // fused.width, 1, fused.width)
    kept = step.store.layer(fused.attention.layer_idx, like_1KND, like_1KND)
    cos_1ND, sin_1ND = positions
    adapters = loop.flat_SP, loop.slots.slot_N if loop.slots else NOWHERE, loop.adapted_A6
    loops().read_layer(
        h_NW.numpy(), loop.norms, loop.eps, loop.weights, loop.biases, adapters, (cos_1ND[0].numpy(), sin_1ND[0].numpy()),
        (kept[0].numpy(), kept[1].numpy()), step.few, np.float32(fused.attention.scaling),
    )  # fmt: skip
    return h_NW


def _attend(fused: Fused, y_NO: Tensor, positions: tuple[Tensor, Tensor], step: Step) -> Tensor:
    count, width, (q, k, v) = y_NO.shape[0], fused.width, fused.products[0].parts
    turned_NHD = _turn(y_NO[:, : k.stop].view(count, -1, width), *positions)
    query_1HND, key_1KND = turned_NHD[None, :, : q.stop // width].transpose(1, 2), turned_NHD[None, :, q.stop // width :].transpose(1, 2)
    value_1KND = y_NO[None, :, v].view(1, count, -1, width).transpose(1, 2)
    read_1NHD, _ = attend(fused.attention, query_1HND, key_1KND, value_1KND, None, scaling=fused.attention.scaling, elmwood_step=step)
    return read_1NHD[0].flatten(1)


def _say(head: Any, hidden_states: Tensor) -> Tensor:
    return head.elmwood_joined(hidden_states.flatten(0, -2)).unflatten(0, hidden_states.shape[:-1])


def _normal(norm: Any, h_NW: Tensor) -> Tensor:
    return functional.rms_norm(h_NW, (h_NW.shape[-1],), norm.weight, norm.variance_epsilon)


def _turn(x_NHD: Tensor, cos_1ND: Tensor, sin_1ND: Tensor) -> Tensor:
    """Rotary positions: x cos + (-x2, x1) sin, of halves x1 and x2."""
    half = x_NHD.shape[-1] // 2
    cos_N1D, sin_N1D = cos_1ND[0, :, None], sin_1ND[0, :, None]
    turned_NHD = x_NHD * cos_N1D
    turned_NHD[..., :half].addcmul_(x_NHD[..., half:], sin_N1D[..., :half], value=-1)
    turned_NHD[..., half:].addcmul_(x_NHD[..., :half], sin_N1D[..., half:])
    return turned_NHD


# ---- products of few rows -----------------------------------------------------------------------------------------


@cache
def loops() -> ModuleType:
    from elmwood.ensemble.batch import loops

    return loops


def array(weight_OI: Tensor) -> NDArray[Any] | None:
    """The weights as the loops take them."""
    fits = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32
    return weight_OI.detach().numpy() if fits else None


def product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, array_OI: NDArray[Any] | None) -> Tensor:
    """x W^T + b. With one or two threads, a loop multiplies up to FEW rows in 0.5 to 0.9 of the time of MKL and oneDNN."""
    if array_OI is None or len(x_NI) > FEW or not uses_loops(x_NI):
        return linear(x_NI, weight_OI, bias_O)
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])
    loops().multiply(x_NI.contiguous().numpy(), array_OI, y_NO.numpy())
    return y_NO if bias_O is None else y_NO.add_(bias_O)


def uses_loops(x: Tensor) -> bool:
    """Whether few rows are computed by compiled loops: each small call of torch takes ten times as long in a step, where the weights
    push its code out of the caches, as it does alone. The loops use one thread."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.get_num_threads() <= THREADS
