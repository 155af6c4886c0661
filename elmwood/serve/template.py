"""The chat template of a seed. It may come from a stranger: it is rendered in jinja2's sandbox, within limits of time and size."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from elmwood.errors import BadInput

LARGEST = 1 << 18  # bytes of a template
SECONDS = 2.0  # of rendering
LONGEST = 1 << 22  # characters of a rendered chat, and of what `*` and `+` make


class Refuses(Exception):
    """What a template says with raise_exception."""


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox; besides, no product or power is large."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(one) if hasattr(one, "__len__") else abs(one) if isinstance(one, int) else 1 for one in (left, right)]
        if sizes[0] * sizes[1] > LONGEST or (operator == "**" and max(sizes) > 64):
            raise Refuses("it multiplies to something too large")
        return super().call_binop(context, operator, left, right)


def read_template(folder: Path) -> tuple[str | None, Mapping[str, str]]:
    """The chat template of a transformers folder, None where there is none, and the special tokens that it may name."""
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size <= 1 << 24 else {}
    special = {name: token for name in ("bos_token", "eos_token", "pad_token", "unk_token") if (token := _text(found.get(name)))}
    own = folder / "chat_template.jinja"
    template = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else found.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return (template if isinstance(template, str) and template.strip() and len(template) <= LARGEST else None), special


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def render(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str], now: float, seconds: float = SECONDS) -> str:
    """A chat as the text that the model continues. Raises BadInput."""
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **words: json.dumps(value, ensure_ascii=False)
    words = {"raise_exception": _raise, "strftime_now": datetime.fromtimestamp(now, UTC).strftime}
    pieces, size = [], 0
    try:
        compiled = environment.from_string(template)
        with Deadline(seconds):
            for piece in compiled.generate(messages=list(messages), add_generation_prompt=True, **words, **special):
                pieces.append(piece)
                size += len(piece)
                if size > LONGEST:
                    raise Refuses("it grows too long")
    except Refuses as error:
        raise BadInput(f"the seed's chat template refuses these messages: {str(error)[:300]}") from error
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError) as error:
        raise BadInput(f"the seed's chat template cannot be rendered: {type(error).__name__}: {str(error)[:300]}") from error
    return "".join(pieces)


def _raise(message: object = "") -> None:
    raise Refuses(str(message))


class Deadline:
    """Python code of this thread ends after some seconds: a template can loop as long as it likes without a word of text."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._look)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)

    def _look(self, frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > self.end:
            raise Refuses("it takes too long")
        return self._look
