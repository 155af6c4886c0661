"""Statistics of an expert, which let others merge it without its text: Gram matrices of the inputs of its linear layers, and squared
gradients (the diagonal of the empirical Fisher matrix), both over a few rows of its own training documents.

T tokens of a row, I inputs of a linear layer, R directions kept of a wide one
"""

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from elmwood.corpus.build import read_shard
from elmwood.corpus.tokens import pack
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model
from elmwood.records import Expert, Seed, Statistics, fingerprint
from elmwood.store import Store
from elmwood.store.headers import sort_metadata
from elmwood.train.data import batches
from elmwood.train.loop import batch_loss, use_threads
from elmwood.train.loss import find_abilities

FILE = "statistics.safetensors"
WIDE = 2048  # a layer with more inputs gets a sketch: the strongest directions, and a diagonal for the rest
DIRECTIONS = 256


def statistics(
    expert: Expert, store: Store, *, rows: int = 64, device: torch.device | str | None = None, progress: Progress = silent
) -> Statistics:  # fmt: skip
    """The statistics of an expert over `rows` rows (its recipe's length) of its training documents. Done once. Raises BadInput, Damaged.

    Memory: for every weight a gradient and its square, four bytes each, beside the model and the Gram matrices.
    """
    if not expert.data:
        raise BadInput(f"expert {expert.digest[:8]} names no training text: its statistics must be computed where the text is")
    key = fingerprint("statistics", expert.digest, rows)
    with store.held(key, progress):
        if done := store.done(key):
            return store.load(done, Statistics)
        seed = store.load(expert.seed, Seed)
        shards = [read_shard(blob, store) for blob in expert.data]
        packed = pack(shards, tokenizer(seed, store), seed.separator, store)
        recipe = expert.recipe.model_copy(update={"batch": 1, "rng_seed": expert.recipe.rng_seed + 1})
        count = max(1, min(rows, len(packed.tokens) // recipe.length))
        model: Any = load_model(seed, store, expert, device, torch.float32)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        with use_threads(recipe.threads):
            grams, fisher = _measure(model.requires_grad_(True), islice(batches(packed, recipe), count), count, recipe.length, progress)
        tensors = {f"fisher|{name}": value for name, value in fisher.items()} | grams.tensors()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / FILE
            save_file(tensors, path, {"format": "elmwood-statistics", "same": json.dumps(grams.same, sort_keys=True)})
            sort_metadata(path)
            files = {FILE: store.put(path)}
        numbers = sum(value.numel() for value in fisher.values())
        mean = float(sum(value.double().sum() for value in fisher.values())) / numbers
        made = Statistics(expert=expert.digest, rows=count, tokens=count * recipe.length, fisher=mean, files=files)
        store.finish(key, made)
        return made


def _measure(model: Any, rows: Any, count: int, length: int, progress: Progress) -> tuple["Grams", dict[str, Tensor]]:
    able = find_abilities(model, min(8, length // 2))
    grams = Grams(model)
    weights = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for number, batch in enumerate(rows):
        batch_loss(model, able, batch).backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                fisher[name].addcmul_(weight.grad, weight.grad, value=1 / count)
        model.zero_grad()
        progress("statistics", (number + 1) * length, count * length, "tokens")
    grams.close()
    return grams, {name: value.cpu() for name, value in fisher.items()}


class Grams:
    """Sums of xᵀx over the inputs x of each linear layer, while a model runs. Layers with the same input share one (q, k, v; gate, up)."""

    def __init__(self, model: Any):
        head = model.get_output_embeddings()
        self.gram: dict[str, Tensor] = {}
        self.factor: dict[str, Tensor] = {}
        self.rest: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.same: dict[str, str] = {}
        self._last: tuple[Any, str] = (None, "")
        linear = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
        self._hooks = [module.register_forward_pre_hook(self._hook(f"{name}.weight")) for name, module in linear]

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._last[0] is inputs[0]:
                self.same[name] = self._last[1]
                return
            self._last = (inputs[0], name)
            with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):  # sums of products stay in float32
                self._add(name, inputs[0].detach().flatten(0, -2).float())

        return look

    def _add(self, name: str, x_TI: Tensor) -> None:
        self.tokens[name] = self.tokens.get(name, 0) + len(x_TI)
        if x_TI.shape[1] <= WIDE:
            gram_II = x_TI.t() @ x_TI
            self.gram[name] = self.gram[name] + gram_II if name in self.gram else gram_II
            return
        stacked = torch.cat([self.factor[name], x_TI]) if name in self.factor else x_TI
        _, size_R, direction_RI = torch.linalg.svd(stacked, full_matrices=False)
        kept_RI = size_R[:, None] * direction_RI
        self.factor[name] = kept_RI[:DIRECTIONS].contiguous()
        self.rest[name] = self.rest.get(name, torch.zeros_like(x_TI[0])) + kept_RI[DIRECTIONS:].square().sum(0)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = (None, "")

    def tensors(self) -> dict[str, Tensor]:
        """Means over tokens: `gram|<tensor>`, `factor|<tensor>`, `rest|<tensor>`."""
        found = {f"gram|{name}": value / self.tokens[name] for name, value in self.gram.items()}
        found |= {f"factor|{name}": value / np.sqrt(self.tokens[name]) for name, value in self.factor.items()}
        found |= {f"rest|{name}": value / self.tokens[name] for name, value in self.rest.items()}
        return {name: value.cpu().contiguous() for name, value in found.items()}
