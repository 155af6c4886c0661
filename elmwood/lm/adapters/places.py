"""The modules of a model that can carry a LoRA: linear layers whose change is the same change of one matrix of the seed's files."""

import inspect
import re
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """The modules that PEFT takes for linear layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def head_of(model: Any) -> str | None:
    """The name of the module that makes logits."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def unfit(model: Any, stored: Collection[str] | None = None) -> dict[str, str]:
    """The linear layers that cannot carry an adapter, and why: a LoRA there would train, and then be one thing live and another when it
    is folded, or nothing. `stored`: the tensors in the seed's files, by default all of the model's."""
    layers = linear_layers(model)
    times = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    multiplies = {type(module): module for module in layers.values()}  # one of each class
    multiplies = {kind: _multiplies(module) for kind, module in multiplies.items()}
    stacked = {leaf for leaf in {name.rpartition(".")[2] for name in layers} if adapts_experts(model, [leaf])}
    found = {}
    for name, module in layers.items():
        parent, _, leaf = name.rpartition(".")
        kind: Any = type(model.get_submodule(parent))
        if times[id(module.weight)] > 1:
            found[name] = "its matrix stands elsewhere in the model too, as the embedding's, and would change there as well when folded"
        elif not multiplies[type(module)]:
            found[name] = f"a {type(module).__name__} does more than multiply by its matrix"
        elif leaf in stacked:
            found[name] = "PEFT takes the name for a part of stacked experts, and adapts these instead"
        elif leaf in _read_by_code(kind):
            found[name] = f"{kind.__name__} reads its matrix, past the adapter"
        elif stored is not None and f"{name}.weight" not in stored:
            found[name] = "the seed's files have no matrix of that name: import the seed again"
    return found


def first_unfit(adapted: Any, layers: Collection[str], refused: Mapping[str, str]) -> str | None:
    """The first module that PEFT adapted and that cannot carry an adapter, and why. `layers`, `refused`: of the model before."""
    from elmwood.lm.adapters.peft_import import LoraLayer  # PEFT takes a second to import

    for full, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = full.removeprefix("base_model.model.")
        if name not in layers:
            return f"{name} cannot carry an adapter: of class {type(module.get_base_layer()).__name__}, it is no linear layer"
        if name in refused:
            return f"{name} cannot carry an adapter: {refused[name]}"
    return None


def _multiplies(module: Any) -> bool:
    """Whether what comes out is one tensor of the layer's outputs: routers, which are built on linear layers, give several."""
    if type(module) is nn.Linear or isinstance(module, Conv1D) or hasattr(module.weight, "quant_state"):  # packed in four bits
        return True
    dtype = module.weight.dtype if module.weight.dtype.is_floating_point else torch.float32
    try:
        with torch.no_grad():
            y = module(torch.zeros(1, 2, module.in_features, dtype=dtype, device=module.weight.device))
    except (RuntimeError, ValueError, TypeError):
        return False
    return isinstance(y, torch.Tensor) and y.shape == (1, 2, module.out_features)


@cache
def _read_by_code(kind: type) -> frozenset[str]:
    """The layers of a class of modules whose weights its code reads instead of calling them, as Mamba's does for its kernels."""
    try:
        text = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"\bself\.(\w+)\.weight\b(?!\s*[.\[])", text))


def adapts_experts(model: Any, targets: str | list[str]) -> bool:
    """Whether PEFT takes these target modules for parts of stacked experts, as transformers 4 named them."""
    from elmwood.lm.adapters.peft_import import LoraConfig, convert_peft_config_for_transformers

    config = LoraConfig(target_modules=targets)
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two parts that are fused
        return True
    return bool(config.target_parameters)
