"""Many experts of one seed: adapters over one shared base, full and weight-decomposed experts as models of their own.

Shapes: E experts (the seed is the last), A of them active, B rows, T tokens, V vocabulary, W windows of at most L tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from elmwood.corpus.tokens import Windows
from elmwood.errors import BadInput, BadSeed
from elmwood.lm.adapters.lora import Bank, adapter_of
from elmwood.lm.adapters.trunk import Fork, open_fork
from elmwood.lm.cache import KeyValueCache, kept_layers
from elmwood.lm.devices import choose_device, kind_of
from elmwood.lm.load import Branch, check_seed, end_tokens, load_model, method_of
from elmwood.lm.products import linear, plain_head
from elmwood.records import Seed
from elmwood.store import Store
from elmwood.store.headers import read_header

BATCH = {"cpu": 1 << 13, "gpu": 1 << 16}  # tokens of a batch of windows while scoring, padding included
TOKENS = {"cpu": 1 << 10, "gpu": 1 << 16}  # read at once: their activations fit in the cache
LOGITS = {"cpu": 1 << 22, "gpu": 1 << 26}  # in memory at once, of a head that is not cut
LOGITS_OF_HEAD = {"cpu": 1 << 19, "gpu": 1 << 26}  # in memory at once, C rows of hidden cache: 2 MB; more where launches cost
ROWS = 64  # at least, so that the head's weights are not read for nothing
MIXED = 1 << 26  # numbers of summed adapters in memory at once while scoring
BANKED = ("lora", "qlora")  # what these change is W + B A; DoRA (arXiv:2402.09353) rescales the base's rows besides
BASE = -1  # the key of the shared base among the bodies


class Body(NamedTuple):
    """A model in memory, with the adapters over it if it is the shared base."""

    model: PreTrainedModel
    bank: Bank | None
    head_VD: Tensor | None  # of a model whose logits are these weights times its last hidden cache
    fork: Fork | None = None  # of a model whose first layers no adapter changes


class Text:
    """One growing text, and what each expert that has read some of it remembers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.caches: dict[int, KeyValueCache] = {}
        self.next: dict[int, Tensor] = {}  # what a candidate that `follow` ran expects after the last token it has read [V]


class Read(NamedTuple):
    """What an expert of one body has newly read of a text."""

    number: int  # in the bank
    logits_V: Tensor  # of the token after
    first: int  # tokens it had read before
    loglik_U: Tensor  # log p of the tokens after the first of the new ones; empty unless asked for


class News(NamedTuple):
    """Log-likelihoods of the tokens that a candidate had not read: tokens[first:] of the text."""

    first: int  # 0: it reads the whole text, or reads it again
    loglik_U: Tensor  # float64 on the CPU; of the first token of a text, which is given, 0


class Expected(NamedTuple):
    """What is expected of the next token of a text."""

    weights: dict[int, float]  # of the candidates that were run; they sum to one
    logp: dict[int, Tensor]  # [V] of the candidates that have just read


class Experts:
    """Experts of one seed, or other weights grown from it, sorted by digest, and the seed itself as the last: index len(experts).

    Models are opened when they are first used. Raises ForeignExpert.
    """

    def __init__(self, seed: Seed, experts: Sequence[Branch], store: Store, device: torch.device | str | None = None):
        for expert in experts:
            check_seed(seed, expert)
        self.seed, self.store = seed, store
        self.experts = tuple(sorted(experts, key=lambda expert: expert.digest))
        self.device = choose_device(device)
        self.adapters = [e for e, expert in enumerate(self.experts) if method_of(expert) in BANKED]
        # candidate -> the key of its body, and its number in that body's bank
        self.places = {e: (e, 0) for e in range(len(self.experts))} | {e: (BASE, number) for number, e in enumerate(self.adapters)}
        self.places[len(self.experts)] = (BASE, len(self.adapters))
        self._bodies: dict[int, Body] = {}
        self._kept: dict[str, int] = {}  # class of a model -> layers of keys and values in its cache
        self._spare: dict[int, list[KeyValueCache]] = {}  # memory of texts that have ended
        self.boards: list[Any] = []  # of texts that have ended: what decoding prepared for the next (ensemble/decode.py)

    def __len__(self) -> int:
        """The number of candidates, the seed included."""
        return len(self.experts) + 1

    @property
    def stops(self) -> frozenset[int]:
        """The separator, and what the checkpoint says ends a text."""
        return frozenset([self.seed.separator, *end_tokens(self.seed, self.store)])

    def body(self, key: int) -> Body:
        """A model and the bank over it, opened when it is first asked for. Raises BadInput, Damaged."""
        if key not in self._bodies:
            model = load_model(self.seed, self.store, None if key == BASE else self.experts[key], self.device)
            adapters = [adapter_of(self.experts[e], self.store) for e in self.adapters] if key == BASE else []
            head_VD = plain_head(model)  # before the bank wraps it
            bank = Bank(model, adapters) if adapters else None
            if bank and any(one is model.get_output_embeddings() for one in bank.adapted):
                head_VD = None
            if (rows := model.config.get_text_config().vocab_size) != self.seed.vocabulary:
                raise BadInput(
                    f"expert {self.experts[key].digest[:8]} has {rows} rows of vocabulary, {self.seed.name} {self.seed.vocabulary}: "
                    "merge it with others of the seed, with --resize"
                )
            fork = open_fork(model, [layer.name for layer in bank.layers]) if bank else None
            self._bodies[key] = Body(model, bank, head_VD, fork)
        return self._bodies[key]

    @torch.inference_mode()
    def score(self, e: int, tokens_BT: Any, since: int = 1) -> Tensor:
        """log p(x_t | x_<t) [B, T] of candidate e for the tokens t >= since, float32 on the CPU; columns before are 0. Rows may be one
        token longer than the context, for the last token is predicted and not read. Raises BadInput."""
        tokens_BT = torch.as_tensor(tokens_BT, dtype=torch.long)
        rows, length = tokens_BT.shape
        self.check(tokens_BT.flatten(), length - 1)
        body, loglik_BT = self._select(e), torch.zeros(rows, length)
        at_once, since = self._at_once(body, length, length), max(1, since)
        for start in range(0, rows, at_once):
            part_BT = tokens_BT[start : start + at_once].to(self.device)
            loglik_BT[start : start + at_once, since:] = _loglik(body, part_BT, length - since)
        return loglik_BT

    def score_windows(self, e: int, windows: Windows, wanted_W: Any, report: Callable[[int], None]) -> Tensor:
        """log p of the scored tokens of some windows (ascending) under candidate e, in order [n] float32 on the CPU. Windows of like length
        share a batch, so little is padded. `report` is told how many tokens have been read."""
        loglik_WL, done = torch.zeros(windows.rows_WL.shape), 0
        report(done)
        for batch in windows.batches(wanted_W, BATCH[kind_of(self.device)]):
            longest, since = int(windows.length_W[batch].max()), int(windows.score_from_W[batch[0]])
            loglik_WL[batch, :longest] = self.score(e, windows.rows_WL[batch, :longest], since)
            done += int(windows.length_W[batch].sum())
            report(done)
        return loglik_WL[wanted_W][torch.from_numpy(windows.scored_WL[wanted_W])]

    @torch.inference_mode()
    def score_each(self, windows: Windows, read_WE: Any, report: Callable[[int], None]) -> NDArray[np.float32]:
        """As `score_windows`, of the windows that each candidate reads [N, E]; 0 elsewhere. A shared trunk reads each window once."""
        loglik_NE = np.zeros((int(windows.count_W.sum()), len(self)), np.float32)
        end_W, shared, done = np.cumsum(windows.count_W), np.zeros(len(self), bool), 0
        fork = self.body(BASE).fork if self.adapters and read_WE[:, self.adapters].any() else None
        shared[[e for e, (key, _) in self.places.items() if key == BASE and fork]] = True
        for e in np.flatnonzero(read_WE.any(0) & ~shared).tolist():
            wanted_W, before = np.flatnonzero(read_WE[:, e]), done
            loglik_n = self.score_windows(e, windows, wanted_W, lambda now, before=before: report(before + now))  # type: ignore[misc]
            loglik_NE[np.repeat(read_WE[:, e], windows.count_W), e] = loglik_n
            done += int(windows.length_W[wanted_W].sum())
        for batch in windows.batches(np.flatnonzero(read_WE[:, shared].any(1)), BATCH[kind_of(self.device)]) if fork else ():
            longest, since = int(windows.length_W[batch].max()), int(windows.score_from_W[batch[0]])
            at_once = self._at_once(self.body(BASE), longest, longest)
            for part_B in np.split(batch, range(at_once, len(batch), at_once)):
                tokens_BT = torch.as_tensor(windows.rows_WL[part_B, :longest], dtype=torch.long)
                self.check(tokens_BT.flatten(), longest - 1)
                tokens_BT = tokens_BT.to(self.device)
                assert fork
                hidden_BTH = fork.read(tokens_BT[:, :-1])
                for e in np.flatnonzero(read_WE[part_B].any(0) & shared).tolist():
                    mine_b = np.flatnonzero(read_WE[part_B, e])
                    with fork.after(hidden_BTH[mine_b]):
                        loglik_bT = _loglik(self._select(e), tokens_BT[mine_b], longest - since).numpy()
                    for w, loglik_T in zip(part_B[mine_b].tolist(), loglik_bT, strict=True):
                        loglik_NE[end_W[w] - windows.count_W[w] : end_W[w], e] = loglik_T[: windows.count_W[w]]
                    done += int(windows.length_W[part_B[mine_b]].sum())
                report(done)
        return loglik_NE

    def _select(self, e: int) -> Body:
        """The body of a candidate, its bank ready for it alone."""
        key, number = self.places[e]
        body = self.body(key)
        if body.bank:
            body.bank.select([number])
        return body

    def _at_once(self, body: Body, length: int, last: int) -> int:
        """Rows of so many tokens that are read at once, if logits of the last of each are asked for."""
        kind = kind_of(self.device)
        logits = LOGITS[kind] // max(1, last * self.seed.vocabulary) if body.head_VD is None else TOKENS[kind]
        return max(1, min(TOKENS[kind] // length, logits))

    @torch.inference_mode()
    def predict(self, e: int, tokens_BT: Any) -> Tensor:
        """Log-probabilities of candidate e for the token after each position [B, T, V], float32. Raises BadInput."""
        tokens_BT = torch.as_tensor(tokens_BT, dtype=torch.long)
        self.check(tokens_BT.flatten(), tokens_BT.shape[1])
        return torch.log_softmax(self._select(e).model(input_ids=tokens_BT.to(self.device), use_cache=False).logits.float(), -1)

    @torch.inference_mode()
    def score_mixed(self, weight_BE: Any, tokens_BT: Any, last: int) -> Tensor:
        """log p of the last tokens of each row [B, last], float32 on the CPU, under the seed plus the row's own weighted sum of adapters.

        A weight of the seed, or of no candidate, adds nothing. Raises BadInput.
        """
        tokens_BT = torch.as_tensor(tokens_BT, dtype=torch.long)
        rows, length = tokens_BT.shape
        self.check(tokens_BT.flatten(), length - 1)
        body = self.body(BASE)
        bank = body.bank
        assert bank
        mixtures = [self._mixture(weight_E) for weight_E in weight_BE]
        at_once = max(1, min(self._at_once(body, length, last), MIXED // max(1, bank.numbers)))
        parts = []
        for start in range(0, rows, at_once):
            bank.mix(mixtures[start : start + at_once])
            parts.append(_loglik(body, tokens_BT[start : start + at_once].to(self.device), last))
        return torch.cat(parts)

    @torch.inference_mode()
    def fill(self, e: int, folder: Path, wanted: Callable[[str], bool]) -> None:
        """Give weights of candidate e, as long as it is open, the numbers that a checkpoint of its architecture has under these names.

        Raises BadSeed where a name is not among the model's own."""
        model = self.body(self.places[e][0]).model
        weights, top = {**dict(model.named_buffers()), **dict(model.named_parameters())}, f"{model.base_model_prefix}."
        for path in sorted(folder.glob("*.safetensors")):
            read_header(path)
            with safe_open(path, "pt") as file:
                for name in filter(wanted, file.keys()):
                    weight = weights.get(name, weights.get(top + name))
                    if weight is None:
                        raise BadSeed(f"{type(model).__name__} has no weight {name}: its layers cannot be exchanged one by one")
                    weight.copy_(file.get_tensor(name))

    def start(self) -> Text:
        """An empty text."""
        return Text()

    @torch.inference_mode()
    def extend(self, active: Sequence[int], tokens_T: Sequence[int] | None, text: Text) -> tuple[Tensor, Text]:
        """Add tokens to a text, read by the active candidates: log-probabilities [A, V] of the token after them, float32.

        Adapters that have read equally far share one pass; one that was idle reads what it missed in a pass of its own.
        The text is changed in place; None: the candidates read what they missed. Raises BadInput when it outgrows the context.
        """
        self._grow(text, tokens_T)
        read_A = self._read_all(active, text)
        return torch.log_softmax(torch.stack([one.logits_V for one in read_A]).float(), -1), text

    @torch.inference_mode()
    def follow(self, active: Sequence[int], tokens_T: Sequence[int] | None, text: Text) -> tuple[Tensor, list[News]]:
        """As `extend`, for texts that nothing else extends: log-probabilities [A, V] of the token after, and what each candidate gave the
        tokens it had not read. One that was idle reads what it missed, and is asked for all of it. None: no token is new."""
        self._grow(text, tokens_T)
        read_A = self._read_all(active, text, every=True)
        logp_AV = torch.log_softmax(torch.stack([one.logits_V for one in read_A]).float(), -1)
        news = []
        for e, one, logp_V in zip(active, read_A, logp_AV, strict=True):
            head_1 = text.next[e][text.tokens[one.first], None].double().cpu() if one.first else torch.zeros(1, dtype=torch.float64)
            news.append(News(one.first, torch.cat([head_1, one.loglik_U.double().cpu()])))
            text.next[e] = logp_V
        return logp_AV, news

    def _grow(self, text: Text, tokens_T: Sequence[int] | None) -> None:
        if tokens_T is not None:
            self.check(tokens_T, len(text.tokens) + len(tokens_T))
            text.tokens.extend(tokens_T)

    def _read_all(self, active: Sequence[int], text: Text, every: bool = False) -> list[Read]:
        """Let the active candidates read all of a text that they have not read."""
        by_body: dict[int, dict[int, int]] = {}  # body -> number in its bank -> place in `active`
        for place, e in enumerate(active):
            key, number = self.places[e]
            by_body.setdefault(key, {})[number] = place
        found: dict[int, Read] = {}
        for key, places in by_body.items():
            for one in self._read(self.body(key), self.cache(key, text), list(places), text.tokens, every=every):
                found[places[one.number]] = one
        return [found[place] for place in range(len(active))]

    def cache(self, key: int, text: Text) -> KeyValueCache:
        """What the experts of a body remember of a text. Models of one class remember alike."""
        if key not in text.caches:
            model, bank, _, fork = self.body(key)
            kind = f"{type(model).__name__} {model.config.model_type}"
            if kind not in self._kept:
                if bank:
                    bank.select([len(bank)])
                self._kept[kind] = kept_layers(model)
            spare = self._spare.get(key)
            text.caches[key] = spare.pop() if spare else KeyValueCache(self._kept[kind], fork.depth if fork else 0)
        return text.caches[key]

    def end(self, text: Text) -> None:
        """Leave the memory of a text, which nobody reads on, to the next one."""
        for key, cache in text.caches.items():
            cache.clear()
            self._spare.setdefault(key, []).append(cache)
        text.caches = {}

    @torch.inference_mode()
    def extend_mixed(self, weight_E: Any, tokens_T: Sequence[int], text: Text) -> Tensor:
        """As `extend`, under the seed plus a weighted sum of adapters, the same ones for the whole text: log-probabilities [V]."""
        self.check(tokens_T, len(text.tokens) + len(tokens_T))
        text.tokens.extend(tokens_T)
        body, mixture = self.body(BASE), self._mixture(weight_E)
        bank = body.bank
        assert bank
        (read,) = self._read(body, self.cache(BASE, text), [0], text.tokens, lambda _: bank.mix([mixture]))
        return torch.log_softmax(read.logits_V.float(), -1)

    def adapters_only(self) -> None:
        """Raises BadInput where some expert is no adapter over the shared base."""
        if len(self.adapters) < len(self.experts):
            other = next(expert for e, expert in enumerate(self.experts) if e not in self.adapters)
            raise BadInput(f"expert {other.digest[:8]} is a {method_of(other)} one: only LoRA adapters can do this; mix outputs instead")

    def _mixture(self, weight_E: Any) -> dict[int, float]:
        """Number in the bank -> weight, of those that have one."""
        return {self.places[e][1]: float(weight_E[e]) for e in range(len(self.experts)) if weight_E[e]}

    def _read(
        self, body: Body, cache: KeyValueCache, numbers: list[int], tokens: Sequence[int],
        select: Callable[[Sequence[int]], None] | None = None, *, every: bool = False,
    ) -> list[Read]:  # fmt: skip
        """Let experts of one body read on; `select` readies its bank for some of them. `every`: log p of every new token as well."""
        found = []
        select = select or (body.bank.select if body.bank else None)
        for first, last in cache.arrange(numbers, len(tokens)):
            if select:
                select(cache.owner[first:last])
            begin = place = cache.length[first]
            room = max(1, LOGITS[kind_of(self.device)] // ((last - first) * self.seed.vocabulary)) if every else len(tokens)
            loglik = [torch.zeros(last - first, 0)]
            while place < len(tokens):
                end = min(place + room, len(tokens))
                known: dict[str, Any] = {"cache": cache.open(first, last)} if cache.layers else {}  # without one it reads all again
                unread_1U = torch.tensor([tokens[place if known else 0 : end]], device=self.device)
                keep = end - place if every else 1
                with body.fork.fan(last - first) if body.fork else nullcontext():
                    unread = unread_1U if body.fork else unread_1U.expand(last - first, -1)
                    output = body.model(input_ids=unread, use_cache=bool(known), logits_to_keep=keep, **known)
                logits_SUV = output.logits[:, -keep:]
                cache.close(first, last, end)
                if every:
                    loglik.append(_of(logits_SUV, tokens[place + 1 : end + 1]))
                place = end
            loglik_SU = torch.cat(loglik, 1)
            found += [Read(*one) for one in zip(
                cache.owner[first:last], logits_SUV[:, -1], [begin] * (last - first), loglik_SU, strict=True
            )]  # fmt: skip
        return found

    def check(self, tokens_N: Any, length: int) -> None:
        """Whether these tokens, in texts of `length` tokens, can be read. Raises BadInput."""
        tokens_N = torch.as_tensor(tokens_N, dtype=torch.long)
        if length > self.seed.context:
            raise BadInput(f"{length} tokens, and {self.seed.name} reads {self.seed.context} at most: shorten the text")
        if not len(tokens_N):
            raise BadInput("no tokens: a text begins with the separator")
        if int(tokens_N.min()) < 0 or int(tokens_N.max()) >= self.seed.vocabulary:
            raise BadInput(
                f"a token id outside 0 … {self.seed.vocabulary - 1}: the text was made with another tokenizer than {self.seed.name}'s"
            )


def _of(logits_SUV: Tensor, tokens_U: Sequence[int]) -> Tensor:
    """log p of tokens, each from the logits before it [S, U] on the CPU; the last logits may have none."""
    logp_SUV = torch.log_softmax(logits_SUV[:, : len(tokens_U)].float(), -1)
    index_SU1 = torch.tensor(tokens_U, dtype=torch.long, device=logp_SUV.device).expand(len(logp_SUV), -1)[..., None]
    return logp_SUV.gather(-1, index_SU1)[..., 0].cpu()


def _loglik(body: Body, tokens_BT: Tensor, last: int) -> Tensor:
    """log p of the last tokens of each row, given those before them [B, last], on the CPU. Where the head allows it, its logits are
    made a few rows at a time, so that they stay in the cache."""
    if not last:
        return torch.zeros(len(tokens_BT), 0)
    read_BT, target_N = tokens_BT[:, :-1], tokens_BT[:, -last:].flatten()
    if body.head_VD is None:
        logits_BTV = body.model(input_ids=read_BT, use_cache=False, logits_to_keep=last).logits[:, -last:]
        nll_N = cross_entropy(logits_BTV.flatten(0, 1).float(), target_N, reduction="none")
        return -nll_N.view(len(tokens_BT), -1).cpu()
    hidden_ND = body.model.base_model(input_ids=read_BT, use_cache=False)[0][:, -last:].flatten(0, 1)
    rows = max(ROWS, LOGITS_OF_HEAD[kind_of(tokens_BT.device)] // len(body.head_VD))
    parts = zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
    nll_N = torch.cat([cross_entropy(linear(part_CD, body.head_VD).float(), part_C, reduction="none") for part_CD, part_C in parts])
    return -nll_N.view(len(tokens_BT), -1).cpu()
