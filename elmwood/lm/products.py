"""Products of many rows with a weight matrix, by oneDNN instead of the BLAS that torch was built with.

torch multiplies float32 matrices with MKL, which uses AVX2 on processors that are not Intel's. oneDNN uses AVX-512 wherever it is there:
twice the speed on AMD Zen 5, nine tenths of it on Intel, where all is left to MKL (docs/log/speed.md).

N rows, I inputs, O outputs; B texts of T tokens, hidden states of width D, vocabulary V
"""

import platform
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

FEWEST = 16  # rows: with fewer the call itself costs more than it saves
WIDE, FEWEST_OF_WIDE = 1 << 23, 4  # but for a matrix of so many numbers, as a head is (docs/log/serving.md)

Model = TypeVar("Model", bound=nn.Module)


def hasten(model: Model) -> Model:
    """Let every `nn.Linear` of a model multiply by `linear`, and gated feed-forwards compute in the memory of the gate where no gradient is
    asked for, in place. The modules keep their type and their weights."""
    known: dict[type, bool] = {}
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
        elif module._modules.keys() >= _PARTS:
            kind = type(module)
            if kind not in known:
                known[kind] = _is_gated(module)
            if known[kind]:
                module.forward = MethodType(_gated, module)  # type: ignore[method-assign]
    return model


_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether a feed-forward is down(silu(gate(x)) * up(x)). It is asked."""
    if type(module.gate_proj) is not nn.Linear or (weight := module.gate_proj.weight).device.type != "cpu":
        return False
    x_1D = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype)[None]
    wanted_1D = module(x_1D)
    return isinstance(wanted_1D, Tensor) and torch.allclose(_gated(module, x_1D), wanted_1D, atol=1e-5, rtol=1e-4)


def _gated(module: Any, x: Tensor) -> Tensor:
    """Its output, the products aside, touches one tensor of the feed-forward's width in place of three: half the time of a model so small
    that its weights stay in the cache (docs/log/speed.md)."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return type(module).forward(module, x)
    gate = functional.silu(module.gate_proj(x), inplace=True)
    gate *= module.up_proj(x)
    return module.down_proj(gate)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, through oneDNN where that pays: many rows in float32 on an x86 CPU not of Intel, outside autocast.

    The same inputs give the same bits every time, and other bits than torch's within rounding.
    """
    if not _pays(x, weight_OI):
        return functional.linear(x, weight_OI, bias_O)
    return _Linear.apply(x, weight_OI, bias_O) if torch.is_grad_enabled() else _product(x, weight_OI, bias_O)


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)


class _Linear(torch.autograd.Function):
    """x W^T + b, its gradients by the same kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:  # type: ignore[override]  # torch leaves it open
        ctx.save_for_backward(x, weight_OI)
        return _product(x, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight_OI = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_NO, x_NI = grad.flatten(0, -2), x.flatten(0, -2)
        return (
            _product(grad, weight_OI.t()) if wanted[0] else None,
            _product(grad_NO.t(), x_NI.t()) if wanted[1] else None,
            grad_NO.sum(0) if wanted[2] else None,
        )


def _product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight_OI, bias_O, "none", [], "")


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= (FEWEST if weight.numel() < WIDE else FEWEST_OF_WIDE) * x.shape[-1]
        and _here()
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def processor() -> str:
    """What Linux says of the first processor, its maker and flags among it; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:8192]
    except OSError:
        return ""


def is_mkls_own() -> bool:
    """Whether this processor is one of Intel's, where MKL uses all it has."""
    return "GenuineIntel" in processor()


@cache
def _here() -> bool:
    """Whether this build of torch has the kernel, and this machine is of the kind it was measured on."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and not is_mkls_own()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@torch.no_grad()
def plain_head(model: Any) -> Tensor | None:
    """The head's weights [V, D], if the logits are a bias-free linear head on the last hidden states and nothing else; else None.

    The model is asked, not its name: both ways round a few tokens must give the same bits. They differ, for the embedding of one alone,
    that of padding, may be zero, and all that a head does to zeros is zero.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return None
    tokens_1T = (31 * torch.arange(1, 9, device=head.weight.device) % model.config.get_text_config().vocab_size)[None]
    hidden_1TD = model.base_model(input_ids=tokens_1T, use_cache=False)[0]
    if hidden_1TD.shape[-1] != head.in_features:
        return None
    logits_1TV = model(input_ids=tokens_1T, use_cache=False).logits
    return head.weight if torch.equal(head(hidden_1TD), logits_1TV) else None
