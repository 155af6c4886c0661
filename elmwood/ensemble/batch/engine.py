"""The engine for adapters over one seed, or one model alone: rows (request, expert), one pass over the weights per step for all of them.

One thread takes steps, another reads adapters from the disk. `open_batched` says which models these are.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmwood.ensemble.activated import check_anew
from elmwood.ensemble.batch.activated import Activated
from elmwood.ensemble.batch.candidates import Candidates
from elmwood.ensemble.batch.interface import USUAL, Busy, Counts, Engine, Event, Limits, Request
from elmwood.ensemble.batch.mixing import SUM, Mixing
from elmwood.ensemble.batch.passes import BASE, Item, Reader, open_reader, reads_by_rows
from elmwood.ensemble.batch.prefixes import Prefixes
from elmwood.ensemble.batch.residency import Residency
from elmwood.ensemble.batch.schedule import Sizes
from elmwood.ensemble.batch.steps import Steps
from elmwood.ensemble.batch.texts import Text
from elmwood.ensemble.batch.turns import check
from elmwood.ensemble.forest import open_forest
from elmwood.errors import BadInput, ElmwoodError
from elmwood.lm import probe
from elmwood.lm.adapters.lora import Layer, adapter_of, layout
from elmwood.lm.adapters.packed import Packed
from elmwood.lm.adapters.slots import Slots
from elmwood.lm.devices import choose_device
from elmwood.lm.experts import BANKED
from elmwood.lm.load import check_seed, end_tokens, load_model, method_of, twin
from elmwood.records import Ensemble, Expert, Merged, Mixture, Record, Seed
from elmwood.store import Store

SLOT_BYTES, HOST_BYTES, CACHE_BYTES = 2 << 30, 4 << 30, 4 << 30
CHUNK = {"cpu": 256, "gpu": 2048}  # tokens of longer prompts that one step reads
logger = logging.getLogger("elmwood.serve")


class Weights(NamedTuple):
    """A seed that is open, for engines that share it."""

    seed: str
    model: Any  # whose layers nothing wraps
    token_bytes: int


class Batched:
    """See interface.py."""

    weights: Weights | None = None  # of the seed, where that is the base

    def __init__(
        self, seed: Seed, store: Store, model: Any, token_bytes: int, candidates: Candidates, adapters: Sequence[Expert | Merged | Mixture],
        limits: Limits = USUAL, mixing: Mixing = SUM, block: int = 0,
    ):  # fmt: skip
        """`adapters`: experts by digest, as the candidates have them; `model` reads by rows; `block`: experts are activated, and score
        blocks of so many tokens; 0: they are not. Raises BadInput."""
        self.context, self.vocabulary, self.separator = seed.context, seed.vocabulary, seed.separator
        self.stops = frozenset([seed.separator, *end_tokens(seed, store)])
        self.experts, self.limits, self.store = candidates.names[:-1], limits, store
        self.adapters = {branch.digest: branch for branch in adapters}
        layers = layers_of(model, adapters, store)
        number_bytes = sum(layer.numbers for layer in layers) * next(model.parameters()).element_size()
        slots = min(limits.slots or max(candidates.most, SLOT_BYTES // max(1, number_bytes)), limits.rows, max(1, len(adapters)))
        places = min(max(2 * slots, (limits.host_bytes or HOST_BYTES) // max(1, number_bytes)), max(1, len(adapters)))
        self._prober = Prober(twin(model), layers, seed) if adapters else None  # before its layers are wrapped
        self.slots = Slots(model, layers, slots) if adapters else None
        self.packed = Packed(store.root / "work" / "packed", layers)
        reader = open_reader(model, self.slots)
        token_bytes = reader.token_bytes(candidates.most) or token_bytes
        self.host_HP = torch.empty(places, self.slots.numbers, dtype=self.slots.flat_SP.dtype) if self.slots else torch.empty(0, 0)
        if reader.store.device.type == "cuda":
            self.host_HP = self.host_HP.pin_memory()
        cache_bytes = limits.cache_bytes or CACHE_BYTES
        sizes = Sizes(
            limits.running, limits.rows, max(1, cache_bytes // token_bytes),
            CHUNK["cpu" if reader.store.device.type == "cpu" else "gpu"],
        )  # fmt: skip
        if candidates.most > min(limits.rows, slots + 1):
            raise BadInput(
                f"{candidates.most} candidates predict each token, and there are {limits.rows} rows and {slots} slots: raise them"
            )
        residency = Residency(places, slots if adapters else 0)
        self.steps = (partial(Activated, block) if block else Steps)(
            reader,
            candidates,
            residency,
            sizes,
            self.context,
            self.stops,
            Prefixes(0 if limits.deterministic else cache_bytes // 4),
            self._load,
            self._fill,
            mixing,
            limits.deterministic,
        )
        self.candidates, self._numbers = candidates, count(1)
        self._loads, self._load_s = 0, 0.0
        self._new: list[Text] = []
        self._ended: set[int] = set()  # cancelled by their number
        self._closing = self._stop = False
        self._wanted: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        self._found: list[tuple[str, str]] = []  # what the loader has done
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=target, name=f"elmwood-{name}", daemon=True)
            for name, target in (("engine", self._run), ("loader", self._read_adapters))
        ]
        for thread in self._threads:
            thread.start()

    # ---- any thread

    def submit(self, request: Request, hear: Callable[[Event], None]) -> int:
        check(request, self.context, self.vocabulary, [*self.candidates.names])
        choice = self.candidates.choose(request.only, request.without)
        text = Text.of(next(self._numbers), request, hear, choice, self.context)
        with self._changed:
            self._check_queue(request)
        self.steps.look(text)  # here and not in a step, which others wait for
        with self._changed:
            self._check_queue(request)
            for c in text.run:
                if c != self.candidates.base:
                    self.steps.residency.early(self.candidates.names[c], self._load)
            self._new.append(text)
            self._changed.notify_all()
        return text.number

    def _check_queue(self, request: Request) -> None:
        waiting = len(self._new) + len(self.steps.waiting)
        if self._closing or (waiting >= self.limits.queue and not request.joins):
            raise Busy("the server closes" if self._closing else f"{waiting} requests wait already: ask again later")

    def cancel(self, number: int) -> None:
        with self._changed:
            self._ended.add(number)
            self._changed.notify_all()

    def counts(self) -> Counts:
        with self._changed:
            now = self.steps.counts()
            waiting = now.waiting + len(self._new)
            return now._replace(waiting=waiting, loads=self._loads, load_seconds=self._load_s, open=not self._closing)

    def close(self, drain_s: float = 0.0) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._new and not self.steps.waiting and not self.steps.running, drain_s)
            self._stop = True
            self._changed.notify_all()
        self._wanted.put(None)
        for thread in self._threads:
            thread.join()

    # ---- the thread of the engine

    def _run(self) -> None:
        steps, idle = self.steps, False
        while True:
            with self._changed:
                if idle:
                    self._changed.wait_for(lambda: self._new or self._found or self._ended or self._stop)
                steps.waiting += self._new
                self._new = []
                found, self._found = self._found, []
                ended, self._ended, stop = self._ended, set(), self._stop
            for digest, why in found:
                steps.residency.loaded(digest, why)
            for text in (*steps.waiting, *steps.running):
                text.cancelled |= stop or text.number in ended
            try:
                idle = not steps.step()
            except Exception as error:  # whatever it was, the next request is served
                logger.exception("a step")
                steps.fail(error)
            with self._changed:
                self._changed.notify_all()
                if stop and not steps.waiting and not steps.running and not self._new:
                    return

    def _load(self, digest: str, place: int) -> None:
        self._wanted.put((digest, place))

    def _fill(self, place: int, slot: int) -> None:
        assert self.slots
        self.slots.fill(slot, self.host_HP[place])

    # ---- the thread that reads adapters

    def _read_adapters(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            digest, place = wanted
            began, why = time.perf_counter(), ""
            try:
                branch = self.adapters[digest]
                files = [branch.files[name] for name in ("adapter_config.json", "adapter_model.safetensors")]
                self.packed.load(adapter_of(branch, self.store), files, self.host_HP[place], partial(self._probe, branch))
            except Exception as error:  # whatever it was, the next expert is loaded
                logger.warning("expert %s is refused: %s", digest, error, exc_info=not isinstance(error, ElmwoodError))
                why = str(error) if isinstance(error, ElmwoodError) else f"{type(error).__name__}; it is in the server's log"
            with self._changed:
                self._loads, self._load_s = self._loads + 1, self._load_s + time.perf_counter() - began
                self._found.append((digest, why))
                self._changed.notify_all()

    def _probe(self, branch: Expert | Merged | Mixture, flat_P: Tensor) -> None:
        assert self._prober
        said, seed = self._prober.ask(flat_P)
        probe.compare(said, seed, probe.known(branch, self.store))


class Prober:
    """A model of its own modules over the same weights, which reads with one adapter: on the loader's thread, beside the steps."""

    def __init__(self, model: Any, layers: Sequence[Layer], seed: Seed):
        self.model, self.layers, self.text = model, layers, probe.text(seed.vocabulary, seed.context)
        self.reader: Reader | None = None  # made when an adapter is first loaded from its own files
        self.base: list[float] = []

    @torch.inference_mode()
    def ask(self, flat_P: Tensor) -> tuple[list[float], list[float]]:
        """What the adapter and the seed say after the text."""
        if self.reader is None:
            self.reader = Reader(self.model, Slots(self.model, self.layers, 1))
            self.base = self._read(BASE)
        assert self.reader.slots
        self.reader.slots.fill(0, flat_P)
        return self._read(0), self.base

    def _read(self, slot: int) -> list[float]:
        assert self.reader
        logits_MV, _ = self.reader.read([Item(0, slot, 0, self.text, 1)])
        return probe.sample(torch.log_softmax(logits_MV[0].float(), -1))


def layers_of(model: Any, branches: Sequence[Expert | Merged | Mixture], store: Store) -> list[Layer]:
    """The layers that adapters change. The header of one adapter of each configuration is read, whatever their number: one that has
    other layers under the same configuration is refused when it is loaded. Raises BadInput."""
    one_of_each = {branch.files.get("adapter_config.json"): branch for branch in branches}
    return layout(model, [adapter_of(branch, store) for branch in one_of_each.values()])


def open_batched(
    record: Record, store: Store, device: torch.device | str | None = None, limits: Limits = USUAL, like: Engine | None = None
) -> Batched | None:
    """The engine of a model, if it is one of these: a seed, an expert or a merge whose keys and values stand for all it has read, or an
    ensemble, mixed by outputs or activated, of LoRA adapters over such a seed. None for others. `like`: an engine whose weights of the seed
    are used where they are the same. Raises ForeignExpert, UnknownName, Damaged."""
    place, mixing, routing, router = choose_device(device), SUM, None, None
    adapters: list[Expert | Merged | Mixture] = []
    bounded: set[int] = set()
    base, block = None, 0
    match record:
        case Seed():
            seed = record
        case Expert() | Merged() | Mixture():
            seed = store.load(record.seed, Seed)
            check_seed(seed, record)
            adapters, base = ([record], None) if method_of(record) in BANKED else ([], record)
            if base is not None and ("adapter_config.json" in record.files):
                return None  # DoRA
        case Ensemble() if record.mixing == "outputs" or (record.mixing == "activated" and not limits.deterministic):
            forest = open_forest(record, store, place)
            if any(method_of(expert) not in BANKED for expert in forest.experts.experts):
                return None
            seed, adapters, routing, router = forest.experts.seed, list(forest.experts.experts), forest.routing, forest.router
            bounded = {c for c, expert in enumerate(adapters) if expert.digest in record.bounded}
            mixing = Mixing(record.aggregation, record.bound)
            if record.mixing == "activated":
                check_anew(routing)
                block = record.block
        case _:
            return None
    names = [expert.digest for expert in adapters] if base is None else [base.digest]
    candidates = Candidates(names, router, routing, bounded, None if base is None else 0, block > 0)
    weights: Weights | None = getattr(like, "weights", None)
    if weights is None or base is not None or (weights.seed, weights.model.device.type) != (seed.digest, place.type):
        model = load_model(seed, store, base, place)
        token_bytes = reads_by_rows(model) if model.config.get_text_config().vocab_size == seed.vocabulary else 0
        weights = Weights(seed.digest, model, token_bytes)
    if not weights.token_bytes:
        return None
    engine = Batched(seed, store, twin(weights.model), weights.token_bytes, candidates, adapters, limits, mixing, block)
    engine.weights = weights if base is None else None
    return engine
