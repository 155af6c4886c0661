"""One pass of a model over new tokens of many rows, each under the adapter of its slot.

Where adapters begin above the first layer, the layers below, the trunk, read each token of a text once for all its rows: keys, values and
what comes out of the trunk are kept by text, and rows fan out at the first layer with adapters.

N tokens of a pass, n of them of the trunk, M with logits, R texts of C tokens, H width, V vocabulary
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elmwood.ensemble.batch import layers
from elmwood.ensemble.batch.keys import FEW, NAME, THREADS, KeyValues, arrange
from elmwood.ensemble.batch.prefixes import Kept, Prefixes
from elmwood.lm.adapters.slots import Plan, Run, Slots, Span
from elmwood.lm.adapters.trunk import Gate, trunk_depth

BASE = -1  # the slot of a row that uses no adapter
TRUNK = "trunk"  # who reads what all candidates share, among the prefixes
TRIED = 12  # tokens of the text on which a model shows that it reads by rows as it does otherwise


class Item(NamedTuple):
    """New tokens of a row."""

    row: int
    slot: int
    begin: int  # tokens that the row has read
    tokens: Sequence[int]
    wanted: int  # of how many of the last tokens logits are asked for
    text: int = 0  # whose row it is


def lay_out(items: Sequence[Item]) -> tuple[list[int], Plan]:
    """The order of the items in a pass, and which tokens use which slots: single tokens first, one of each slot in the order of slots,
    then others of the same slots; then longer items by their slots, those of the base last of each kind."""
    single = [n for n, item in enumerate(items) if len(item.tokens) == 1]
    longer = [n for n, item in enumerate(items) if len(item.tokens) > 1]
    by_slot: dict[int, list[int]] = {}
    for n in single:
        by_slot.setdefault(items[n].slot, []).append(n)
    slots = sorted(slot for slot in by_slot if slot != BASE)
    first = [by_slot[slot][0] for slot in slots]
    others = [n for slot in slots for n in by_slot[slot][1:]]
    longer.sort(key=lambda n: (items[n].slot == BASE, items[n].slot))
    order = [*first, *others, *by_slot.get(BASE, []), *longer]
    runs, spans, place = [], [], 0
    for _, pairs in groupby(enumerate(slots), key=lambda pair: pair[1] - pair[0]):
        run = [slot for _, slot in pairs]
        runs.append(Run(run[0], run[-1] + 1, place))
        place += len(run)
    for slot, members in groupby(order[len(first) :], key=lambda n: items[n].slot):
        count = sum(len(items[n].tokens) for n in members)
        if slot != BASE:
            spans.append(Span(slot, place, place + count))
        place += count
    return order, Plan(place, tuple(runs), tuple(spans))


class Reader:
    """A model that reads many rows at once."""

    def __init__(self, model: Any, slots: Slots | None, depth: int = 0):
        """`depth`: layers of the trunk."""
        self.model, self.slots = model, slots
        self.compiled = layers.attach(model, slots)
        self.store = KeyValues(model.device)
        self.trunk = Trunk(model, depth) if depth else None

    def at_once(self) -> int:
        """How many single tokens pass the compiled layers together, where none changes the bits of another."""
        return FEW if self.compiled and torch.get_num_threads() <= THREADS else 1

    @torch.inference_mode()
    def read(self, items: Sequence[Item]) -> tuple[Tensor, list[slice]]:
        """Logits [M, V], and which of them are of each item. All rows of a text are told of all its tokens, or begin with what was kept of
        them and of the trunk."""
        order, plan = lay_out(items)
        tokens = [token for n in order for token in items[n].tokens]
        places = [place for n in order for place in range(items[n].begin, items[n].begin + len(items[n].tokens))]
        singles = [(items[n].row, items[n].begin) for n in order if len(items[n].tokens) == 1]
        chunks = [(items[n].row, items[n].begin, len(items[n].tokens)) for n in order if len(items[n].tokens) > 1]
        wanted, found, end, place = list[int](), [slice(0, 0)] * len(items), 0, 0
        for n in order:
            place += len(items[n].tokens)
            wanted += range(place - items[n].wanted, place)
            found[n] = slice(end, end + items[n].wanted)
            end += items[n].wanted
        pad = padded if chunks or len(singles) > self.at_once() else int  # compiled loops need no padding
        idle = pad(place) - place  # tokens that nothing follows from, so that products have few different sizes
        if self.slots:
            self.slots.follow(plan._replace(tokens=place + idle))
        tokens, places = tokens + [0] * idle, places + [0] * idle
        wanted += [0] * (pad(end) - end)
        device, step = self.store.device, arrange(self.store, singles, chunks)
        if self.trunk:
            tokens, places = self.trunk.go_before([items[n] for n in order], tokens, places, pad)
        try:
            output = self.model(
                input_ids=torch.tensor([tokens], device=device), position_ids=torch.tensor([places], device=device), use_cache=False,
                logits_to_keep=torch.tensor(wanted, device=device), elmwood_step=step,
            )  # fmt: skip
        finally:
            if self.trunk:
                self.trunk.gate.enter = None
        if self.trunk:
            self.trunk.went()
        return output.logits[0, :end], found

    def clear(self) -> None:
        """Keep nothing of any text."""
        self.store.clear()
        if self.trunk:
            self.trunk.store.clear()

    def token_bytes(self, most: int) -> int:
        """Bytes of a token in one of `most` rows of a text, a part of the trunk's included; 0 before the first pass."""
        shared = self.trunk.store.token_bytes() if self.trunk else 0
        return self.store.token_bytes() + -(-shared // most)


@dataclass
class Place:
    """What the trunk has of one text."""

    row: int
    read: int = 0  # tokens


class Trunk:
    """The layers below the first one with adapters: they read each text once.

    In a pass, tokens of the trunk come before those of the rows. Layers of the trunk see the first alone, later layers the others, which
    begin with what the trunk has kept of their tokens. So a row that joins late reads the later layers only.
    """

    def __init__(self, model: Any, depth: int):
        self.depth, self.store, self.gate = depth, KeyValues(model.device), Gate(model)
        self.texts: dict[int, Place] = {}
        self.free: list[int] = []  # a heap
        self.news: dict[int, int] = {}  # text -> tokens read after this pass

    def place(self, text: int) -> Place:
        if text not in self.texts:
            self.texts[text] = Place(heapq.heappop(self.free) if self.free else len(self.texts))
        return self.texts[text]

    def begin(self, text: int, tokens: Sequence[int], prefixes: Prefixes) -> int:
        """How far it has read a text, or another that begins alike."""
        place = self.place(text)
        if not place.read and (found := prefixes.find(TRUNK, tokens)):
            self.store.reserve(place.row + 1, found.length)
            self.store.give(place.row, found.kept.states, found.length)
            place.read = found.length
        return place.read

    def keep(self, text: int, tokens: Sequence[int], prefixes: Prefixes) -> None:
        """Keep what it has read of a text that ends."""
        if text in self.texts:
            place = self.place(text)
            if prefixes.wants(TRUNK, read := tokens[: place.read]):
                prefixes.keep(TRUNK, Kept(np.array(read, np.int64), np.zeros(0), self.store.take(place.row, place.read)))

    def leave(self, text: int) -> None:
        """A text has ended."""
        if text in self.texts:
            heapq.heappush(self.free, self.texts.pop(text).row)

    def go_before(
        self, items: Sequence[Item], tokens: list[int], places: list[int], pad: Callable[[int], int]
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """Put the tokens that the trunk has not read before those of a pass, whose items come in this order. `pad`: how many there shall
        be, of so many."""
        furthest: dict[int, Item] = {}
        for item in items:
            if item.text not in furthest or item.begin + len(item.tokens) > furthest[item.text].begin + len(furthest[item.text].tokens):
                furthest[item.text] = item
        new = [(self.place(item.text), item.tokens[self.place(item.text).read - item.begin :]) for item in furthest.values()]
        new = sorted(((place, said) for place, said in new if said), key=lambda one: (len(one[1]) > 1, one[0].row))
        self.news = {item.text: max(self.place(item.text).read, item.begin + len(item.tokens)) for item in furthest.values()}
        singles = [(place.row, place.read) for place, said in new if len(said) == 1]
        step = arrange(self.store, singles, [(place.row, place.read, len(said)) for place, said in new if len(said) > 1])
        room = self.store.capacity
        spots = [place.row * room + n for place, said in new for n in range(place.read, place.read + len(said))]
        count = max(1, pad(len(spots)))
        idle = [0] * (count - len(spots))
        device = self.store.device
        spot_n = torch.tensor(spots, dtype=torch.long, device=device)
        starts = [self.texts[item.text].row * room + item.begin for item in items]
        spots_N = [spot for item, start in zip(items, starts, strict=True) for spot in range(start, start + len(item.tokens))]
        spot_N = torch.tensor(spots_N + [0] * (len(tokens) - len(spots_N)), device=device)
        whole = count + len(tokens)

        def enter(number: int, hidden_1NH: Tensor, named: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            part = slice(0, count) if number < self.depth else slice(count, whole)
            named = {name: cut(value, part, whole) for name, value in named.items()}
            if number < self.depth:
                named["elmwood_step"] = step
            if number == 0:
                hidden_1NH = hidden_1NH[:, part]
            elif number == self.depth:
                kept_R1CH, _ = self.store.layer(self.depth, hidden_1NH[:, None], hidden_1NH[:, None, :, :0])
                kept_SH = kept_R1CH.view(-1, kept_R1CH.shape[3])
                kept_SH.index_copy_(0, spot_n, hidden_1NH[0, : len(spot_n)])
                hidden_1NH = kept_SH.index_select(0, spot_N)[None]
            return hidden_1NH, named

        self.gate.enter = enter
        before = [token for _, said in new for token in said]
        return before + idle + tokens, [n for place, said in new for n in range(place.read, place.read + len(said))] + idle + places

    def went(self) -> None:
        """The pass was read."""
        for text, read in self.news.items():
            self.texts[text].read = read


def cut(value: Any, part: slice, whole: int) -> Any:
    """These tokens of what a layer is told of all of them."""
    if type(value) is tuple:
        return tuple(cut(one, part, whole) for one in value)
    return value[:, part] if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == whole else value


def padded(count: int) -> int:
    """The next size of a product: each new one costs milliseconds, and memory that is kept (docs/log/serving.md)."""
    step = max(1, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


@torch.inference_mode()
def reads_by_rows(model: Any) -> int:
    """Whether a transformers model reads many rows in one pass as it reads each alone, and the bytes of keys and values that a token of a
    row then takes; else 0. It is tried, and attends by rows from then on."""
    if not getattr(model, "_supports_attention_backend", False) or model.config._attn_implementation != "sdpa":
        return 0
    tokens = (31 * torch.arange(1, 2 * TRIED + 1) % model.config.get_text_config().vocab_size).tolist()
    texts = tokens[:TRIED], tokens[TRIED:]
    alone_2V = [model(input_ids=torch.tensor([text], device=model.device), use_cache=False).logits[0, -1].float() for text in texts]
    model.set_attn_implementation(NAME)
    if layers.fuse(model):
        if token_bytes := _reads_as(model, texts, alone_2V):
            return token_bytes
        layers.unfuse(model)
    return _reads_as(model, texts, alone_2V)


def _reads_as(model: Any, texts: tuple[list[int], list[int]], alone_2V: list[Tensor]) -> int:
    """Bytes of a token if a model, asked for two texts by rows, expects after them what it expects of each alone; else 0."""
    reader = Reader(model, None)
    try:
        reader.read([Item(0, BASE, 0, texts[0][:4], 1), Item(1, BASE, 0, texts[1][:-1], 1)])
        reader.read([Item(1, BASE, TRIED - 1, texts[1][-1:], 1), Item(0, BASE, 4, texts[0][4:-1], 1)])
        reader.read([Item(2, BASE, 0, texts[1][:2], 1), Item(0, BASE, TRIED - 1, texts[0][-1:], 1), Item(3, BASE, 0, texts[0][:1], 1)])
        reader.read([Item(2, BASE, 2, texts[1][2:-1], 1), Item(0, BASE, TRIED - 1, texts[0][-1:], 1)])
        logits_MV, found = reader.read([Item(2, BASE, TRIED - 1, texts[1][-1:], 1), Item(0, BASE, TRIED - 1, texts[0][-1:], 1)])
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, NotImplementedError):  # it wants another mask or cache
        return 0
    rounding = (64 if model.dtype == torch.float32 else 4) * torch.finfo(model.dtype).eps
    pairs = ((logits_MV[found[1]][0].float(), alone_2V[0]), (logits_MV[found[0]][0].float(), alone_2V[1]))
    same = all(float((one - other).abs().max()) <= max(1e-4, rounding * float(other.abs().max())) for one, other in pairs)
    return reader.token_bytes(1) if same else 0


@torch.inference_mode()
def open_reader(model: Any, slots: Slots | None) -> Reader:
    """A reader of a model that reads by rows. Rows of one text share the layers below the first one with adapters, if the model reads so as
    it does otherwise. It is tried."""
    apart = Reader(model, slots)
    depth = trunk_depth(model, [layer.name for layer in slots.layers]) if slots else 0
    if not depth:
        return apart
    tokens = (31 * torch.arange(1, TRIED + 1) % model.config.get_text_config().vocab_size).tolist()
    passes = [
        [Item(0, BASE, 0, tokens[:5], 1, 0), Item(1, BASE, 0, tokens[3:6], 1, 1), Item(2, BASE, 0, tokens[:1], 1, 0)],
        [Item(0, BASE, 5, tokens[5:6], 1, 0), Item(2, BASE, 1, tokens[1:4], 1, 0)],
        [Item(0, BASE, 6, tokens[6:7], 1, 0), Item(2, BASE, 4, tokens[4:7], 1, 0), Item(1, BASE, 3, tokens[6:7], 1, 1)],
    ]
    shared = Reader(model, slots, depth)
    assert shared.trunk
    rounding = (64 if model.dtype == torch.float32 else 4) * torch.finfo(model.dtype).eps
    try:
        for items in passes:
            (one_MV, found), (other_MV, other_found) = apart.read(items), shared.read(items)
            for mine, other in zip(found, other_found, strict=True):
                one, two = one_MV[mine].float(), other_MV[other].float()
                if not float((one - two).abs().max()) <= max(1e-4, rounding * float(one.abs().max())):
                    raise ValueError("it reads otherwise")
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, NotImplementedError):  # its layers are given something else
        shared.trunk.gate.remove()
        return apart
    for text in (0, 1):
        shared.trunk.leave(text)
    return shared
