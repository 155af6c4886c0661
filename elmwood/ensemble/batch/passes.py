"""One pass of a model over new tokens of many rows, each under the adapter of its slot.

N tokens of a pass, M of them with logits, V vocabulary
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmwood.ensemble.batch.keys import NAME, KeyValues, arrange
from elmwood.lm.adapters.slots import Plan, Run, Slots, Span

BASE = -1  # the slot of a row that uses no adapter
TRIED = 12  # tokens of the text on which a model shows that it reads by rows as it does otherwise


class Item(NamedTuple):
    """New tokens of a row."""

    row: int
    slot: int
    begin: int  # tokens that the row has read
    tokens: Sequence[int]
    wanted: int  # of how many of the last tokens logits are asked for


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

    def __init__(self, model: Any, slots: Slots | None):
        self.model, self.slots = model, slots
        self.store = KeyValues(model.device)

    @torch.inference_mode()
    def read(self, items: Sequence[Item]) -> tuple[Tensor, list[slice]]:
        """Logits [M, V], and which of them are of each item."""
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
        idle = padded(place) - place  # tokens that nothing follows from, so that products have few different sizes
        if self.slots:
            self.slots.follow(plan._replace(tokens=place + idle))
        tokens, places = tokens + [0] * idle, places + [0] * idle
        wanted += [0] * (padded(end) - end)
        device = self.store.device
        output = self.model(
            input_ids=torch.tensor([tokens], device=device), position_ids=torch.tensor([places], device=device), use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=device), elmwood_step=arrange(self.store, singles, chunks),
        )  # fmt: skip
        return output.logits[0, :end], found


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
    reader = Reader(model, None)
    try:
        reader.read([Item(0, BASE, 0, texts[0][:4], 1), Item(1, BASE, 0, texts[1][:-1], 1)])
        reader.read([Item(1, BASE, TRIED - 1, texts[1][-1:], 1), Item(0, BASE, 4, texts[0][4:-1], 1)])
        reader.read([Item(2, BASE, 0, texts[1][:2], 1), Item(0, BASE, TRIED - 1, texts[0][-1:], 1), Item(3, BASE, 0, texts[0][:1], 1)])
        logits_MV, found = reader.read([Item(2, BASE, 2, texts[1][2:], 1), Item(0, BASE, TRIED - 1, texts[0][-1:], 1)])
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, NotImplementedError):  # it wants another mask or cache
        return 0
    rounding = (64 if model.dtype == torch.float32 else 4) * torch.finfo(model.dtype).eps
    pairs = ((logits_MV[found[1]][0].float(), alone_2V[0]), (logits_MV[found[0]][0].float(), alone_2V[1]))
    same = all(float((one - other).abs().max()) <= max(1e-4, rounding * float(other.abs().max())) for one, other in pairs)
    return reader.store.token_bytes() if same else 0
