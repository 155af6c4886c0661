"""Which expert answers a request: the nearest of its text. No model is run."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elmwood.domains.route import router_of
from elmwood.ensemble.guide import Guide
from elmwood.errors import BadInput
from elmwood.serve.model import Served
from elmwood.serve.refusals import Refused


class Pick(NamedTuple):
    """Where a text goes."""

    choice: str  # digest of an expert, or "seed"
    near: tuple[str, ...]  # the nearest experts, as many as the ensemble mixes

    @property
    def alone(self) -> tuple[str, ...]:
        """The expert that answers alone; none where the seed does."""
        return () if self.choice == "seed" else (self.choice,)


NOWHERE = Pick("seed", ())  # a model without a router


def check_routes(guide: Guide) -> None:
    """Whether the router can choose before any model has run. Raises BadInput."""
    if router_of(guide.routing).distances is None:
        raise BadInput(
            f"router {guide.routing.router!r} looks at no distances: a gateway runs no experts, so choose an ensemble whose does"
        )


def pick(guide: Guide | None, tokens: Sequence[int], only: Collection[str] = (), without: Collection[str] = ()) -> Pick:
    """The nearest candidate of those that a request leaves; the seed where all are farther than it, or nothing is known of the text.
    Raises Refused."""
    if guide is None:
        return NOWHERE
    experts = guide.digests[:-1]
    left = [e for e, digest in enumerate(experts) if (not only or digest in only) and digest not in without]
    seed_left = (not only or "seed" in only) and "seed" not in without
    if not left and not seed_left:
        raise Refused(400, "no candidate is left: name fewer in `without`, or more in `only`", "elmwood", "invalid_value")
    if not left:
        return Pick("seed", ())
    if len(left) == 1 and not seed_left:
        return Pick(experts[left[0]], (experts[left[0]],))
    dist2_1E = guide.router.push(tokens)
    dist2_L = np.full(len(left), np.inf) if dist2_1E is None else np.asarray(dist2_1E[0])[left]
    nearest = np.argsort(dist2_L, kind="stable")[: guide.routing.top_k]
    near = tuple(experts[left[place]] for place in nearest)
    first = float(dist2_L[nearest[0]])
    far = guide.routing.seed_distance if guide.routing.seed_distance is not None else np.inf
    if seed_left and (not np.isfinite(first) or first > far):
        return Pick("seed", near if np.isfinite(first) else ())
    return Pick(near[0], near)


def prompts_of(given: Mapping[str, Any], served: Served) -> list[list[int]]:
    """The tokens of each prompt of a completion. Raises Refused."""
    prompt = given.get("prompt")
    if isinstance(prompt, str):
        return [served.encode(prompt)]
    several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    return [served.encode(one) if isinstance(one, str) else _checked(one, served) for one in several]


def _checked(tokens: Any, served: Served) -> list[int]:
    most = served.engine.vocabulary
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int and 0 <= token < most for token in tokens):
        raise Refused(400, f"a prompt is text, or a list of tokens from 0 to {most - 1}, or a list of prompts", "prompt", "invalid_value")
    return tokens


def text_of(given: Mapping[str, Any]) -> str:
    """What the messages of a chat say, for the router; the engine's own template spells the chat. Raises Refused."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise Refused(400, "messages is a list of at least one message", "messages", "invalid_value")
    found = []
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        found += [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(found)
