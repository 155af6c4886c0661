"""Experts of one seed -> one mixture of experts (BTX, arXiv:2403.07816), streamed tensor by tensor.

Feed-forward layers become experts as they are; what all share is averaged through the merge algebra, or stays the seed's.

E experts, H width, L layers, N values of a piece
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, UnknownName
from elmwood.lm.files import seed_folder
from elmwood.lm.mixture_card import mixture_card
from elmwood.merge.checkpoint import Finisher
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.moe.gates import GATES, GateInputs, GatesFn, check_rows, direction, layers_of, random_rows
from elmwood.merge.moe.layout import FEED_FORWARD, Cell, cells, family_of, mixed_config
from elmwood.merge.moe.shards import Shards
from elmwood.merge.moe.trial import try_copies
from elmwood.merge.rules.table import RULES, Rules, code_of, settle
from elmwood.merge.states import contributions, open_all, open_expert, open_pass, statistics_of
from elmwood.merge.sums.stream import Wanted
from elmwood.records import Contribution, Expert, Forest, Frozen, Gates, Mixture, Partition, Seed, fingerprint
from elmwood.store import Store
from elmwood.weights.experts import Low, Source, Whole, seed_places
from elmwood.weights.tensors import PIECE, Bytes, Files, StoredTensor, decode, places

KEPT = "seed"  # the method that leaves what all share as it is
LOW = "mixture.json"  # of a low-rank mixture, beside its shards
Rows = Mapping[str, NDArray[np.floating]]  # layer, as in model.layers.0 -> [E, H]
Written = tuple[tuple[Contribution, ...], dict[str, str | None]]  # what each expert brought to what all share; hashes of the files


class Mixing(Frozen):
    """What a mixture is to be like."""

    gates: Gates = Gates()
    layout: str = "checkpoint"  # or low-rank: adapters stay factors over one shared feed-forward
    method: str = "average"  # of what all share: a row of the table of merge rules, or KEPT
    settings: dict[str, float] = {}  # noqa: RUF012  # pydantic copies it


class Parts(NamedTuple):
    """The seed and its experts, opened."""

    seed: str  # digest
    config: Mapping[str, Any]
    tensors: dict[str, StoredTensor]
    sources: list[Source]  # in the order of their digests, as sums take them
    order: tuple[str, ...]  # digests by number in the mixture; the seed last, where it is one
    store: Store | None = None  # none where there are no sources
    rules: Rules = RULES


def order_of(forest: Forest, with_seed: bool, store: Store) -> tuple[str, ...]:
    """Digests of the experts by domain, and the seed's last where its feed-forward is one too."""
    found = sorted((store.load(digest, Expert) for digest in forest.experts), key=lambda e: (e.domain is None, e.domain or 0, e.digest))
    return tuple(expert.digest for expert in found) + ((forest.seed,) if with_seed else ())


def open_parts(forest: Forest, with_seed: bool, store: Store, rules: Rules = RULES) -> Parts:
    """Raises BadSeed, ForeignExpert."""
    seed = store.load(forest.seed, Seed)
    config = json.loads((seed_folder(seed, store) / "config.json").read_bytes())
    family_of(config)
    tensors, sources, _ = open_all(seed, {digest: everywhere(1.0) for digest in forest.experts}, store, False)
    return Parts(seed.digest, config, tensors, sources, order_of(forest, with_seed, store), store, rules)


def find_directions(forest: Forest, order: Sequence[str], store: Store) -> dict[str, list[NDArray[np.floating] | None]]:
    """Layer -> for each expert the input that its adapters of gate_proj and up_proj change most; none for the seed. Raises BadInput."""
    seed = store.load(forest.seed, Seed)
    tensors = seed_places(seed, store)
    found: dict[str, list[NDArray[np.floating] | None]] = {layer: [] for layer in layers_of(tensors)}
    for digest in order:
        one = None if digest == seed.digest else open_expert(store.load(digest, Expert), seed, tensors, store)
        if isinstance(one, Whole):
            raise BadInput(f"expert {digest[:8]} is a full checkpoint, and Arrow reads its gates off adapters: take --gates hidden")
        for layer, column in found.items():
            names = [f"{layer}.mlp.{part}.weight" for part in ("gate_proj", "up_proj")]
            column.append(direction([one.pair(name) for name in names if one.has(name)]) if one else None)
    return found


def gate_rows(forest: Forest, gates: Gates, scales: Sequence[float], store: Store, make: GatesFn | None = None) -> list[Rows]:
    """The gates of a mixture before any tuning, at each scale. `make`: what makes them, where it is none of the table (`gates.kind`).

    Raises UnknownName, BadInput.
    """
    if make is None and gates.kind not in GATES:  # a record may come from others, so a 'module:function' is never looked up here
        raise UnknownName(f"no gates {gates.kind!r}; have {', '.join(sorted(GATES))}")
    make = make or GATES[gates.kind]
    seed, order = store.load(forest.seed, Seed), order_of(forest, gates.seed_bias is not None, store)

    @cache
    def domains() -> list[int | None]:
        return [None if digest == seed.digest else _domain(store.load(digest, Expert)) for digest in order]

    @cache
    def arrows() -> dict[str, list[NDArray[np.floating] | None]]:
        return find_directions(forest, order, store)

    @cache
    def hidden() -> Any:
        from elmwood.lm.hidden_states import measure_mlp_inputs  # torch

        domains()  # fails sooner than the text is read
        return measure_mlp_inputs(seed, [domain.train for domain in store.load(forest.partition, Partition).domains], store)

    def rows(layer: str, width: int, scale: float) -> NDArray[np.floating]:
        return make(GateInputs(layer, width, order, scale, gates.seed_bias or 0.0, gates.rng_seed, domains, lambda: hidden()[layer][:2],
                               lambda: arrows()[layer]))  # fmt: skip

    layers = layers_of(seed_places(seed, store))
    return [{layer: rows(layer, width, scale) for layer, width in layers.items()} for scale in scales]


def _domain(expert: Expert) -> int:
    if expert.domain is None:
        raise BadInput(f"expert {expert.digest[:8]} is of no domain: gates cannot know its text; take random ones and tune them")
    return expert.domain


def mix(
    forest: Forest, rows: Rows, mixing: Mixing, store: Store, progress: Progress = silent, rules: Rules = RULES
) -> Mixture:  # fmt: skip
    """Done once per inputs. `rows` are the gates (see gates.py). Raises BadSeed, BadInput, ForeignExpert."""
    check_rows(rows, order_of(forest, mixing.gates.seed_bias is not None, store), forest.seed, mixing.gates.top_k)
    packed = hashlib.sha256(b"".join(name.encode() + np.asarray(rows[name], "<f8").tobytes() for name in sorted(rows))).hexdigest()
    key = fingerprint("mixture", forest, mixing, packed, *([] if mixing.method == KEPT else code_of(mixing.method, rules)))
    with store.held(key, progress):
        if done := store.done(key):
            return store.load(done, Mixture)
        parts = open_parts(forest, mixing.gates.seed_bias is not None, store, rules)
        folder = store.work(key) / "out"
        if mixing.layout == "checkpoint":
            try_copies(parts.config, write_copies, store)
        brought, hashes = (write_low if mixing.layout == "low-rank" else write)(parts, rows, mixing, folder, progress)
        if not brought:
            mixing = mixing.model_copy(update={"method": KEPT, "settings": {}})
        made = Mixture(
            seed=parts.seed, forest=forest.digest, experts=parts.order, gates=mixing.gates, layout=mixing.layout,  # type: ignore[arg-type]
            method=mixing.method, settings=mixing.settings, contributions=brought,
            files=take_files(folder, hashes, store),
        )  # fmt: skip
        made = add_card(made, store.load(parts.seed, Seed), store)
        store.finish(key, made)
        return made


def take_files(folder: Path, hashes: Mapping[str, str | None], store: Store) -> dict[str, str]:
    """The files of a folder below the store's own root, which go into the store. `hashes`: of those that are known."""
    return {path.name: store.take(path, hashes.get(path.name)) for path in sorted(folder.iterdir())}


def write_copies(config: Mapping[str, Any], source: Path, number: int, top_k: int, folder: Path) -> None:
    """A mixture of one model's copies, with random gates."""
    parts = Parts("seed", config, places(sorted(source.glob("*.safetensors"))), [], ("seed",) * number)
    rows = random_rows(parts.tensors, [str(e) for e in range(number)], 0, 50.0)
    write(parts, rows, Mixing(gates=Gates(top_k=top_k)), folder, silent)


def add_card(made: Mixture, seed: Seed, store: Store) -> Mixture:
    """With its card, and for a checkpoint with the seed's tokenizer."""
    files = dict(made.files)
    if made.layout == "checkpoint":
        source = seed_folder(seed, store)
        skipped = (".safetensors", ".index.json", "config.json", "README.md")
        files |= {name: store.put(source / name) for name in seed.files if not name.endswith(skipped) or name == "generation_config.json"}
    made = made.model_copy(update={"files": files})
    return made.model_copy(update={"files": files | {"README.md": store.put(mixture_card(made, seed).encode())}})


def write(parts: Parts, rows: Rows, mixing: Mixing, folder: Path, progress: Progress) -> Written:
    """The checkpoint's config and shards."""
    family = family_of(parts.config)
    plan = cells(family, parts.tensors, len(parts.order))
    if len(parts.order) < 2:
        raise BadInput("a mixture takes two experts or more (the seed's own may be one): name others, or keep the seed's")
    shards = Shards([(cell.name, cell.dtype, cell.shape) for cell in plan], folder, alone=sum(cell.gate for cell in plan))
    said = mixed_config(parts.config, len(parts.order), mixing.gates.top_k)
    (folder / "config.json").write_text(json.dumps(said, indent=1, sort_keys=True), encoding="utf-8")
    by_digest = {one.digest: one for one in parts.sources}
    files = Files()
    for cell in plan:
        if cell.gate:
            shards.put_numbers(cell.name, _fitting(rows, cell))
    found = merge_shared(parts, mixing, shards, files, progress)
    own = [cell for cell in plan if cell.expert is not None]
    for done, cell in enumerate(own, 1):
        _expert(cell, by_digest.get(parts.order[cell.expert or 0]), parts.tensors[cell.source], shards, files)
        progress("experts", done, len(own), "tensors")
    files.close()
    return found, shards.close()


def write_low(parts: Parts, rows: Rows, mixing: Mixing, folder: Path, progress: Progress) -> Written:
    """The factors of every expert's feed-forward (scale in B), gates, and what all share where it is not the seed's. Raises BadInput."""
    if whole := next((one for one in parts.sources if isinstance(one, Whole)), None):
        raise BadInput(f"expert {whole.digest[:8]} is a full checkpoint: only adapters stay low-rank; take the layout checkpoint")
    plan = cells(family_of(parts.config)._replace(block="mlp"), parts.tensors, len(parts.order))
    gates = [cell for cell in plan if cell.gate]
    low = {one.digest: one for one in parts.sources if isinstance(one, Low)}
    factors: dict[str, NDArray[np.float64]] = {}
    for e, digest in enumerate(parts.order):
        for name in low[digest].factors if digest in low else ():
            if match := FEED_FORWARD.fullmatch(name):
                a_RI, b_OR, scale = low[digest].pair(name)
                top = f"{match['layer']}.mlp.experts.{e}.{match['part']}"
                factors |= {f"{top}.lora_A": a_RI, f"{top}.lora_B": b_OR * scale}
    shared = [] if mixing.method == KEPT else list_changed(parts)
    entries = [(cell.name, "F32", cell.shape) for cell in gates] + [(name, "F32", value.shape) for name, value in factors.items()]
    entries += [(name, parts.tensors[name].dtype, parts.tensors[name].shape) for name in shared]
    shards, files = Shards(entries, folder, len(gates), "mixture"), Files()
    for cell in gates:
        shards.put_numbers(cell.name, _fitting(rows, cell))
    for name, value in factors.items():
        shards.put_numbers(name, value)
    found = merge_shared(parts, mixing, shards, files, progress)
    files.close()
    (folder / LOW).write_text(json.dumps({"experts": len(parts.order), "top_k": mixing.gates.top_k}, indent=1), encoding="utf-8")
    return found, shards.close()


def _fitting(rows: Rows, cell: Cell) -> NDArray[np.floating]:
    row_EH = rows.get(cell.source)
    if row_EH is None or row_EH.shape != cell.shape:
        raise BadInput(f"{cell.source} needs gates of shape {cell.shape}, and these are {None if row_EH is None else row_EH.shape}")
    return row_EH.astype(np.float32)  # a router's own precision


def _expert(cell: Cell, source: Source | None, place: StoredTensor, shards: Shards, files: Files) -> None:
    """One tensor of one expert: the seed's own, a checkpoint's, or the seed's plus an adapter's delta."""
    if isinstance(source, Whole):
        shards.copy(cell.name, source.places[cell.source], files)
    elif source is None or not source.has(cell.source):
        shards.copy(cell.name, place, files)
    else:
        for first in range(0, place.numbers, PIECE):
            last = min(place.numbers, first + PIECE)
            seed_N = decode(files.read(place, first, last), place.dtype).astype(np.float64)
            shards.put_numbers(cell.name, seed_N + source.delta(cell.source, first, last, place.shape[-1]), first)


class Into(NamedTuple):
    """Puts what the merge makes of a seed's tensors where a mixture has them."""

    shards: Shards
    names: Mapping[StoredTensor, str]

    def put(self, place: StoredTensor, first: int, raw: Bytes) -> None:
        self.shards.put(self.names[place], first, raw)


def merge_shared(parts: Parts, mixing: Mixing, shards: Shards, files: Files, progress: Progress) -> tuple[Contribution, ...]:
    """What all experts share, of those tensors that `shards` has room for: by the merge rule, with the seed as one more
    expert that changed nothing where it is one; what nobody changed is copied."""
    shared = {name: place for name, place in parts.tensors.items() if name in shards.places and not FEED_FORWARD.fullmatch(name)}
    sources = [] if mixing.method == KEPT else parts.sources
    written: set[str] = set()
    rows: tuple[Contribution, ...] = ()
    if parts.store and any(one.has(name) for one in sources for name in shared):
        rule, begins, ends = settle(mixing.method, mixing.settings, parts.rules)
        if mixing.method == "average" and parts.order[-1] == parts.seed:
            ends["scale"] *= len(sources) / (len(sources) + 1)
        weights = [everywhere(1.0)] * len(sources)
        work = open_pass(shared, sources, weights, [Wanted(rule, begins)], (0, 1), parts.store, progress)
        into = Into(shards, {place: name for name, place in shared.items()})
        finisher = Finisher(rule, begins | ends, shared, partial(work.total, 0), into)
        for piece in work.run(finisher.with_seed):
            finisher.write(piece, piece.sums[0])
        written = set(work.names())
        rows = contributions(sources, weights, work.reach[0], statistics_of(bool(rule.needs), [one.digest for one in sources], parts.store))
    for name in shared:
        if name not in written:
            shards.copy(name, shared[name], files)
    return rows


def list_changed(parts: Parts) -> list[str]:
    """The tensors outside of feed-forward layers that some expert changes."""
    return [name for name in parts.tensors if not FEED_FORWARD.fullmatch(name) and any(one.has(name) for one in parts.sources)]
