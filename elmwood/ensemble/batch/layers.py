"""Decoder layers of the common kind (pre-norm, rotary positions, a gated feed-forward) in few calls of torch.

transformers makes about fifty small calls for each layer, which take longer than the products of one token (docs/log/serving.md). Here q,
k and v are one product, gate and up another, and a few rows are multiplied by a loop that reads each weight once. A layer keeps its type
and its modules; what it is, is asked: `passes.reads_by_rows` compares it with transformers' own.

N tokens of a pass, W width of the model, H heads of queries, K of keys and values, D width of a head, I inputs, O outputs
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from elmwood.compiled import compiled
from elmwood.ensemble.batch.keys import FEW, Step, attend
from elmwood.lm.adapters.slots import Slotted
from elmwood.lm.products import hasten, linear, processor

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class Joined:
    """Linear layers of the same input as one product; the weights of each are a part of one tensor."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers = layers
        self.weight_OI = join([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias_O = torch.cat([bias.detach() for bias in biases]) if biases else None
        self.rows_OI = few_rows(self.weight_OI)
        ends = np.cumsum([layer.out_features for layer in layers]).tolist()
        self.parts = [slice(end - layer.out_features, end) for end, layer in zip(ends, layers, strict=True)]
        self.adapted: list[tuple[slice, Slotted]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Joined":
        """Of copied layers with the same weights (`lm.load.twin`)."""
        made = copy(self)
        made.layers, made.adapted = deepcopy(self.layers, memo), []
        return made

    def __call__(self, x_NI: Tensor) -> Tensor:
        y_NO = product(x_NI, self.weight_OI, self.bias_O, self.rows_OI)
        for part, slotted in self.adapted:
            slotted.add(x_NI, y_NO[:, part])
        return y_NO


class Fused(NamedTuple):
    """What the forward of a layer uses."""

    attention: Any
    qkv: Joined
    out: Joined
    gate_up: Joined
    down: Joined
    width: int  # of a head


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
        layer.elmwood_fused = Fused(
            attention, Joined([q, k, v]), Joined([attention.o_proj]), Joined([feed.gate_proj, feed.up_proj]), Joined([feed.down_proj]),
            attention.head_dim,
        )  # fmt: skip
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


def attach(model: Any) -> None:
    """Note which of the layers' products have got adapters since."""
    for layer in getattr(model.base_model, "layers", ()):
        if fused := getattr(layer, "elmwood_fused", None):
            slotted = {id(module.base): module for module in layer.modules() if isinstance(module, Slotted)}
            for joined in (fused.qkv, fused.out, fused.gate_up, fused.down):
                pairs = zip(joined.parts, joined.layers, strict=True)
                joined.adapted = [(part, slotted[id(one)]) for part, one in pairs if id(one) in slotted]


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
    few = step.few is not None and h_NW.shape[0] == len(step.row_n) and uses_loops(h_NW)
    y_NO = fused.qkv(_normal(layer.input_layernorm, h_NW, few))
    read_NO = _listen(fused, y_NO, position_embeddings, step) if few else _attend(fused, y_NO, position_embeddings, step)
    h_NW = h_NW + fused.out(read_NO)
    both_NO = fused.gate_up(_normal(layer.post_attention_layernorm, h_NW, few))
    gate, up = fused.gate_up.parts
    gate_NO = layer.mlp.act_fn(both_NO[:, gate]).mul_(both_NO[:, up])
    h_NW += fused.down(gate_NO)
    return h_NW[None]


def _attend(fused: Fused, y_NO: Tensor, positions: tuple[Tensor, Tensor], step: Step) -> Tensor:
    count, width, (q, k, v) = y_NO.shape[0], fused.width, fused.qkv.parts
    turned_NHD = _turn(y_NO[:, : k.stop].view(count, -1, width), *positions)
    query_1HND, key_1KND = turned_NHD[None, :, : q.stop // width].transpose(1, 2), turned_NHD[None, :, q.stop // width :].transpose(1, 2)
    value_1KND = y_NO[None, :, v].view(1, count, -1, width).transpose(1, 2)
    read_1NHD, _ = attend(fused.attention, query_1HND, key_1KND, value_1KND, None, scaling=fused.attention.scaling, elmwood_step=step)
    return read_1NHD[0].flatten(1)


def _listen(fused: Fused, y_NO: Tensor, positions: tuple[Tensor, Tensor], step: Step) -> Tensor:
    """The same by a loop over single tokens."""
    assert step.few
    width, (q, _, v) = fused.width, fused.qkv.parts
    like_1KND = y_NO[None, :, v].view(1, y_NO.shape[0], -1, width).transpose(1, 2)
    keys_RKCD, values_RKCD = step.store.layer(fused.attention.layer_idx, like_1KND, like_1KND)
    read_NO = torch.empty_like(y_NO[:, q])
    cos_1ND, sin_1ND = positions
    listen(
        y_NO.numpy(), cos_1ND[0].numpy(), sin_1ND[0].numpy(), keys_RKCD.numpy(), values_RKCD.numpy(), *step.few,
        np.float32(fused.attention.scaling), read_NO.numpy(),
    )  # fmt: skip
    return read_NO


def _say(head: Any, hidden_states: Tensor) -> Tensor:
    return head.elmwood_joined(hidden_states.flatten(0, -2)).unflatten(0, hidden_states.shape[:-1])


def _normal(norm: Any, h_NW: Tensor, few: bool) -> Tensor:
    if not few:
        return functional.rms_norm(h_NW, (h_NW.shape[-1],), norm.weight, norm.variance_epsilon)
    y_NW = torch.empty_like(h_NW)
    normal(h_NW.numpy(), norm.weight.detach().numpy(), np.float32(norm.variance_epsilon), y_NW.numpy())
    return y_NW


def _turn(x_NHD: Tensor, cos_1ND: Tensor, sin_1ND: Tensor) -> Tensor:
    """Rotary positions: x cos + (-x2, x1) sin, of halves x1 and x2."""
    half = x_NHD.shape[-1] // 2
    cos_N1D, sin_N1D = cos_1ND[0, :, None], sin_1ND[0, :, None]
    turned_NHD = x_NHD * cos_N1D
    turned_NHD[..., :half].addcmul_(x_NHD[..., half:], sin_N1D[..., :half], value=-1)
    turned_NHD[..., half:].addcmul_(x_NHD[..., :half], sin_N1D[..., half:])
    return turned_NHD


# ---- products of few rows -----------------------------------------------------------------------------------------


def few_rows(weight_OI: Tensor) -> NDArray[Any] | None:
    """The weights as `multiply` takes them; none where it is of no use: it needs the sixteen registers more that AVX-512 has."""
    fits = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and weight_OI.shape[0] % 4 == 0
    return weight_OI.detach().numpy() if fits and _wide_registers() else None


def product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, rows_OI: NDArray[Any] | None) -> Tensor:
    """x W^T + b. With one thread, from two to FEW rows read each weight once, which takes 0.6 to 0.8 of the time of MKL."""
    rows = x_NI.shape[0]
    if rows_OI is None or not 1 < rows <= FEW or not uses_loops(x_NI):
        return linear(x_NI, weight_OI, bias_O)
    missing = -rows % 4
    x_NI = functional.pad(x_NI, (0, 0, 0, missing)) if missing else x_NI.contiguous()
    y_NO = x_NI.new_empty(rows + missing, weight_OI.shape[0])
    multiply(x_NI.numpy(), rows_OI, y_NO.numpy())
    y_NO = y_NO[:rows] if missing else y_NO
    return y_NO if bias_O is None else y_NO.add_(bias_O)


def uses_loops(x: Tensor) -> bool:
    """Whether few rows are computed by compiled loops: each small call of torch takes ten times as long in a step, where the weights
    push its code out of the caches, as it does alone. The loops use one thread."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.get_num_threads() == 1


def _wide_registers() -> bool:
    """Whether this processor has AVX-512, and with it registers for sixteen sums."""
    return " avx512f " in processor()


# no flag but these: what is not finite must stay so
loop = partial(compiled, fastmath=frozenset({"reassoc", "contract", "nsz", "arcp"}))


@loop
def normal(h_NW, weight_W, eps, y_NW):
    """y = h / sqrt(mean(h^2) + eps) * weight."""
    width = h_NW.shape[1]
    for n in range(h_NW.shape[0]):
        total = np.float32(0)
        for i in range(width):
            total += h_NW[n, i] * h_NW[n, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            y_NW[n, i] = h_NW[n, i] * scale * weight_W[i]


@loop
def listen(y_NO, cos_ND, sin_ND, keys_RKCD, values_RKCD, row_N, place_N, scale, read_NO):
    """Turn queries and keys by their positions, keep keys and values, and attend: each token by itself, over the tokens of its own row."""
    groups, width = keys_RKCD.shape[1], keys_RKCD.shape[3]
    heads, half = read_NO.shape[1] // width, width // 2
    for n in range(y_NO.shape[0]):
        row, last = row_N[n], place_N[n]
        for h in range(heads + groups):
            x = y_NO[n, h * width : (h + 1) * width]
            for i in range(half):
                a, b = x[i], x[i + half]
                x[i] = a * cos_ND[n, i] - b * sin_ND[n, i]
                x[i + half] = b * cos_ND[n, i + half] + a * sin_ND[n, i + half]
        for k in range(groups):
            for i in range(width):
                keys_RKCD[row, k, last, i] = y_NO[n, (heads + k) * width + i]
                values_RKCD[row, k, last, i] = y_NO[n, (heads + groups + k) * width + i]
        share_T = np.empty(last + 1, np.float32)
        for h in range(heads):
            k, most, total = h // (heads // groups), np.float32(-3e38), np.float32(0)
            q = y_NO[n, h * width : (h + 1) * width]
            for t in range(last + 1):
                key, score = keys_RKCD[row, k, t], np.float32(0)
                for i in range(width):
                    score += q[i] * key[i]
                share_T[t] = score * scale
                most = max(most, share_T[t])
            for t in range(last + 1):
                share_T[t] = np.exp(share_T[t] - most)
                total += share_T[t]
            read = read_NO[n, h * width : (h + 1) * width]
            read[:] = 0
            for t in range(last + 1):
                value, share = values_RKCD[row, k, t], share_T[t] / total
                for i in range(width):
                    read[i] += share * value[i]


@loop
def multiply(x_NI, w_OI, y_NO):
    """y = x W^T, four rows and four outputs at a time: N and O are multiples of four. The bits of a row do not depend on the others."""
    outputs, inputs = w_OI.shape
    for o in range(0, outputs, 4):
        w0, w1, w2, w3 = w_OI[o], w_OI[o + 1], w_OI[o + 2], w_OI[o + 3]
        for n in range(0, x_NI.shape[0], 4):
            x0, x1, x2, x3 = x_NI[n], x_NI[n + 1], x_NI[n + 2], x_NI[n + 3]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
            for i in range(inputs):
                p, q, r, s = x0[i], x1[i], x2[i], x3[i]
                w = w0[i]
                a0, b0, c0, d0 = a0 + w * p, b0 + w * q, c0 + w * r, d0 + w * s
                w = w1[i]
                a1, b1, c1, d1 = a1 + w * p, b1 + w * q, c1 + w * r, d1 + w * s
                w = w2[i]
                a2, b2, c2, d2 = a2 + w * p, b2 + w * q, c2 + w * r, d2 + w * s
                w = w3[i]
                a3, b3, c3, d3 = a3 + w * p, b3 + w * q, c3 + w * r, d3 + w * s
            y_NO[n, o], y_NO[n, o + 1], y_NO[n, o + 2], y_NO[n, o + 3] = a0, a1, a2, a3
            y_NO[n + 1, o], y_NO[n + 1, o + 1], y_NO[n + 1, o + 2], y_NO[n + 1, o + 3] = b0, b1, b2, b3
            y_NO[n + 2, o], y_NO[n + 2, o + 1], y_NO[n + 2, o + 2], y_NO[n + 2, o + 3] = c0, c1, c2, c3
            y_NO[n + 3, o], y_NO[n + 3, o + 1], y_NO[n + 3, o + 2], y_NO[n + 3, o + 3] = d0, d1, d2, d3
