"""An expert taken out of a finished mixture, tuned or not: its tensors and its rows of the gates go, all others keep their bytes.

What all share was averaged with it: as long as nothing of that was tuned it is averaged again without it, exactly, in the merge algebra.

E experts, H width
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.merge.moe.build import KEPT, LOW, Mixing, Written, add_card, list_changed, merge_shared, open_parts, take_files
from elmwood.merge.moe.shards import Shards
from elmwood.merge.rules.table import RULES, Rules
from elmwood.records import Forest, Mixture, Seed, fingerprint
from elmwood.store import Store
from elmwood.weights.tensors import Files, StoredTensor, decode, places

EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


def remove(mixture: Mixture, expert: str, store: Store, progress: Progress = silent, rules: Rules = RULES) -> Mixture:
    """The mixture without an expert, named by its digest; the seed's digest is its own feed-forward. Raises BadInput."""
    if expert not in mixture.experts:
        raise BadInput(f"expert {expert[:8]} is not in this mixture; its card lists who is (README.md of an export)")
    rest = tuple(digest for digest in mixture.experts if digest != expert)
    if len(rest) < max(2, mixture.gates.top_k):
        raise BadInput(
            f"without {expert[:8]} there are {len(rest)} experts for top-{mixture.gates.top_k}: mix again, with a smaller --top-k"
        )
    key = fingerprint("remove from mixture", mixture.digest, expert)
    with store.held(key, progress):
        if done := store.done(key):
            return store.load(done, Mixture)
        old = store.load(mixture.forest, Forest)
        forest = old.model_copy(update={"experts": tuple(digest for digest in old.experts if digest != expert)})
        store.add(forest)
        folder = store.work(key) / "out"
        rows, hashes = _write(mixture, mixture.experts.index(expert), forest, folder, store, progress, rules)
        facts: dict[str, object] = {"forest": forest.digest, "experts": rest, "parent": mixture.digest}
        facts |= {"removed": (*mixture.removed, expert)}
        facts |= {"method": mixture.method if rows else KEPT, "settings": mixture.settings if rows else {}}
        made = mixture.model_copy(update={**facts, "contributions": rows, "files": take_files(folder, hashes, store)})
        made = add_card(made, store.load(mixture.seed, Seed), store)
        store.finish(key, made)
        return made


def again(mixture: Mixture) -> bool:
    """Whether what all share can be averaged anew: it was averaged, and never tuned."""
    return bool(mixture.contributions) and (mixture.recipe is None or mixture.recipe.tuned == "routers")


def _write(mixture: Mixture, gone: int, forest: Forest, folder: Path, store: Store, progress: Progress, rules: Rules) -> Written:
    """Config and shards of all but one expert."""
    found = places(sorted(store.folder(mixture.files).glob("*.safetensors")))
    kept = {name: new for name in found if (new := rename_tensor(name, gone))}
    parts = open_parts(forest, mixture.seed in mixture.experts and mixture.experts[gone] != mixture.seed, store, rules)
    anew = again(mixture)
    shared = {name for name in kept if not name.endswith(".gate.weight") and not EXPERT.fullmatch(name)} if anew else set()
    wanted = shared if mixture.layout == "checkpoint" else shared & set(list_changed(parts))
    kept = {name: new for name, new in kept.items() if name not in shared or name in wanted}
    entries = [(new, found[name].dtype, _shape(name, found[name])) for name, new in kept.items()]
    gates = sum(name.endswith(".gate.weight") for name in kept)
    shards, files = Shards(entries, folder, gates, "mixture" if mixture.layout == "low-rank" else "model"), Files()
    for done, (name, new) in enumerate(kept.items(), 1):
        if name.endswith(".gate.weight"):
            row_EH = decode(files.read(found[name], 0, found[name].numbers), found[name].dtype).reshape(found[name].shape)
            shards.put_numbers(new, np.delete(row_EH, gone, 0))
        elif name not in shared:
            shards.copy(new, found[name], files)
        progress("experts", done, len(kept), "tensors")
    mixing = Mixing(gates=mixture.gates, layout=mixture.layout, method=mixture.method, settings=mixture.settings)
    rows = merge_shared(parts, mixing, shards, files, progress) if anew else mixture.contributions  # what was tuned keeps what it brought
    files.close()
    _settings(mixture, store.folder(mixture.files), folder)
    return rows, shards.close()


def rename_tensor(name: str, gone: int) -> str | None:
    """A tensor's name when the experts after `gone` have moved up; none for one of its own."""
    if not (match := EXPERT.fullmatch(name)):
        return name
    number = int(match[2])
    return None if number == gone else f"{match[1]}{number - (number > gone)}{match[3]}"


def _shape(name: str, place: StoredTensor) -> tuple[int, ...]:
    return (place.shape[0] - 1, *place.shape[1:]) if name.endswith(".gate.weight") else place.shape


def _settings(mixture: Mixture, source: Path, folder: Path) -> None:
    """config.json, or that of a low-rank mixture, with one expert fewer."""
    name = LOW if mixture.layout == "low-rank" else "config.json"
    said: Mapping[str, object] = json.loads((source / name).read_bytes())
    word = "experts" if mixture.layout == "low-rank" else next(one for one in ("num_local_experts", "num_experts") if one in said)
    (folder / name).write_text(
        json.dumps({**said, word: len(mixture.experts) - 1}, indent=1, sort_keys=mixture.layout == "checkpoint"), encoding="utf-8"
    )
