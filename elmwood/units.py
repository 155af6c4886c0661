"""Counts, durations and names of others as people write and read them."""

import re

from elmwood.errors import BadInput

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def parse_count(text: str | int) -> int:
    """'1.5M' -> 1_500_000; '24GB' -> 24_000_000_000; a number stays as it is. Raises BadInput."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmgbt]?)(?:i?b)?\s*", str(text).lower())
    if not match:
        raise BadInput(f"{text!r} is not a number: write 250000, 250k, 1.5M or 24GB")
    return int(float(match[1].replace("_", "")) * _SCALES[match[2]])


def short(number: float) -> str:
    """1_234_567 -> '1.23M': three digits at most."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds -> '45 s', '3.4 min' or '2.1 h'."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


# controls but tab and newline; and what turns the direction of text, breaks lines or has no width (but joiners, which scripts need);
# the last range spells text that nobody sees
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Without what could move a cursor, turn the text, change what a terminal shows, or is no XML: each such letter becomes U+FFFD."""
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)
