"""Tune mixtures with the same loop: the routers, or more; with a load-balancing loss (BTX, arXiv:2403.07816).

E experts, H width, K experts per token, N tokens
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from elmwood.corpus.build import documents
from elmwood.corpus.tokens import pack
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.lm.files import tokenizer
from elmwood.lm.hidden_states import find_gates
from elmwood.lm.load import load_model
from elmwood.lm.mixture_card import mixture_card
from elmwood.records import Mixture, Recipe, Seed, Shard, fingerprint
from elmwood.store import Store
from elmwood.store.headers import sort_metadata
from elmwood.train.loop import run
from elmwood.train.tasks import check_length, finish

ORDER = ("routers", "norms", "shared", "everything")  # parts that are tuned, each with those before it


def tune_key(mixture: Mixture, data: Sequence[Shard], recipe: Recipe) -> str:
    """The name of the task that tunes a mixture."""
    return fingerprint("tune", mixture.digest, [shard.blob for shard in data], recipe)


def tune(
    mixture: Mixture, data: Sequence[Shard], recipe: Recipe, store: Store, *, device: torch.device | str | None = None,
    progress: Progress = silent,
) -> Mixture:  # fmt: skip
    """Train the parts that `recipe.tuned` names, on a mixed sample of shards. Done once per inputs; interrupted runs resume.
    Raises BadInput."""
    seed = store.load(mixture.seed, Seed)
    if recipe.method != "router":
        raise BadInput(f"a mixture is tuned with method 'router', not {recipe.method!r}")
    if mixture.layout == "low-rank" and recipe.tuned != "routers":
        raise BadInput(f"--tuned {recipe.tuned}: a low-rank mixture tunes routers only: choose routers, or mix without --low-rank")
    check_length(recipe, seed.context)
    key = tune_key(mixture, data, recipe)
    with store.held(key, progress) as work:
        if done := store.done(key):
            return store.load(done, Mixture)
        packed = pack(data, tokenizer(seed, store), seed.separator, store, progress)
        model = open_mixture(mixture, store, device)
        select_trained(model, recipe.tuned)
        with watch_routers(model, recipe.balance) as watch:

            def log(**facts: Any) -> None:
                store.log(key, **facts)
                store.log(key, event="load", load=json.dumps(watch.take_loads()))

            trained = run(model, packed, recipe, work, log, progress, watch.balance)
        weights = {name: weight.detach().cpu() for name, weight in model.named_parameters() if weight.requires_grad}
        files = patch_files(mixture, model, weights, store)
        facts = {"parent": mixture.digest, "data": tuple(shard.blob for shard in data), "recipe": recipe, "curve": trained.curve}
        made = mixture.model_copy(update={**facts, "files": files})
        made = made.model_copy(update={"files": files | {"README.md": store.put(mixture_card(made, seed).encode())}})
        finish(store, key, made, recipe, trained)
        return made


def open_mixture(mixture: Mixture, store: Store, device: torch.device | str | None = None) -> Any:
    """The transformers model of a mixture, float32."""
    return load_model(store.load(mixture.seed, Seed), store, mixture, device, torch.float32)


def part_of(name: str) -> str:
    """The part of a mixture that a tensor belongs to: one of ORDER."""
    if name.endswith(".gate.weight"):
        return "routers"
    if ".experts." in name or ".mlp.base." in name:
        return "everything"
    return "norms" if "norm" in name else "shared"


def select_trained(model: Any, tuned: str) -> None:
    """Require gradients of the tuned parts only."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(ORDER.index(part_of(name)) <= ORDER.index(tuned))


class Watch:
    """The outputs of a mixture's routers in the current pass, and the load of each expert."""

    def __init__(self, weight: float):
        self.weight = weight
        self.logits: dict[str, Tensor] = {}  # layer -> [N, E]
        self.chosen: dict[str, Tensor] = {}  # layer -> [N, K]
        self.load: dict[str, Tensor] = {}  # layer -> sum of weights [E] since `take_loads`: soft routing chooses all experts

    def hook(self, layer: str) -> Callable[..., None]:
        def record(module: Any, given: Any, output: Any) -> None:
            logit_NE, weight_NK, chosen_NK = output
            self.logits[layer], self.chosen[layer] = logit_NE, chosen_NK
            weight_E = _sums(chosen_NK, weight_NK.detach().double(), logit_NE.shape[-1])
            self.load[layer] = self.load.get(layer, torch.zeros_like(weight_E)) + weight_E

        return record

    def balance(self) -> Tensor | None:
        """weight * E * sum over experts of (share chosen * mean probability), averaged over layers; `weight` if the load is even."""
        if not self.weight:
            return None
        losses = []
        for layer, logit_NE in self.logits.items():
            experts = logit_NE.shape[-1]
            chosen_NK = self.chosen[layer]
            share_E = _sums(chosen_NK, torch.ones_like(chosen_NK, dtype=torch.float32), experts) / chosen_NK.numel()
            losses.append(experts * (share_E * torch.softmax(logit_NE.float(), -1).mean(0)).sum())
        return self.weight * torch.stack(losses).mean()

    def take_loads(self) -> dict[str, list[float]]:
        """Layer -> share of the weight of each expert since the last call."""
        shares = {layer: (weight_E / weight_E.sum()).tolist() for layer, weight_E in self.load.items()}
        self.load.clear()
        return shares


def _sums(chosen_NK: Tensor, weight_NK: Tensor, experts: int) -> Tensor:
    """The sum of each expert's weights [E], on the device: bincount would ask it for the largest number."""
    return weight_NK.new_zeros(experts).index_add_(0, chosen_NK.flatten(), weight_NK.flatten())


@contextmanager
def watch_routers(model: Any, weight: float = 0.0) -> Iterator[Watch]:
    """Watch a mixture's routers with hooks while the block runs."""
    watch = Watch(weight)
    hooks = [module.register_forward_hook(watch.hook(layer)) for layer, module in find_gates(model).items()]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def measure_loads(
    mixture: Mixture, domains: Sequence[Sequence[Shard]], store: Store, count: int = 32, length: int = 256, *,
    device: torch.device | str | None = None, progress: Progress = silent,
) -> dict[str, list[list[float]]]:  # fmt: skip
    """Layer -> for each domain, the share of the weight of each expert on its text: the first `length` tokens of `count` documents.

    Raises BadInput if a domain has no text.
    """
    seed = store.load(mixture.seed, Seed)
    model, words = open_mixture(mixture, store, device), tokenizer(seed, store)
    found: dict[str, list[list[float]]] = {}
    with watch_routers(model) as watch:
        for done, shards in enumerate(domains):
            for document in islice(documents(shards, store), count):
                ids = [seed.separator, *words.encode(document.text[: 16 * length], add_special_tokens=False).ids]
                model(torch.tensor([ids[: min(length, seed.context)]], device=model.device), use_cache=False)
            if not (shares := watch.take_loads()):
                raise BadInput(f"domain {done} has no text to measure loads on: leave it out, or cluster with --holdout")
            for layer, share_E in shares.items():
                found.setdefault(layer, []).append(share_E)
            progress("read", done + 1, len(domains), "domains")
    return found


def patch_files(mixture: Mixture, model: Any, weights: dict[str, Tensor], store: Store) -> dict[str, str]:
    """The mixture's files with these weights in place of the old ones, in the same dtypes; other files stay as they are."""
    with tempfile.TemporaryDirectory() as scratch:
        named = weights if mixture.layout == "low-rank" else _on_disk(model, weights, Path(scratch) / "saved")
        files = dict(mixture.files)
        for name in [name for name in files if name.endswith(".safetensors")]:
            with safe_open(store.get(files[name]), "pt") as file:
                keys, facts = list(file.keys()), file.metadata()
                if not named.keys() & set(keys):
                    continue
                old = {key: file.get_tensor(key) for key in keys}
            new = {key: named[key].to(value.dtype).contiguous() if key in named else value for key, value in old.items()}
            save_file(new, Path(scratch) / "new", metadata=facts)
            sort_metadata(Path(scratch) / "new")
            files[name] = store.put(Path(scratch) / "new")
        return files


def _on_disk(model: Any, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Weights under the names of transformers' checkpoint files, where each expert has tensors of its own."""
    model.save_pretrained(folder, state_dict=weights)
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    return found
