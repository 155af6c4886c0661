"""LoRA over a frozen model (arXiv:2106.09685): PEFT's modules and files, with a forward and backward of our own for the plain case.

N positions, R rank, I and O: what a linear layer takes in and gives out
"""

import math
import warnings
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elmwood.errors import BadInput
from elmwood.lm.products import linear
from elmwood.records import Recipe

ALPHA = 8  # of a rank-stabilised adapter (arXiv:2312.03732): at rank 16 its scale is 2, that of the usual alpha = 2 rank


def adapter(model: Any, recipe: Recipe, base: str) -> Any:
    """Put an adapter into a model, which is frozen. The same recipe gives the same bytes. Raises BadInput.

    `base` is written where PEFT keeps the base model's name.
    """
    alpha: Any = ALPHA if recipe.alpha is None else recipe.alpha  # PEFT takes any number, its annotation whole ones
    config = LoraConfig(
        r=recipe.rank, lora_alpha=alpha, use_rslora=recipe.alpha is None, use_dora=recipe.method == "dora", task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 keeps its matrices the other way round
        **where(model, recipe),
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT 0.21 asks transformers 5.23 by the old name
        torch.manual_seed(recipe.rng_seed)
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    for module in adapted.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and recipe.method != "dora":
            module.forward = partial(_forward, module)  # type: ignore[method-assign]  # this module alone, while it is trained
    return adapted


def where(model: Any, recipe: Recipe) -> dict[str, Any]:
    """PEFT's settings for the modules that get adapters: all linear ones but the head, or those named; in the last layers if `late`."""
    if recipe.late == 1:
        return {"target_modules": recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)}
    count = model.config.get_text_config().num_hidden_layers
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count}
    if not stacks:
        raise BadInput(f"{type(model).__name__} has no list of its {count} layers: adapters in the last of them need one; ask for late 1")
    name, layers = next(iter(stacks.items()))
    linear = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return {
        "target_modules": sorted(linear) if isinstance(recipe.targets, str) else list(recipe.targets),
        "layers_to_transform": list(range(count - math.ceil(recipe.late * count), count)),
        "layers_pattern": name.rpartition(".")[2],
    }


def _forward(module: Linear, x: Tensor) -> Tensor:
    factors = module.lora_A["default"].weight, module.lora_B["default"].weight
    return Adapted.apply(x, module.base_layer.weight, module.base_layer.bias, *factors, module.scaling["default"])


class Adapted(torch.autograd.Function):
    """x Wᵀ + bias + scale · x Aᵀ Bᵀ without the passes over whole activations that scaling and adding cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            x_NI = x.to(dtype).flatten(0, -2)
            weight_OI, a_RI, b_OR = weight_OI.to(dtype), a_RI.to(dtype), b_OR.to(dtype) * scale
            low_NR = x_NI @ a_RI.t()
            y_NO = linear(x_NI, weight_OI, None if bias_O is None else bias_O.to(dtype)).addmm_(low_NR, b_OR.t())
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, low_NR)
        ctx.shape, ctx.dtype, ctx.scale = x.shape, x.dtype, scale
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:  # type: ignore[override]
        x_NI, weight_OI, a_RI, b_OR, low_NR = ctx.saved_tensors
        grad_NO = grad.flatten(0, -2)
        low_grad_NR = grad_NO @ b_OR
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad_NO, weight_OI.t()).addmm_(low_grad_NR, a_RI).view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, low_grad_NR.t() @ x_NI, (grad_NO.t() @ low_NR) * ctx.scale, None
