"""What there is: models, experts, tokens, and where a text would go."""

from collections.abc import Mapping
from typing import Any

from elmwood.serve.answers import place_of
from elmwood.serve.messages import Detokenize, Route, Tokenize, parse
from elmwood.serve.model import Card, Served
from elmwood.serve.refusals import Refused

PAGE = 50  # experts, by default
MOST = 500


def models(served: Served) -> dict[str, Any]:
    """GET /v1/models: a few. Clients fill menus from this list, so experts are at /v1/experts."""
    names = [served.name, "auto", *(["seed"] if served.name != "seed" else [])]
    return {"object": "list", "data": [_model(served, name) for name in dict.fromkeys(names)]}


def model(served: Served, name: str) -> dict[str, Any]:
    """GET /v1/models/{id}: also for each expert. Raises Refused."""
    if served.whole(name) or name == "seed":
        return _model(served, name)
    if digest := served.expert(name):
        return _card(served, served.cards[digest])
    raise Refused(404, f"the model {name!r} does not exist: /v1/models and /v1/experts list names", "model", "model_not_found")


def _model(served: Served, name: str) -> dict[str, Any]:
    root = served.seed.digest if name == "seed" else served.record.digest
    parent = None if root == served.seed.digest else served.seed.digest
    return {
        "id": name, "object": "model", "created": served.created, "owned_by": "elmwood", "root": root, "parent": parent,
        "max_model_len": served.engine.context,
    }  # fmt: skip


def _card(served: Served, card: Card) -> dict[str, Any]:
    return _model(served, card.digest) | {
        "root": card.digest, "parent": served.seed.digest, "owned_by": card.contributor or "elmwood", "name": card.name,
        "domain": card.domain,
    }  # fmt: skip


def experts(served: Served, words: Mapping[str, str]) -> dict[str, Any]:
    """GET /v1/experts?q&cursor&limit: by digest; `q` is a part of a name or the beginning of a digest. Raises Refused."""
    limit, query, cursor = words.get("limit", str(PAGE)), words.get("q", "").casefold()[:200], words.get("cursor", "")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MOST:
        raise Refused(400, f"limit is {limit[:20]!r}: it is from 1 to {MOST}", "limit", "invalid_value")
    found = []
    for digest in served.sorted:
        card = served.cards[digest]
        if digest > cursor and (query in card.name.casefold() or (query and digest.startswith(query))):
            found.append(card)
            if len(found) > int(limit):
                break
    page, more = found[: int(limit)], len(found) > int(limit)
    return {
        "object": "list", "data": [_card(served, card) for card in page], "has_more": more,
        "next_cursor": page[-1].digest if more else None, "total": len(served.cards),
    }  # fmt: skip


def route(served: Served, given: Any, now: float) -> dict[str, Any]:
    """POST /v1/route: which experts would predict what follows a text. No model is run. Raises Refused."""
    asked = parse(Route, given)
    if (asked.prompt is None) == (asked.messages is None):
        raise Refused(400, "send a prompt or messages", "prompt", "invalid_value")
    served.candidates(asked.model, (), ())
    if asked.messages is not None:
        tokens = served.chat(asked.messages, now)
    elif isinstance(asked.prompt, str):
        tokens = served.encode(asked.prompt)
    else:
        tokens = list(asked.prompt or [])
        if not tokens or min(tokens) < 0 or max(tokens) >= served.engine.vocabulary:
            raise Refused(400, f"tokens are from 0 to {served.engine.vocabulary - 1}, at least one", "prompt", "invalid_value")
    alone = None if served.whole(asked.model) else served.expert(asked.model)
    if served.guide and not alone:
        found = [place_of(place) for place in served.guide.look(tokens)[: asked.most]]
    else:
        only = alone or (next(iter(served.cards)) if served.cards else "seed")
        found = [{"id": only, "name": served.expert_name(only), "distance2": None, "weight": 1.0}]
    drawn = served.guide.draw(tokens) if served.guide and asked.map else None
    if drawn:
        spots = [{"id": digest, "name": served.expert_name(digest), "x": x, "y": y} for digest, x, y in drawn.spots]
        extra: dict[str, Any] = {"map": {"experts": spots, "path": drawn.path}}
    else:
        extra = {"map": None} if asked.map else {}
    return {"object": "route", "tokens": len(tokens), "candidates": found} | extra | served.facts()


def tokenize(served: Served, given: Any, now: float) -> dict[str, Any]:
    """POST /tokenize. `add_special_tokens`: with the separator that the server puts before text. Raises Refused."""
    asked = parse(Tokenize, given)
    if (asked.prompt is None) == (asked.messages is None):
        raise Refused(400, "send a prompt or messages", "prompt", "invalid_value")
    tokens = served.chat(asked.messages, now) if asked.messages else served.encode(asked.prompt or "", asked.add_special_tokens)
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": served.engine.context, "tokens": tokens}
    return found | ({"token_strs": [served.token_name(token) for token in tokens]} if asked.return_token_strs else {})


def detokenize(served: Served, given: Any) -> dict[str, Any]:
    """POST /detokenize. Raises Refused."""
    tokens = parse(Detokenize, given).tokens
    if tokens and not 0 <= min(tokens) <= max(tokens) < served.engine.vocabulary:
        raise Refused(400, f"tokens are from 0 to {served.engine.vocabulary - 1}", "tokens", "invalid_value")
    return {"prompt": served.tokenizer.decode(tokens, skip_special_tokens=False)}


def tokenizer_info(served: Served) -> dict[str, Any]:
    """GET /tokenizer_info."""
    separator = served.token_name(served.engine.separator)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "vocab_size": served.tokenizer.get_vocab_size(),
        "model_max_length": served.engine.context, "separator": separator, "bos_token": served.special.get("bos_token"),
        "eos_token": served.special.get("eos_token", separator), "pad_token": served.special.get("pad_token"),
        "chat_template": served.template,
    }  # fmt: skip
