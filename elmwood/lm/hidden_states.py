"""Hidden states of a seed: vectors of its tokens, for the embedder `seed`; and statistics of the inputs of each feed-forward layer by
domain, for the untuned gates of a mixture.

W tokens of one text, H numbers of a state, B windows in one batch, T tokens of the longest; D domains
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from elmwood.corpus.build import documents
from elmwood.corpus.tokens import special_tokens_as_text
from elmwood.errors import BadInput, UnknownName
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model
from elmwood.records import Seed, Shard
from elmwood.store import Store

TOKENS = 1 << 13  # in one batch

TokenStates = tuple[NDArray[np.float32], NDArray[np.int64]]  # state_WH, end_W


def open_hidden_states(name: str, store: Store) -> Callable[[Sequence[str]], list[TokenStates]]:
    """Open a seed by its digest as a function of texts: for each, its tokens' last hidden states [W, H] float32, and the characters
    of the text up to the end of each token [W].

    A state depends on the text before it only. Text beyond the context is read in separate windows. Raises BadInput, Damaged.
    """
    try:
        seed = store.load(name, Seed)
    except UnknownName as error:
        raise BadInput(f"this partition embeds with the seed {name[:12]}, which is not in {store.root}: import that seed first") from error
    model, words = load_model(seed, store), tokenizer(seed, store)
    width = _read(model.base_model, [[seed.separator]]).shape[-1]  # not the hidden size, if the model projects it at the end

    def states(texts: Sequence[str]) -> list[TokenStates]:
        with special_tokens_as_text(words):
            encoded = words.encode_batch(list(texts), add_special_tokens=False)
        windows = [
            (n, start, [seed.separator, *one.ids[start : start + seed.context - 1]])
            for n, one in enumerate(encoded)
            for start in range(0, len(one.ids), seed.context - 1)
        ]
        found = [np.zeros((len(one.ids), width), np.float32) for one in encoded]
        for batch in in_batches(sorted(windows, key=lambda window: len(window[2]))):
            for (n, start, row), state_TH in zip(batch, _read(model.base_model, [row for _, _, row in batch]), strict=True):
                found[n][start : start + len(row) - 1] = state_TH[1 : len(row)]
        return [(state, np.array([end for _, end in one.offsets], np.int64)) for state, one in zip(found, encoded, strict=True)]

    return states


def in_batches(windows: list[tuple[int, int, list[int]]]) -> list[list[tuple[int, int, list[int]]]]:
    """Windows, sorted by length, in batches of at most TOKENS tokens, padding included."""
    made: list[list[tuple[int, int, list[int]]]] = []
    for window in windows:
        if not made or (len(made[-1]) + 1) * len(window[2]) > TOKENS:
            made.append([])
        made[-1].append(window)
    return made


@torch.inference_mode()
def _read(body: Any, rows: list[list[int]]) -> NDArray[np.float32]:
    """Last hidden states [B, T, H]; those past the end of a row are padding, which no state before depends on."""
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=next(body.parameters()).device)
    return body(input_ids=tokens_BT, use_cache=False).last_hidden_state.float().cpu().numpy()


class MlpInputs(NamedTuple):
    """Moments of the inputs of one feed-forward layer, float64."""

    mean_DH: NDArray[np.floating]
    within_HH: NDArray[np.floating]  # covariance around the domains' own means


@torch.inference_mode()
def measure_mlp_inputs(
    seed: Seed, domains: Sequence[Sequence[Shard]], store: Store, count: int = 32, length: int = 256
) -> dict[str, MlpInputs]:
    """By layer: over the first `length` tokens of the first `count` documents of each domain, each document on its own."""
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
        name: MlpInputs(np.stack([mean for mean, _, _ in parts]), sum(part for _, part, _ in parts) / sum(size for *_, size in parts))
        for name, parts in moments.items()
    }  # fmt: skip


def find_gates(model: nn.Module) -> Mapping[str, nn.Module]:
    """The routers of a mixture, by layer."""
    return {name.removesuffix(".mlp.gate"): module for name, module in model.named_modules() if name.endswith(".mlp.gate")}
