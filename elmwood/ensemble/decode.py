"""Decoding on a GPU without waiting for it: a step is two functions over tensors that stay in place, graphs on CUDA.

`choose` mixes what the candidates expect and chooses a token; `read` lets them read it. The host queues both, learns the token while
the device reads it, and has the weights of the next step (elmwood.domains.route.weights) before the device needs them. So nothing waits
for the host, unless its part of a step takes longer than a pass. Where candidates change, those that join read what they missed first.

S candidates in the order of their rows: one body after another, as its cache has them; V vocabulary, C capacity of a cache
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, Protocol, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from elmwood.lm.cache import KeyValueCache
from elmwood.lm.experts import Body, Expected, Experts, Text

TRIED = 12  # tokens of the text on which a model shows that it reads in place as it does otherwise


class Drawn(NamedTuple):
    """A token of generated text."""

    token: int
    logprob: float  # under the model itself, before temperature
    shares: Mapping[str, float]  # of the candidates that predicted it, by name


class Course(Protocol):
    """An LM whose candidates can be asked one by one."""

    experts: Experts

    def start(self) -> Any: ...
    def read(self, tokens_T: Sequence[int], text: Any) -> Expected:
        """Let the candidates of a text read on."""
        ...

    def hear(self, token: int, loglik: Mapping[int, float], text: Any) -> Expected:
        """Add a token that candidates have read, or are reading, and said this of [nats]; those that join read all of the text."""
        ...


class Rule(NamedTuple):
    """How a token is chosen."""

    temperature: float
    top_p: float


def pick(logp_V: Tensor, rule: Rule, chance: Tensor) -> Tensor:
    """A token id [1], by a number in [0, 1); on the device of the log-probabilities."""
    if rule.temperature == 0:
        return logp_V.argmax()[None]
    p_V, order_V = torch.softmax(logp_V / rule.temperature, -1).sort(descending=True, stable=True)
    p_V = p_V.double()
    before_V = p_V.cumsum(-1) - p_V
    sum_V = (p_V * (before_V < rule.top_p)).cumsum(-1)
    place_1 = (sum_V <= chance * sum_V[-1]).sum().clamp(max=len(sum_V) - 1)[None]
    return order_V.index_select(0, place_1)


# ---- the device's part ----------------------------------------------------------------------------------------------


class Board:
    """The buffers of one text, S candidates wide, and what was captured over them."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device):
        self.rows, self.device = rows, device
        self.logp_SV = torch.zeros(rows, vocabulary, device=device)  # what each expects
        self.token_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.given, self.told = (torch.zeros(rows + 2, dtype=torch.float64, device=device) for _ in range(2))
        cuda = device.type == "cuda"
        self.given_here, self.told_here = (torch.zeros(rows + 2, dtype=torch.float64, pin_memory=cuda) for _ in range(2))
        self.event = torch.cuda.Event() if cuda else None
        self.captured: dict[Any, Captured] = {}

    def give(self, weights: Sequence[float], chance: float, place: int) -> None:
        """Send the weight of each row, the chance of the choice, and how many tokens come before the one that is chosen."""
        self.given_here.copy_(torch.tensor([*weights, chance, place], dtype=torch.float64))
        self.given.copy_(self.given_here, non_blocking=True)

    def choose(self, rule: Rule) -> None:
        """Queue the choice of a token, and the news of it."""
        self._run(rule, lambda: self._choose(rule))
        self.told_here.copy_(self.told, non_blocking=True)
        if self.event:
            self.event.record()

    def _choose(self, rule: Rule) -> None:
        logp_V = torch.logsumexp(self.logp_SV + self.given[: self.rows].log()[:, None], 0).float()
        self.token_1.copy_(pick(logp_V, rule, self.given[self.rows]))
        of_token = [one.index_select(-1, self.token_1).flatten().double() for one in (logp_V, self.logp_SV)]
        self.told.copy_(torch.cat([self.token_1.double(), *of_token]))

    def read(self, body: Body, cache: KeyValueCache, first: int, numbers: Sequence[int]) -> None:
        """Queue a pass of some rows of a body, which stand at `first` here, over the token that was chosen."""
        if body.bank:
            body.bank.select(numbers)
        adapted = body.bank is not None and any(number < len(body.bank) for number in numbers)
        held = cache.layers[0].keys, body.bank.slots_SP if body.bank and adapted else None  # they stay as long as what was captured
        self._run((first, len(numbers), *map(id, held)), lambda: self._read(body, cache, first, len(numbers)), held)

    def _read(self, body: Body, cache: KeyValueCache, first: int, rows: int) -> None:
        with body.fork.fan(rows) if body.fork else nullcontext():
            place_1 = self.given[self.rows + 1 :].long()
            logits_SV = read_in_place(body.model, cache, self.token_1, place_1, rows, fed=1 if body.fork else rows)
        self.logp_SV[first : first + rows].copy_(torch.log_softmax(logits_SV.float(), -1))

    def hear(self) -> tuple[int, float, list[float]]:
        """The token, its log-probability, and that under each row, as soon as it is chosen."""
        if self.event:
            self.event.synchronize()
        token, logprob, *loglik_S = self.told_here.tolist()
        return int(token), logprob, loglik_S

    def _run(self, key: Any, run: Callable[[], None], held: Any = None) -> None:
        if self.device.type != "cuda":
            return run()
        if key not in self.captured:
            with torch.cuda.device(self.device):
                self.captured[key] = Captured(run, held)
        self.captured[key].replay()


class Captured:
    """A function over tensors that stay in place, as a CUDA graph; as it is, where it cannot be one. It may be run any number of times."""

    def __init__(self, run: Callable[[], None], held: Any):
        self.replay, self.held = run, held
        aside = torch.cuda.Stream()  # of the current device
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        with suppress(RuntimeError):  # it asks for a value, as gates of some mixtures do
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            self.replay = graph.replay


def read_in_place(model: Any, cache: KeyValueCache, token_1: Tensor, place_1: Tensor, rows: int, fed: int) -> Tensor:
    """The logits [S, V] of the first rows of a cache after one more token, with shapes that do not depend on how much was read. `fed`: the
    rows that the first layer is given, one where layers are shared."""
    after_C = torch.arange(cache.window.capacity, device=token_1.device) > place_1
    mask_C = torch.zeros(after_C.shape, dtype=model.dtype, device=token_1.device).masked_fill(after_C, torch.finfo(model.dtype).min)
    return model(
        input_ids=token_1.expand(fed, 1), position_ids=place_1.expand(fed, 1), attention_mask=mask_C.expand(fed, 1, 1, -1),
        cache=cache.open_in_place(rows, place_1), use_cache=True, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip


def reads_in_place(body: Body, layers: int) -> bool:
    """Whether a model with this many layers of keys and values reads a token in place as it does otherwise. It is tried."""
    model = body.model
    if not layers or any(DynamicCache(config=model.config).is_sliding):
        return False
    if body.bank:
        body.bank.select([len(body.bank)])
    tokens_1T = (31 * torch.arange(1, TRIED + 1, device=model.device) % model.config.get_text_config().vocab_size)[None]
    whole_V = model(input_ids=tokens_1T, use_cache=False).logits[0, -1].float()
    cache = KeyValueCache(layers)
    cache.arrange([0], TRIED)
    model(input_ids=tokens_1T[:, :-1], cache=cache.open(0, 1), use_cache=True)
    try:
        place_1 = torch.full((1,), TRIED - 1, device=model.device)
        grown_V = read_in_place(model, cache, tokens_1T[0, -1:], place_1, 1, 1)[0].float()
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, NotImplementedError):  # it wants another mask or cache
        return False
    rounding = (64 if model.dtype == torch.float32 else 4) * torch.finfo(model.dtype).eps
    return bool((grown_V - whole_V).abs().max() <= max(1e-4, rounding * float(whole_V.abs().max())))


_IN_PLACE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what was tried


# ---- the host's part ------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Candidates of one body."""

    body: Body
    cache: KeyValueCache
    numbers: tuple[int, ...]  # in its bank, in the order of the rows of its cache
    candidates: tuple[int, ...]
    in_place: bool


def can_decode(lm: Any, asked: bool | None = None) -> TypeGuard[Course]:
    """Whether to decode in place: as asked, or on CUDA."""
    return hasattr(lm, "hear") and (lm.experts.device.type == "cuda" if asked is None else asked)


@torch.inference_mode()
def decode(lm: Course, tokens_T: Sequence[int], room: int, rule: Rule, chance: Callable[[], float]) -> Iterator[Drawn]:
    """Continue a text by at most `room` tokens. Raises BadInput."""
    experts, text = lm.experts, lm.start()
    boards: dict[int, Board] = experts.boards.pop() if experts.boards else {}
    try:
        expected, order, board = lm.read(tokens_T, text), list[int](), Board(0, 0, experts.device)
        for made in range(1, room + 1):
            every = _arrange(experts, list(expected.weights), text, len(tokens_T) + room)
            if (wanted := [e for rows in every for e in rows.candidates]) != order:
                latest = dict(zip(order, board.logp_SV, strict=True)) | expected.logp
                logp_SV = torch.stack([latest[e] for e in wanted])
                order, board = wanted, boards.setdefault(len(wanted), Board(len(wanted), logp_SV.shape[1], experts.device))
                board.logp_SV.copy_(logp_SV)
            board.give([expected.weights[e] for e in order], chance(), len(text.tokens))
            board.choose(rule)
            if made < room:
                _read(board, every, len(text.tokens) + 1)
            token, logprob, loglik_S = board.hear()
            yield Drawn(token, logprob, dict(text.shares))
            if made < room:
                expected = lm.hear(token, dict(zip(order, loglik_S, strict=True)), text)
                _catch_up(board, every, order, expected, experts, text)
    finally:
        experts.end(text)
        experts.boards.append(boards)


def _arrange(experts: Experts, active: Sequence[int], text: Text, most: int) -> list[Rows]:
    """The rows of the active candidates, all of which have read all of the text."""
    by_body: dict[int, dict[int, int]] = {}
    for e in active:
        key, number = experts.places[e]
        by_body.setdefault(key, {})[number] = e
    found = []
    for key, candidates in by_body.items():
        body, cache = experts.body(key), experts.cache(key, text)
        if body.model not in _IN_PLACE:
            _IN_PLACE[body.model] = reads_in_place(body, len(cache.layers))
        cache.reserve(min(most, experts.seed.context))
        cache.arrange(list(candidates), len(text.tokens))
        numbers = tuple(cache.owner[: len(candidates)])
        found.append(Rows(body, cache, numbers, tuple(candidates[number] for number in numbers), _IN_PLACE[body.model]))
    return found


def _read(board: Board, every: Sequence[Rows], total: int) -> None:
    """Queue the passes that need not know the token."""
    first = 0
    for rows in every:
        if rows.in_place:
            board.read(rows.body, rows.cache, first, rows.numbers)
            rows.cache.close(0, len(rows.numbers), total)
        first += len(rows.numbers)


def _catch_up(board: Board, every: Sequence[Rows], order: Sequence[int], expected: Expected, experts: Experts, text: Text) -> None:
    """The token is known: let those read it that could not before, and keep what those expect who are not asked any more."""
    for row, e in enumerate(order):
        if e not in expected.weights:
            text.next[e] = board.logp_SV[row].clone()
    late = [e for rows in every if not rows.in_place for e in rows.candidates if e in expected.weights]
    if late:
        logp_AV, _ = experts.extend(late, None, text)
        for e, logp_V in zip(late, logp_AV, strict=True):
            board.logp_SV[order.index(e)] = logp_V
