"""The fastest way through a model that it allows, for the length of a run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from elmwood.records import Recipe
from elmwood.train.card.attention import DOCUMENTS, FLOAT32, attending, can_choose
from elmwood.train.card.compiled import compile_layers, narrow_residuals, pays
from elmwood.train.card.precision import SHORT, autocasts
from elmwood.train.loss import FUSED, Abilities, base_model, find_abilities

# for rows of one document, in this order: cuDNN's takes two thirds of the time of the flash kernel on an H100
KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def fast_path(model: Any, recipe: Recipe, able: Abilities | None = None) -> Iterator[Abilities]:
    """What a model allows (`able`: known already), used inside the block."""
    able = able or find_abilities(model.eval(), min(8, recipe.length // 2))
    inner, device = base_model(model), next(model.parameters()).device
    with ExitStack() as undo:
        if able.packed == "documents":
            undo.enter_context(attending(inner, DOCUMENTS))
        if device.type == "cpu" and recipe.length <= SHORT and autocasts(model, device) and can_choose(inner):
            undo.enter_context(attending(inner, FLOAT32))
        if device.type != "cpu":
            undo.enter_context(narrow_residuals(inner))
        if device.type == "cuda":
            undo.enter_context(sdpa_kernel(KERNELS, set_priority=True))
        if pays(model, recipe, device):
            undo.enter_context(compile_layers(inner))
            undo.callback(FUSED.reset, FUSED.set(True))
        yield able
