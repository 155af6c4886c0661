"""The chat template of a seed. It may come from a stranger: it is rendered in jinja2's sandbox, within limits of time and size."""

import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.runtime import markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

from elmwood.errors import BadInput

LARGEST = 1 << 18  # bytes of a template
SECONDS = 2.0  # of rendering
LONGEST = 1 << 22  # characters of a rendered chat, and of what an operator makes
LONGEST_RANGE = 100_000  # also the widest field
LARGEST_PRODUCT = 1 << 28  # of the lengths of a function's two longest arguments
WIDTH = re.compile(r"[%{][^%{}]*(\d{5}|\*)")  # of a format: a wide field, or one that an argument makes wide


JOINS = (str_join.__code__, markup_join.__code__)  # what ~ becomes

BROKEN = (  # what a template of a stranger raises; CPython has a SystemError where recursion ends in a trace function
    TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError, SystemError,
)  # fmt: skip


class Refuses(Exception):
    """What a template says with raise_exception."""


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox; besides, no single step makes anything large."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.filters |= {"tojson": _to_json}
        self.filters = {name: _checked(function) for name, function in self.filters.items()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        first, second = _size(left), _size(right)
        if operator == "%" and isinstance(left, str):
            _check(left, right)
        elif (first + second if operator == "+" else first * second) > LONGEST or (operator == "**" and max(first, second) > 64):
            raise Refuses("it makes something too large")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *given: Any, **named: Any) -> Any:  # type: ignore[override]
        _check(getattr(getattr(function, "__wrapped__", function), "__self__", None), *given, *named.values())
        return super().call(context, function, *given, **named)


def _size(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else abs(value) if isinstance(value, int) else 1


def _check(*given: Any) -> None:
    """What a function gets decides how large its result may be: widths, and products of lengths. Raises Refuses."""
    whole = [one for one in given if isinstance(one, int)]
    long = sorted(len(one) for one in given if hasattr(one, "__len__"))
    widths = [one for one in given if isinstance(one, str) and ("%" in one or "{" in one) and WIDTH.search(one)]
    if any(abs(one) > LONGEST_RANGE for one in whole) or math.prod(long[-2:]) > LARGEST_PRODUCT or widths:
        raise Refuses("it makes something too large")


def _checked(function: Any) -> Any:
    """A filter that looks at what it gets."""

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        _check(*given, *named.values())
        return function(*given, **named)

    return call


def _to_json(value: Any, indent: int | None = None, **others: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


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
    environment = Sandbox()
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
    except BROKEN as error:
        raise BadInput(f"the seed's chat template cannot be rendered: {type(error).__name__}: {str(error)[:300]}") from error
    return "".join(pieces)


def _raise(message: object = "") -> None:
    raise Refuses(str(message))


class Deadline:
    """Python code of this thread ends after some seconds of its own processor time: a template can loop without a word of text."""

    def __init__(self, seconds: float):
        self.end = time.thread_time() + seconds

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._look)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)

    def _look(self, frame: Any, event: str, argument: Any) -> Any:
        if time.thread_time() > self.end:
            raise Refuses("it takes too long")
        if event == "call" and frame.f_code in JOINS and sum(map(_size, frame.f_locals.get("seq", ()))) > LONGEST:
            raise Refuses("it makes something too large")
        return self._look
