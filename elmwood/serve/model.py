"""An opened model: its engine, its words, its experts, and what requests may call it."""

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from elmwood.corpus.tokens import token_bytes
from elmwood.domains.route import Routing
from elmwood.ensemble.batch.interface import USUAL, Engine, Limits
from elmwood.ensemble.guide import Guide
from elmwood.errors import BadInput
from elmwood.lm.files import seed_folder, tokenizer
from elmwood.records import Ensemble, Record, Seed
from elmwood.serve.messages import Message
from elmwood.serve.refusals import Refused
from elmwood.serve.spelling import name_of
from elmwood.serve.template import read_template, render
from elmwood.store import Named, Store
from elmwood.study.ancestry import Settings, as_model, seed_of, with_mixing
from elmwood.study.ancestry import name_of as called
from elmwood.study.trial import check_use

SHORTEST = 8  # digits of a digest that name an expert


class Card(NamedTuple):
    """An expert that may answer."""

    digest: str
    name: str
    domain: int | None = None
    contributor: str | None = None


class Served:
    """A model, its engine and its router."""

    def __init__(self, name: str, record: Record, seed: Seed, store: Store, engine: Engine, guide: Guide | None = None):
        self.name, self.record, self.seed, self.engine, self.guide = name, record, seed, engine, guide
        self.tokenizer: Tokenizer = tokenizer(seed, store)
        known = token_bytes(self.tokenizer)
        self.spelled = known + [b""] * (engine.vocabulary - len(known))
        self.template, self.special = read_template(seed_folder(seed, store))
        self.created = int(time.time())
        self.fingerprint = f"elm_{record.digest[:16]}"
        found = map(Card._make, guide.cards()) if guide else (Card(digest, digest[:8]) for digest in engine.experts)
        self.cards = {card.digest: card for card in found}
        self.sorted = sorted(self.cards)
        self._named: dict[str, list[str]] = {}
        for card in self.cards.values():
            self._named.setdefault(card.name, []).append(card.digest)

    @cached_property
    def longest(self) -> int:
        """Bytes that one token stands for, at most."""
        special = (len(token.content.encode()) for token in self.tokenizer.get_added_tokens_decoder().values())
        return max(1, *map(len, self.spelled), *special)

    # ---- names ------------------------------------------------------------------------------------------------------

    def whole(self, name: str) -> bool:
        """Whether a name means the model with its router."""
        return name in ("auto", self.name, self.record.digest)

    def expert(self, name: str) -> str | None:
        """The candidate of a name: "seed", or an expert's digest, its beginning, or its name where no other has it."""
        if name == "seed" or name in self.cards:
            return name
        if len(found := self._named.get(name, [])) == 1:
            return found[0]
        if SHORTEST <= len(name) < 64:
            begins = [digest for digest in self.cards if digest.startswith(name)]
            return begins[0] if len(begins) == 1 else None
        return None

    def candidates(self, model: str, only: Sequence[str], without: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Which experts a request leaves the router, by digest: those of `only`, and not those of `without`. Raises Refused."""
        if not self.whole(model) and not self.expert(model):
            raise Refused(404, f"the model {model!r} does not exist: /v1/models and /v1/experts list names", "model", "model_not_found")
        found = []
        for names in (only, without):
            unknown = [name for name in names if not self.expert(name)]
            if unknown:
                raise Refused(400, f"no expert {unknown[0]!r}: /v1/experts lists them", "elmwood", "unknown_expert")
            found.append(tuple(expert for name in names if (expert := self.expert(name))))
        if self.whole(model):
            return found[0], found[1]
        if only or without:
            raise Refused(400, f"model {model!r} is one expert: choose among several with model 'auto'", "elmwood", "invalid_value")
        return (str(self.expert(model)),), ()

    # ---- words ------------------------------------------------------------------------------------------------------

    def encode(self, text: str, begin: bool = True, param: str = "prompt") -> list[int]:
        """The tokens of a text, by default after the separator, as the model was trained. Raises Refused."""
        most = self.engine.context
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise Refused(400, f"the text is not valid Unicode: {error.reason}", param, "invalid_value") from error
        if size > most * self.longest:
            raise too_long(f"{len(text):,} characters", most, param)
        found = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.engine.separator, *found] if begin else found

    def chat(self, messages: Sequence[Message], now: float) -> list[int]:
        """The tokens of a chat, by the seed's own template, which writes special tokens itself. Raises Refused."""
        if self.template is None:
            raise Refused(
                400, f"the seed {self.seed.name} has no chat template, so it was trained on no chats: use /v1/completions", "messages",
                "no_chat_template",
            )  # fmt: skip
        plain = []
        for message in messages:
            parts = message.content if isinstance(message.content, list) else []
            if wrong := [part.type for part in parts if part.type != "text"]:
                raise Refused(400, f"content of type {wrong[0]!r} is not supported: send text", "messages", "unsupported_content")
            content = message.content if isinstance(message.content, str) else "".join(part.text for part in parts)
            plain.append({"role": message.role, "content": content} | ({"name": message.name} if message.name else {}))
        try:
            return self.encode(render(self.template, plain, self.special, now), False, "messages")
        except BadInput as error:
            raise Refused(400, str(error), "messages", "chat_template") from error

    def token_name(self, token: int) -> str:
        """A token as a string; never empty."""
        return name_of(self.spelled[token], self.tokenizer.id_to_token(token) or f"<{token}>")

    def expert_name(self, digest: str) -> str:
        return self.cards[digest].name if digest in self.cards else digest

    def facts(self) -> dict[str, Any]:
        """What a model is made of, for provenance."""
        facts: dict[str, Any] = {"model": self.record.digest, "kind": self.record.kind, "seed": self.seed.digest}
        if isinstance(self.record, Ensemble):
            facts["router"] = {name: getattr(self.record, name) for name in (*Routing.__dataclass_fields__, "mixing", "aggregation")}
        return facts | {"fingerprint": self.fingerprint}


def too_long(size: str, most: int, param: str) -> Refused:
    message = f"the prompt has {size}, and the model's context is {most} tokens: shorten it"
    return Refused(400, message, param, "context_length_exceeded")


def record_of(model: Named, store: Store, mixing: str | None = None, settings: Settings | None = None) -> Record:
    """What is served. A seed, which stands for the ensemble of a hub without experts, mixes nothing. Raises UnknownName, BadInput."""
    record = as_model(store.load(model), store)
    return record if isinstance(record, Seed) else with_mixing(record, mixing, store, settings)


def open_served(
    model: Named, store: Store, *, mixing: str | None = None, settings: Settings | None = None, device: str | None = None,
    limits: Limits = USUAL, like: Served | None = None, name: str | None = None,
) -> Served:  # fmt: skip
    """Open a model by name or record; a forest stands for its default ensemble. `settings`: other values of an ensemble's fields; `like`:
    one that is open, to share the weights of the seed with; `name`: what clients call it, by default as in the store.
    Raises UnknownName, BadInput, BadSeed, ForeignExpert."""
    from elmwood.ensemble.batch.opening import open_engine  # torch

    record = record_of(model, store, mixing, settings)
    seed = seed_of(record, store)
    check_use(seed, "generate")
    engine = open_engine(record, store, device, limits, like.engine if like else None)
    try:
        guide = Guide(record, store) if isinstance(record, Ensemble) else None
        return Served(name or called(model, store), record, seed, store, engine, guide)
    except BaseException:
        engine.close()
        raise
