"""Learning rates as pure functions of the step."""

import math
from collections.abc import Callable

from elmwood.records import Recipe

DECAY = 0.2  # share of the steps in which a WSD schedule comes down (arXiv:2404.06395 finds 10-20 % enough)


def cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    return 1 - done


def constant(done: float) -> float:
    return 1.0


def wsd(done: float) -> float:
    """Warm up, stay, decay: flat, then down to nothing in the last fifth."""
    return min(1.0, (1 - done) / DECAY)


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate of step 0 ≤ step < recipe.steps: a linear warm-up from one share to the peak, then from the peak to `final` of it."""
    warm = math.ceil(recipe.warmup * recipe.steps)
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    done = (step - warm + 1) / max(1, recipe.steps - warm)  # the last step stands at 1
    height = SCHEDULES[recipe.schedule](done)
    floor = 1.0 if recipe.schedule == "constant" else recipe.final
    return recipe.learning_rate * (floor + (1 - floor) * height)
