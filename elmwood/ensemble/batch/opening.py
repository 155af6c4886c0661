"""The engine of a model's record."""

import torch

from elmwood.ensemble.batch.engine import open_batched
from elmwood.ensemble.batch.interface import USUAL, Engine, Limits
from elmwood.ensemble.batch.turns import Turns
from elmwood.ensemble.mixture import open_model
from elmwood.records import Record
from elmwood.store import Store


def open_engine(
    record: Record, store: Store, device: torch.device | str | None = None, limits: Limits = USUAL, like: Engine | None = None
) -> Engine:
    """A model, opened to continue many texts: in rows of one pass (`open_batched`), or, where the model is none of those, in turns: full
    experts in an ensemble, DoRA, adapters summed for a prompt, and what keeps more than keys and values. `like`: an engine to share the
    weights of the seed with, where it is the same. Raises UnknownName, ForeignExpert, Damaged."""
    return open_batched(record, store, device, limits, like) or Turns(open_model(record, store, device), limits)
