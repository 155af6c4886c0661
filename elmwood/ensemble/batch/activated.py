"""Steps of experts that act from the end of a prompt on (ensemble/activated.py): its row of the seed reads the prompt, and theirs go on
from a copy of that row.

A text is continued in spans. The tokens that follow the prompt are one; a prompt that is said (echo) is cut into blocks, each of which is
continued as if all before it were the prompt. The last token before a span is the first that experts read; candidates are those of the
text before the span, and what they say after it is all that they remember.
"""

from typing import Any

from elmwood.ensemble.batch.candidates import Look
from elmwood.ensemble.batch.passes import Item
from elmwood.ensemble.batch.steps import Steps
from elmwood.ensemble.batch.texts import Row, Text


class Activated(Steps):
    """Requests at work over one model. `block`: tokens of a span of a prompt."""

    def __init__(self, block: int, *given: Any):
        super().__init__(*given)
        self.block = block

    def _span(self, text: Text, place: int) -> int:
        """The first token of the span of a token; 0 where one candidate answers alone, which reads the whole text as ever."""
        prompt = len(text.request.tokens)
        return 0 if text.choice.alone is not None else max(1, place - place % self.block) if place < prompt else prompt

    def _enter(self, text: Text) -> None:
        """Let a text go on in the span of its next token."""
        span = self._span(text, text.base)
        if span != text.span:
            text.span = span
            for c in [c for c in text.rows if c != self.candidates.seed]:
                self._drop(text, c)
            for row in text.rows.values():
                self._forget(row)

    # ---- who reads

    def look(self, text: Text) -> None:
        if not text.looks:
            self._enter(text)
        super().look(text)

    def _reach(self, text: Text) -> int:
        first, prompt = text.span, len(text.request.tokens)
        end = min(prompt, first - first % self.block + self.block) if 0 < first < prompt else len(text.tokens)
        return min(super()._reach(text), end - text.base)

    def _push(self, text: Text, place: int) -> Look:
        first = self._span(text, place)
        if not first:
            return super()._push(text, place)
        if text.held is None or text.pushed != first:
            text.held = self.candidates.look(text.choice, text.walk, text.tokens[text.pushed : first], first)
            text.pushed = first
        return text.held._replace(place=place)

    def _prepare(self, text: Text) -> None:
        """The seed reads what comes before the span, as long as a row of an expert has to be made of it."""
        self._enter(text)
        if not text.span:
            text.until = None
            return super()._prepare(text)
        seed, row = self.candidates.seed, text.rows.get(self.candidates.seed)
        wanted = sorted({c for look in text.looks for c in self._needs(look.active)})
        behind = text.span > 1 and (row is None or row.read < text.span - 1) and any(c != seed and c not in text.rows for c in wanted)
        text.run, text.until = ([seed], text.span - 1) if behind else (wanted, None)
        super()._prepare(text)

    # ---- rows

    def _read_before(self, text: Text, row: Row) -> None:
        if not text.span:
            return super()._read_before(text, row)
        if row.candidate == self.candidates.seed:
            super()._read_before(text, row)
        elif text.span > 1:
            store, row.read = self.reader.store, text.span - 1
            store.reserve(row.place + 1, row.read)
            store.give(row.place, store.take(text.rows[self.candidates.seed].place, row.read), row.read)
        self._forget(row)

    def _forget(self, row: Row) -> None:
        """It has said nothing of this span, nor of the token before it."""
        row.memory, row.known, row.loglik, row.last_V = 0.0, 0.0, [0.0] * row.read, None

    def _keep(self, text: Text, row: Row) -> None:
        if not text.span or row.candidate == self.candidates.seed:
            super()._keep(text, row)

    def _item(self, text: Text, row: Row, size: int) -> Item:
        item = super()._item(text, row, size)
        return item if text.until is None else item._replace(wanted=1)

    def _absorb(self, text: Text, row: Row, size: int, logp_UV: Any) -> None:
        if text.until is None:
            return super()._absorb(text, row, size, logp_UV)
        row.used, row.read = self.count, row.read + size
        self._forget(row)

    def _say(self, text: Text) -> None:
        if text.until is None:
            super()._say(text)
