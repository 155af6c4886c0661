"""Layers of a transformers model compiled one by one: they share their code, so one layer's compilation serves all.

Elementwise operations between products become single kernels. The residual stream of a model whose weights are float32 is bf16.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from elmwood.records import Recipe

WORTH = 2e15  # floating-point operations of a run, from which the ten seconds that a compiler takes pay (an H100)


def layers_of(model: Any) -> list[Any]:
    """The equal layers of a transformers model, in order; none if it has no list of them."""
    return _trunk(model)[1]


def _trunk(model: Any) -> tuple[Any, list[Any]]:
    """The module that holds the list of layers, and these."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (
        (one, child) for one in model.modules() for child in one.children() if isinstance(child, nn.ModuleList) and len(child) == count
    )
    owner, found = next(lists, (model, []))
    return owner, list(found)


def pays(model: Any, recipe: Recipe, device: torch.device) -> bool:
    """Whether to compile: on CUDA, for runs so long, and weights that are no packed bits."""
    work = 6 * recipe.together * recipe.tokens * sum(weight.numel() for weight in model.parameters())
    able = device.type == "cuda" and find_spec("triton") is not None and recipe.method in ("full", "lora")
    return able and work > WORTH and not any(hasattr(weight, "quant_state") for weight in model.parameters())


@contextmanager
def narrow_residuals(model: Any) -> Iterator[None]:
    """Under autocast, what goes into the first layer is bf16, and so is what the layers add to it."""
    layers = layers_of(model)

    def cast(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x = given[0] if given else named["hidden_states"]
        if not torch.is_autocast_enabled(x.device.type):
            return None
        x = x.to(torch.get_autocast_dtype(x.device.type))
        return ((x, *given[1:]), named) if given else (given, named | {"hidden_states": x})

    with ExitStack() as undo:
        if layers:
            undo.callback(layers[0].register_forward_pre_hook(cast, with_kwargs=True).remove)
        yield


@contextmanager
def compile_layers(model: Any, backend: str = "inductor") -> Iterator[None]:
    """Compile the layers' forward passes inside the block."""
    trunk, layers = _trunk(model)
    trained = any(weight.requires_grad for layer in layers[:1] for weight in layer.parameters())

    def alike(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """What differs between layers or steps would be compiled again: that the first input has no gradient, the number of documents."""
        x = given[0] if given else named["hidden_states"]
        if trained and x.is_leaf and torch.is_grad_enabled():
            x.requires_grad_()
        if (cut_S := named.get("cu_seq_lens_q")) is not None:
            torch._dynamo.maybe_mark_dynamic(cut_S, 0)

    last = [module for name, module in trunk.named_children() if "norm" in name]
    for layer in (*layers, *last):
        layer.forward = torch.compile(layer.forward, backend=backend)
    hooks = [layer.register_forward_pre_hook(alike, with_kwargs=True) for layer in layers[:1]]
    try:
        yield
    finally:
        for layer in (*layers, *last):
            del layer.forward
        for hook in hooks:
            hook.remove()
