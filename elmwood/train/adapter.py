"""LoRA on a frozen model (arXiv:2106.09685): PEFT's modules and files, with our own forward and backward pass for plain LoRA.

N positions, R rank, I and O: inputs and outputs of a linear layer
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.lm.adapters.peft_config import ALPHA
from elmwood.lm.adapters.peft_import import LoraConfig, LoraLayer, get_peft_model
from elmwood.lm.adapters.places import adapts_experts, first_unfit, head_of, linear_layers, unfit
from elmwood.lm.adapters.trunk import stack_of
from elmwood.lm.products import linear
from elmwood.records import Recipe

FOLDED = 1000  # out * into / (out + into) up to which a compiled adapter is folded: square layers of 2,000 (by the speeds of an H100)


def add_adapter(model: Any, recipe: Recipe, base: str, stored: Collection[str] | None = None, progress: Progress = silent) -> Any:
    """Freeze a model and add an adapter to it. The same recipe gives the same bytes. Raises BadInput.

    `base` is the name of the base model in PEFT's config; `stored`: the tensors in the seed's files, by default all of the model's.
    """
    layers = linear_layers(model)
    refused = unfit(model, stored)
    alpha: Any = ALPHA if recipe.alpha is None else recipe.alpha  # PEFT takes any number, though it is annotated as int
    config = LoraConfig(
        r=recipe.rank, lora_alpha=alpha, use_rslora=recipe.alpha is None, use_dora=recipe.method == "dora", task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores its matrices transposed
        **adapter_places(model, recipe, refused, progress),
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT 0.21 uses the old name in transformers 5.23
        warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)  # refused below
        torch.manual_seed(recipe.rng_seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:  # no such modules
            raise BadInput(f"--targets {recipe.targets}: PEFT refuses them ({error}): name linear modules of this seed") from error
    if wrong := first_unfit(adapted, layers, refused):
        raise BadInput(f"--targets {recipe.targets}: {wrong}: name other modules, or train with --method full")
    adapted.peft_config["default"].base_model_name_or_path = base
    if recipe.method != "dora":
        fuse(adapted)
    return adapted


def fuse(adapted: Any) -> None:
    """Let plain LoRA layers over linear ones (also GPT-2's, and those in four bits) take our forward and backward pass while trained."""
    for module in adapted.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(module, LoraLayer) and (type(base) in (nn.Linear, Conv1D) or hasattr(getattr(base, "weight", None), "quant_state")):
            module.__class__ = _fused(type(module))


@cache
def _fused(kind: type) -> Any:
    """A class of PEFT's with our forward pass; a class, for a compiler takes each function set on an object for another program."""
    return type(kind.__name__, (kind,), {"forward": _forward, "plain": kind})


def adapter_places(model: Any, recipe: Recipe, refused: Mapping[str, str], progress: Progress = silent) -> dict[str, Any]:
    """PEFT's settings for the modules that get adapters: all linear ones that can carry one but the head, or the named ones; if `late`,
    in the last layers. Says which are left out. Raises BadInput where none is left."""
    layers = linear_layers(model)
    kept = {name for name in layers if name not in refused and name != head_of(model)}
    left_out = {name: reason for name, reason in refused.items() if name != head_of(model)}
    targets: Any = recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)
    if targets == "all-linear":
        if not kept:
            reason = next(iter(left_out.values()), "it has no linear layers")
            raise BadInput(f"no linear layer of this {type(model).__name__} can carry an adapter ({reason}): train with --method full")
        if experts := adapts_experts(model, targets):
            progress("no adapters on the routed experts: they are stacked, and are no linear layers", 0, 0, "")
        for leaf in sorted({_leaf(name) for name in left_out}):
            reason = next(reason for name, reason in left_out.items() if _leaf(name) == leaf)
            progress(f"no adapters on {leaf}: {reason}", 0, 0, "")
        if experts or left_out:  # by their last names where these are theirs alone
            leaves = {_leaf(name) for name in kept}
            targets = sorted(leaves if {name for name, _ in model.named_modules() if _leaf(name) in leaves} == kept else kept)
    if recipe.late == 1:
        return {"target_modules": targets}
    stack, count = stack_of(model), model.config.get_text_config().num_hidden_layers
    if stack is None:
        raise BadInput(f"{type(model).__name__} has no list of its {count} layers, so no adapters in the last ones: choose --late 1")
    name, _ = stack
    mine = {_leaf(one) for one in kept if one.startswith(f"{name}.")} - {_leaf(one) for one in left_out}
    return {
        "target_modules": sorted(mine) if recipe.targets == "all-linear" else targets,
        "layers_to_transform": list(range(count - math.ceil(recipe.late * count), count)),
        "layers_pattern": name.rpartition(".")[2],
    }


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _forward(module: Any, x: Tensor) -> Tensor:
    factors = module.lora_A["default"].weight, module.lora_B["default"].weight
    if torch.compiler.is_compiling():
        return _compiled(module, x, *factors)
    y_NO = LoraFunction.apply(x, partial(base_weight, module.base_layer), module.base_layer.bias, *factors, module.scaling["default"])
    return y_NO.view(*x.shape[:-1], -1)  # here, or models that change it in place would be refused by autograd


def _compiled(module: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """The same as one program with what stands around it, for weights that are not packed.

    Narrow layers are folded: the extra passes over activations cost more than the gradient of the whole matrix does. What is folded is
    rounded at random, for most steps of A and B are smaller than half a unit of bf16.
    """
    weight_OI, bias_O, scale = base_weight(module.base_layer), module.base_layer.bias, module.scaling["default"]
    out, into = weight_OI.shape
    if out * into <= FOLDED * (out + into) and weight_OI.dtype == x.dtype == torch.bfloat16:
        return nn.functional.linear(x, round_at_random(weight_OI.float() + (b_OR * scale) @ a_RI), bias_O)
    low_NR = x @ a_RI.to(x.dtype).t()
    return nn.functional.linear(x, weight_OI, bias_O) + low_NR @ (b_OR * scale).to(x.dtype).t()


def round_at_random(value: Tensor) -> Tensor:
    """bf16 numbers next to these float32 ones, above or below by chances that make the mean exact; gradients pass as they are."""
    chance = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device)
    rounded = ((value.detach().view(torch.int32) + chance) & -(1 << 16)).view(torch.float32)
    return (value + (rounded - value.detach())).to(torch.bfloat16)


def base_weight(base: Any) -> Tensor:
    """The weight [O, I] of a frozen linear layer, however it is stored: as it is, transposed (Conv1D), or in four bits."""
    state = getattr(base.weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit  # an extra

        return dequantize_4bit(base.weight, state)
    return base.weight.t() if isinstance(base, Conv1D) else base.weight


class LoraFunction(torch.autograd.Function):
    """x Wᵀ + bias + scale · x Aᵀ Bᵀ [N, O], without extra passes over whole activations to scale and add.

    Computed in the dtype of x, or of autocast; A and B may be wider. `weight` gives W [O, I]: what it unpacks is not kept.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            x_NI = x.to(dtype).flatten(0, -2)
            a_RI, b_OR = a_RI.to(dtype), b_OR.to(dtype) * scale
            low_NR = x_NI @ a_RI.t()
            y_NO = linear(x_NI, weight().to(dtype), None if bias_O is None else bias_O.to(dtype)).addmm_(low_NR, b_OR.t())
        ctx.save_for_backward(x_NI, a_RI, b_OR, low_NR)
        ctx.weight, ctx.shape, ctx.dtype, ctx.scale = weight, x.shape, x.dtype, scale
        return y_NO

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:  # type: ignore[override]
        x_NI, a_RI, b_OR, low_NR = ctx.saved_tensors
        grad_NO = grad.flatten(0, -2)
        low_grad_NR = grad_NO @ b_OR
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight_IO = ctx.weight().to(grad.dtype).t()
            grad_x = linear(grad_NO, weight_IO).addmm_(low_grad_NR, a_RI).view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, low_grad_NR.t() @ x_NI, (grad_NO.t() @ low_NR) * ctx.scale, None
