"""Losses for the gates of a star: of a proposal on its own text and on secret held-out text, and of a version before and after a step.

B blocks of one row each; as many are computed at once as a step of training takes
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elmwood.corpus.tokens import Packed
from elmwood.outer.compress import Floats
from elmwood.outer.gates import SHARE, Gains
from elmwood.outer.round import Pending
from elmwood.records import Recipe, Star
from elmwood.train.card.path import fast_path
from elmwood.train.data import Batch, batches, split_batch
from elmwood.train.inner.phase import documents_of, set_weights
from elmwood.train.loop import batch_loss, use_threads
from elmwood.train.loss import Abilities, find_abilities, loss

SECRET, OWN = 24, 8  # rows


class LossJudge:
    """Judges the proposals of one version. `secret`: bytes that nobody else knows; the held-out rows of a version follow from them."""

    def __init__(self, model: Any, train: Packed, holdout: Packed, star: Star, number: int, secret: bytes, weights: Path):
        self.model, self.train, self.star = model, train, star
        self.tensors: dict[str, Tensor] = dict(model.named_parameters())
        self.rng = np.random.default_rng([number, *secret])
        self.secret = draw(holdout, star.recipe, SECRET, self.rng)
        self.weights = weights
        self.able = find_abilities(model.eval(), min(8, star.recipe.length // 2))
        self.secret_before = self.losses(weights)

    def losses(self, weights: Path) -> Floats:
        """Of a version on the secret rows, nats per token of each."""
        set_weights(self.tensors, weights)
        return self._losses(self.secret)

    def gains(self, one: Pending, delta: Callable[[str], Floats]) -> Gains:
        """How much `SHARE` of a delta lowers the loss of rows."""
        own = self._own(one)
        set_weights(self.tensors, self.weights)
        own_before = self._losses(own)
        with torch.no_grad():
            for name, weight in self.tensors.items():
                weight += SHARE * torch.from_numpy(np.array(delta(name))).view(weight.shape).to(weight.device)
        return Gains(own_before - self._losses(own), self.secret_before - self._losses(self.secret))

    def _own(self, one: Pending) -> list[Batch]:
        """Some rows of the slice that a proposal was granted."""
        place = int(self.rng.integers(self.star.steps))
        found = batches(self.train, self.star.recipe, one.first + place, documents_of(self.train, self.star, one.part))
        return list(islice(found, -(-OWN // self.star.recipe.batch)))

    @torch.no_grad()
    def _losses(self, rows: Sequence[Batch]) -> Floats:
        self.model.eval()
        with use_threads(self.star.recipe.threads), fast_path(self.model, self.star.recipe, self.able) as able:
            found = [batch_loss(self.model, able, batch, partial(row_losses, self.model, able)) for batch in rows]
        return torch.cat([each_B.double().reshape(-1).cpu() for each_B in found]).numpy()


def row_losses(
    model: Any, able: Abilities, tokens_BL: Tensor, targets_BL: Tensor, positions_BL: Tensor | None, cut_S: Tensor | None
) -> Tensor:
    """The mean loss of each row [B]."""
    return loss(model, able, tokens_BL, targets_BL, positions_BL, cut_S, groups=len(tokens_BL))


def draw(packed: Packed, recipe: Recipe, count: int, rng: np.random.Generator) -> list[Batch]:
    """So many rows of text, by chance, in batches of the recipe's size."""
    chosen = recipe.model_copy(update={"batch": count, "rng_seed": int(rng.integers(2**31))})
    batch = next(batches(packed, chosen))
    return list(split_batch(batch, -(-count // recipe.batch)))
