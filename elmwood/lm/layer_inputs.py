"""What enters the feed-forward of each layer of a seed, domain by domain: gates before any tuning are made of it.

D domains, H width, T tokens
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from elmwood.corpus.build import documents
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model
from elmwood.records import Seed, Shard
from elmwood.store import Store


class Seen(NamedTuple):
    """Moments of what enters one feed-forward, float64."""

    mean_DH: NDArray[np.floating]
    within_HH: NDArray[np.floating]  # covariance around the domains' own means


@torch.inference_mode()
def hidden(seed: Seed, domains: Sequence[Sequence[Shard]], store: Store, count: int = 32, length: int = 256) -> dict[str, Seen]:
    """By layer: of the first `length` tokens of the first `count` documents of each domain, each read alone by the seed."""
    model, words = load_model(seed, store), tokenizer(seed, store)
    found: dict[str, list[Any]] = {}

    def watch(name: str) -> Any:
        return lambda module, given: found[name].append(given[0].flatten(0, -2).double().cpu().numpy())

    mlps = {name.removesuffix(".mlp"): module for name, module in model.named_modules() if name.endswith(".mlp")}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in mlps.items()]
    moments: dict[str, list[tuple[Any, Any, int]]] = {name: [] for name in mlps}
    for shards in domains:
        found |= {name: [] for name in mlps}
        for document in islice(documents(shards, store), count):
            ids = [seed.separator, *words.encode(document.text[: 16 * length], add_special_tokens=False).ids][: min(length, seed.context)]
            model(torch.tensor([ids], device=model.device), use_cache=False)
        for name, parts in found.items():
            x_TH = np.concatenate(parts)
            centred_TH = x_TH - x_TH.mean(0)
            moments[name].append((x_TH.mean(0), centred_TH.T @ centred_TH, len(x_TH)))
    for hook in hooks:
        hook.remove()
    return {
        name: Seen(np.stack([mean for mean, _, _ in parts]), sum(part for _, part, _ in parts) / sum(size for *_, size in parts))
        for name, parts in moments.items()
    }  # fmt: skip


def gates_of(model: nn.Module) -> Mapping[str, nn.Module]:
    """The routers of a mixture, by layer."""
    return {name.removesuffix(".mlp.gate"): module for name, module in model.named_modules() if name.endswith(".mlp.gate")}
