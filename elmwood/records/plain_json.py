"""JSON from strangers, read strictly: whatever reads a record, a header or an adapter's settings sees the same values."""

import json
import math
from functools import partial
from typing import Any


def parse_json(raw: bytes, most: int = 1 << 20, infinity: bool = False, integers: int = 0) -> Any:
    """The value of at most `most` bytes of UTF-8 JSON. Raises ValueError, also for what Python's reader takes beyond the standard: a key
    that stands twice in an object, NaN and Infinity, a number too large for a float, half of a surrogate pair, nesting without end.
    `infinity`: Infinity is a number, as transformers writes it in some configs. `integers`: whole numbers are smaller; 0: of any size.
    """
    if len(raw) > most:
        raise ValueError(f"it has {len(raw)} bytes, and {most} are read at most")
    try:
        constant = _infinity if infinity else _refuse
        whole = partial(_whole, integers) if integers else int
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=constant, parse_float=_finite, parse_int=whole)
        if b"\\ud" in raw.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} stands there twice")
        found[name] = value
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _infinity(constant: str) -> Any:
    return _refuse(constant) if constant == "NaN" else float(constant)


def _whole(most: int, digits: str) -> int:
    if abs(value := int(digits)) >= most:
        raise ValueError(f"{digits[:80]} is too large")
    return value


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:80]} is too large for a float")
    return value
