"""The steps of an engine: each admits requests, reads in one pass what all rows have not read, and says a token of each text that is ready.

A candidates of one text, M tokens with logits, V vocabulary. No thread and no clock: `engine.py` has those.
"""

import heapq
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from elmwood.ensemble.batch.candidates import Candidates, Look
from elmwood.ensemble.batch.interface import Counts, Ended, Event, Said
from elmwood.ensemble.batch.mixing import SUM, Mixing, mix
from elmwood.ensemble.batch.passes import BASE, Item, Reader
from elmwood.ensemble.batch.prefixes import Kept, Prefixes
from elmwood.ensemble.batch.residency import Residency, Seat
from elmwood.ensemble.batch.schedule import Job, Room, Sizes, admit, divide
from elmwood.ensemble.batch.texts import Row, Text
from elmwood.ensemble.batch.turns import failed
from elmwood.ensemble.decode import Rule, pick
from elmwood.errors import BadInput

LOOK = 64  # tokens of a prompt that are said at once
logger = logging.getLogger("elmwood.serve")


class Steps:
    """Requests at work over one model."""

    def __init__(
        self, reader: Reader, candidates: Candidates, residency: Residency, sizes: Sizes, context: int, stops: frozenset[int],
        prefixes: Prefixes, load: Callable[[str, int], None], fill: Callable[[int, int], None], mixing: Mixing = SUM, apart: bool = False,
    ):  # fmt: skip
        """`load`: begin to read an expert into a host place, and call `residency.loaded` later; `fill`: copy a place to a slot.
        `apart`: what is read of a row, and with what, depends on its own text alone."""
        self.reader, self.candidates, self.residency, self.sizes, self.prefixes = reader, candidates, residency, sizes, prefixes
        self.context, self.stops, self.mixing, self.load, self.fill, self.apart = context, stops, mixing, load, fill, apart
        self.waiting: list[Text] = []
        self.running: list[Text] = []
        self.free = list(range(sizes.rows))  # places among keys and values, as a heap
        self.count = self.failed = self.mismatches = 0
        self.share = 0.0  # of the keys and values, in use after the last step

    # ---- who is at work

    @torch.inference_mode()
    def step(self) -> bool:
        """Take one step; whether anything came of it."""
        self.count += 1
        before = len(self.waiting), len(self.running)
        for text in [text for text in (*self.waiting, *self.running) if text.cancelled]:
            self._end(text, Ended("cancelled"))
        if self.waiting:
            self._admit()
        for text in list(self.running):
            self._prepare(text)
        read = self._read()
        ready = [text for text in self.running if text.ready]
        for text in ready:
            self._say(text)
        if not read and not ready and self.running and not self.residency.loading:
            self._put_back(self.running[-1])  # they wait for one another
            read = True
        self.share = min(1.0, sum(row.read for text in self.running for row in text.rows.values()) / self.sizes.tokens)
        return read or bool(ready) or before != (len(self.waiting), len(self.running))

    def fail(self, error: Exception) -> None:
        """End all that is at work; the engine lives on."""
        for text in (*self.waiting, *self.running):
            self._end(text, failed(error))
        self._start_over()

    def _admit(self) -> None:
        jobs = []
        for text in self.waiting:
            self.look(text)
            names = frozenset(self.candidates.names[c] for c in text.run if c != self.candidates.base)
            jobs.append(Job(text.number, names, self.candidates.most, self._most(text), text.overtaken))
        seated = self.residency.seated | {self.candidates.names[c] for text in self.running for c in text.pinned}
        room = Room(
            self.sizes.running - len(self.running),
            self.sizes.rows - len(self.running) * self.candidates.most,
            self.sizes.tokens - sum(map(self._most, self.running)),
            len(self.residency.digest_S) - len(seated), frozenset(seated),
        )  # fmt: skip
        chosen = set(admit(jobs, room))
        last = max((n for n, text in enumerate(self.waiting) if text.number in chosen), default=-1)
        for n, text in enumerate(self.waiting):
            if text.number in chosen:
                self.running.append(text)
            else:
                text.overtaken += n < last
        self.waiting = [text for text in self.waiting if text.number not in chosen]

    def _most(self, text: Text) -> int:
        """Tokens of keys and values that a text's rows hold in the end."""
        return self.candidates.most * min(self.context, len(text.request.tokens) + text.room)

    def look(self, text: Text) -> None:
        """Let the router read what is new of a text, and find the candidates of the next token; of a prompt that is said as well, those of
        as many tokens as few enough candidates predict. Of a text that no step knows yet, any thread may ask this."""
        if text.looks:
            return
        if not text.pushed:
            text.walk = self.candidates.start(text.choice)
        run: set[int] = set()
        for place in range(text.base, text.base + max(1, self._reach(text))):
            look, text.pending = text.pending or self._push(text, place), None
            both = run.union(self._needs(look.active))
            if text.looks and len(both) > self.candidates.most:
                text.pending = look
                break
            run = both
            text.looks.append(look)
        text.run = sorted(run)
        for row in text.rows.values():
            row.ahead = [row.last_V] if row.read == text.base and row.last_V is not None else []

    def _reach(self, text: Text) -> int:
        """Tokens that may be said at once."""
        return min(LOOK, len(text.tokens) - text.base)

    def _push(self, text: Text, place: int) -> Look:
        look = self.candidates.look(text.choice, text.walk, text.tokens[text.pushed : place], place)
        text.pushed = place
        return look

    def _needs(self, active: list[int]) -> list[int]:
        """Who must read for these to predict."""
        seed, bounded = self.candidates.seed, self.candidates.bounded
        return [*active, seed] if seed not in active and bounded.intersection(active) else active

    # ---- rows

    def _prepare(self, text: Text) -> None:
        """A row for each candidate that predicts the next token, and its adapter in a slot, as far as it is there."""
        names = self.candidates.names
        for c in text.pinned.difference(text.run):
            self._rest(text, c)
        for c in [c for c in text.rows if self.apart and c not in text.run]:
            self._drop(text, c)  # others might take its place, or not
        for c in text.run:
            if c != self.candidates.base:
                state = self.residency.want(names[c], self.load)
                if state == "refused":
                    return self._without(text, c)
                if state == "full":
                    continue
                if c not in text.pinned:
                    self.residency.pin(names[c])
                    text.pinned.add(c)
                if state == "loading":
                    continue
            row = text.rows.get(c) or self._row(text, c)
            if row is not None and row.seat is None and c != self.candidates.base:
                row.seat = self._seat(names[c])

    def _seat(self, digest: str) -> Seat | None:
        seat = self.residency.seat(digest)
        if seat is not None and seat.fresh:
            self.fill(self.residency.place[digest], seat.slot)
        return seat

    def _row(self, text: Text, c: int) -> Row | None:
        """A new row, in a place that is free or that of the row which has been idle for longest."""
        if not self.free:
            idle = [(row.used, n, e) for n, other in enumerate(self.running) for e, row in other.rows.items() if e not in other.run]
            if not idle:
                return None
            _, n, e = min(idle)
            self._drop(self.running[n], e)
        row = text.rows[c] = Row(c, heapq.heappop(self.free))
        self._read_before(text, row)
        return row

    def _read_before(self, text: Text, row: Row) -> None:
        """Let a new row begin with what its candidate has read of another text that begins alike. One token at least is left to read."""
        most = self.reader.trunk.begin(text.number, text.tokens[: text.base], self.prefixes) if self.reader.trunk else text.base
        found = self.prefixes.find(self.candidates.names[row.candidate], text.tokens[: text.base]) if text.base > 1 else None
        if found is None:
            return
        kept, length = found
        memory = self.candidates.memory
        row.read = length = min(length - memory, text.base - 1, most)  # what it gave the next token is known as well
        store = self.reader.store
        store.reserve(row.place + 1, length)
        store.give(row.place, kept.states, length)
        if memory:
            assert self.candidates.routing
            row.loglik = kept.loglik_T[:length].tolist()
            row.memory = float(self.candidates.routing.fading ** np.arange(length - 1, -1, -1) @ kept.loglik_T[:length])
            row.known = float(kept.loglik_T[length])

    def _keep(self, text: Text, row: Row) -> None:
        digest, read = self.candidates.names[row.candidate], text.tokens[: row.read]
        if self.prefixes.wants(digest, read):
            loglik_T = np.array(row.loglik if self.candidates.memory else [], np.float64)
            self.prefixes.keep(digest, Kept(np.array(read, np.int64), loglik_T, self.reader.store.take(row.place, row.read)))

    def _rest(self, text: Text, c: int) -> None:
        """A candidate that does not predict any more needs its adapter no more. Its row stays, for it may be back."""
        row = text.rows.get(c)
        if row is not None:
            if row.seat is not None:
                self.residency.leave(row.seat)
                row.seat = None
            if row.last_V is not None:
                row.last_V = row.last_V.clone()  # not a part of what all rows said
        if c in text.pinned:
            text.pinned.remove(c)
            self.residency.unpin(self.candidates.names[c])

    def _drop(self, text: Text, c: int) -> None:
        self._rest(text, c)
        heapq.heappush(self.free, text.rows.pop(c).place)

    def _without(self, text: Text, c: int) -> None:
        """An expert that cannot be loaded is no candidate."""
        why = self.residency.refused[self.candidates.names[c]]
        try:
            if text.choice.alone is not None:
                raise BadInput(why)
            text.choice = self.candidates.choose(text.request.only, text.request.without, self.residency.refused)
        except BadInput:
            return self._end(text, Ended("error", f"expert {self.candidates.names[c][:8]} cannot be used: {why}", 503))
        text.walk, text.pushed = self.candidates.start(text.choice), 0  # the router reads the text again, for those that are left
        text.looks = [self._push(text, look.place) for look in text.looks]
        text.pending = text.pending and self._push(text, text.pending.place)
        text.run = sorted({c for look in text.looks for c in self._needs(look.active)})
        self._prepare(text)

    def _put_back(self, text: Text) -> None:
        """The youngest begins again when there is room."""
        if len(self.running) == 1:
            return self._end(text, Ended("error", "its experts do not fit into memory together: allow more slots or rows", 503))
        self._again(text)

    def _again(self, text: Text) -> None:
        if self.apart and (text.made or text.request.echo):  # what was read token by token would be read at once
            return self._end(text, Ended("error", "it would have to be read again, which is not deterministic: ask again later", 503))
        self._release(text)
        self.running.remove(text)
        self.waiting.insert(0, text)

    def _start_over(self) -> None:
        """Keys and values of a pass that failed may be of any size. Nothing is kept, and who was not in it reads its text again."""
        for text in self.running[::-1]:
            self._again(text)
        self.reader.clear()
        self.prefixes.clear()

    def _release(self, text: Text) -> None:
        for c in list(text.rows):
            self._drop(text, c)
        for c in list(text.pinned):
            self._rest(text, c)
        if self.reader.trunk:
            self.reader.trunk.leave(text.number)

    def _end(self, text: Text, ended: Ended) -> None:
        if ended.reason != "error":
            for row in text.rows.values():
                self._keep(text, row)
            if self.reader.trunk:
                self.reader.trunk.keep(text.number, text.tokens, self.prefixes)
        self._release(text)
        (self.running if text in self.running else self.waiting).remove(text)
        self.failed += ended.reason == "error"
        self._tell(text, ended)

    def _tell(self, text: Text, event: Event) -> None:
        try:
            text.hear(event)
        except Exception:  # who asked is broken, and nobody else suffers from it
            logger.exception("request %d cannot be told", text.number)
            text.cancelled = True

    # ---- reading

    def _read(self) -> bool:
        """One pass, or several where rows are kept apart; whether anything was read."""
        due: list[tuple[Text, Row]] = []
        for text in list(self.running):
            rows = [text.rows[c] for c in text.run if c in text.rows]
            if any(row.seat is not None and not self.residency.holds(row.seat) for row in rows):
                self.mismatches += 1
                self._end(text, Ended("error", "an expert's slot was given to another while it was read: send the request again", 503))
                continue
            due += [(text, row) for row in rows if row.read < text.end and (row.seat is not None or row.candidate == self.candidates.base)]
        left = [text.end - row.read for text, row in due]
        longer = [n for n, size in enumerate(left) if size > 1]
        shares = [self.sizes.chunk] * len(longer) if self.apart else divide([left[n] for n in longer], self.sizes.chunk)
        for n, size in zip(longer, shares, strict=True):
            left[n] = min(left[n], size)
        pairs = [(text, row, size) for (text, row), size in zip(due, left, strict=True) if size]
        parts = [pairs]
        if self.apart:  # no row of a pass changes the bits of another
            single, most = [pair for pair in pairs if pair[2] == 1], self.reader.at_once()
            parts = [[pair] for pair in pairs if pair[2] > 1] + [single[n : n + most] for n in range(0, len(single), most)]
        for part in parts:
            self._pass([(text, row, size) for text, row, size in part if text in self.running])
        return bool(pairs)

    def _pass(self, pairs: list[tuple[Text, Row, int]]) -> None:
        """Let these rows read so many tokens each."""
        if not pairs:
            return
        try:
            logits_MV, found = self.reader.read([self._item(text, row, size) for text, row, size in pairs])
            logp_MV = torch.log_softmax(logits_MV.float(), -1)
        except Exception as error:  # whatever it was, the engine lives on
            logger.exception("a pass over %d rows", len(pairs))
            for text in dict.fromkeys(text for text, _, _ in pairs):
                self._end(text, failed(error))
            self._start_over()
            return
        for (text, row, size), part in zip(pairs, found, strict=True):
            self._absorb(text, row, size, logp_MV[part])

    def _item(self, text: Text, row: Row, size: int) -> Item:
        slot = BASE if row.seat is None else row.seat.slot
        end = row.read + size
        wanted = size if self.candidates.memory else max(1, min(size, end - text.base + 1))
        return Item(row.place, slot, row.read, text.tokens[row.read : end], wanted, text.number)

    def _absorb(self, text: Text, row: Row, size: int, logp_UV: Tensor) -> None:
        """Note what a row has read, and what it gave it."""
        row.used = self.count
        if self.candidates.memory:
            said = text.tokens[row.read : row.read + size]
            first = 0.0 if not row.read else row.known if row.last_V is None else float(row.last_V[said[0]])
            rest = logp_UV[:-1].gather(1, torch.tensor(said[1:], device=logp_UV.device)[:, None])[:, 0].tolist() if size > 1 else []
            assert self.candidates.routing
            for nats in (first, *rest):
                row.memory = row.memory * self.candidates.routing.fading + nats
                row.loglik.append(nats)
        row.read += size
        row.last_V = logp_UV[-1]
        row.ahead += logp_UV[max(0, len(logp_UV) - 1 - (row.read - text.base)) :].unbind() if row.read >= text.base else ()

    # ---- saying

    def _say(self, text: Text) -> None:
        """The next token, or those of a prompt that are known, of a text whose candidates have read all there is."""
        memory = {c: self._memories(text, text.rows[c]) for c in text.run}
        for n, look in enumerate(text.looks):
            if asked := self.candidates.undecided(text.choice, text.walk, look):
                then = {c: self._memory_at(text.rows[c], look.since) for c in asked}
                self.candidates.decide(text.choice, text.walk, look, then)
            weight = self.candidates.weigh(text.choice, text.walk, look, {c: memory[c][n] for c in look.active})
            said = {c: row.ahead[n] for c, row in text.rows.items() if c in text.run}
            logp_V = mix(weight, said, self.candidates, self.mixing)
            prompt, stop = text.base < len(text.tokens), False
            if prompt:
                token = text.tokens[text.base]
            elif text.over:
                return self._end(text, Ended("length"))
            else:
                chance = torch.rand(1, generator=text.generator).to(logp_V.device)
                token = int(pick(logp_V, Rule(text.request.temperature, text.request.top_p), chance))
                stop = token in (self.stops if text.request.stops is None else text.request.stops)
                text.tokens.append(token)
                text.made += 1
            top = logp_V.topk(min(text.request.logprobs, len(logp_V))) if text.request.logprobs else None
            pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
            shares = {self.candidates.names[c]: share for c, share in weight.items() if share}
            self._tell(text, Said(token, float(logp_V[token]), pairs, shares, prompt, stop))
            text.base += 1
            if stop or text.over:
                return self._end(text, Ended("stop" if stop else "length"))
        text.looks = []
        self.look(text)

    def _memories(self, text: Text, row: Row) -> list[float]:
        """A candidate's memory before each token that is looked at."""
        if len(text.looks) == 1 or not self.candidates.memory:
            return [row.memory] * len(text.looks)
        assert self.candidates.routing
        fading, found = self.candidates.routing.fading, [0.0]
        for nats in row.loglik:
            found.append(found[-1] * fading + nats)
        return found[text.base : text.base + len(text.looks)]

    def _memory_at(self, row: Row, place: int) -> float:
        """A candidate's memory before a token that it has read."""
        assert self.candidates.routing
        return float(self.candidates.routing.fading ** np.arange(place - 1, -1, -1) @ np.array(row.loglik[:place]))

    def counts(self) -> Counts:
        """Their state, at any time and from any thread."""
        return Counts(
            waiting=len(self.waiting), running=len(self.running), rows=self.sizes.rows - len(self.free), cache_share=self.share,
            experts=self.candidates.seed, resident=sum(digest is not None for digest in self.residency.digest_S),
            loading=len(self.residency.loading), mismatches=self.mismatches, failed=self.failed,
            refused=len(self.residency.refused),
        )  # fmt: skip
