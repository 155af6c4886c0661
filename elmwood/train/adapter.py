"""LoRA on a frozen model (arXiv:2106.09685): PEFT's modules and files, with our own forward and backward pass for plain LoRA.

N positions, R rank, I and O: inputs and outputs of a linear layer
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


def add_adapter(model: Any, recipe: Recipe, base: str) -> Any:
    """Freeze a model and add an adapter to it. The same recipe gives the same bytes. Raises BadInput.

    `base` is the name of the base model in PEFT's config.
    """
    alpha: Any = ALPHA if recipe.alpha is None else recipe.alpha  # PEFT takes any number, though it is annotated as int
    config = LoraConfig(
        r=recipe.rank, lora_alpha=alpha, use_rslora=recipe.alpha is None, use_dora=recipe.method == "dora", task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores its matrices transposed
        **adapter_places(model, recipe),
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT 0.21 uses the old name in transformers 5.23
        torch.manual_seed(recipe.rng_seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:  # no such modules
            raise BadInput(f"--targets {recipe.targets}: PEFT refuses them ({error}): name linear modules of this seed") from error
    adapted.peft_config["default"].base_model_name_or_path = base
    for module in adapted.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and recipe.method != "dora":
            module.forward = partial(_forward, module)  # type: ignore[method-assign]  # of this module only, while it is trained
    return adapted


def adapter_places(model: Any, recipe: Recipe) -> dict[str, Any]:
    """PEFT's settings for the modules that get adapters: all linear ones but the head, or the named ones; if `late`, in the last layers."""
    if recipe.late == 1:
        return {"target_modules": recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)}
    count = model.config.get_text_config().num_hidden_layers
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count}
    if not stacks:
        raise BadInput(f"{type(model).__name__} has no list of its {count} layers, so no adapters in the last ones: choose --late 1")
    name, layers = next(iter(stacks.items()))
    linear = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return {
        "target_modules": sorted(linear) if isinstance(recipe.targets, str) else list(recipe.targets),
        "layers_to_transform": list(range(count - math.ceil(recipe.late * count), count)),
        "layers_pattern": name.rpartition(".")[2],
    }


def _forward(module: Linear, x: Tensor) -> Tensor:
    factors = module.lora_A["default"].weight, module.lora_B["default"].weight
    return LoraFunction.apply(x, module.base_layer.weight, module.base_layer.bias, *factors, module.scaling["default"])


class LoraFunction(torch.autograd.Function):
    """x Wᵀ + bias + scale · x Aᵀ Bᵀ, without extra passes over whole activations to scale and add."""

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
