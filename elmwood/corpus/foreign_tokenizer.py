"""A tokenizer.json of others, checked before it is opened: text does not grow without bound in it, and its patterns end.

The library runs the normalisers and patterns in the file, in this process, on every document. They are looked at instead of tried: a trial
shows only what its text sets off. What is computed from the file bounds every text. Free of torch.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from elmwood.errors import BadSeed, shorten
from elmwood.records.plain_json import parse_json

LARGEST = 128 << 20  # bytes; the largest vocabularies in use take 35 MB
GROWTH, ADDED = 128, 4096  # characters for each one of the text (one ligature has 18 by NFKD), and beside
MOST_IDS, MOST_ADDED = 1 << 24, 1 << 16  # token ids, and added tokens
STEPS = 64  # of one kind; special tokens added to a text
PATTERN = 4096  # characters
MANY = 16  # repeats up to this are few
CHOICES = 12  # in one branch: 4,096 ways
KNOWN = frozenset({r"(?:\r?\n)+(?!\r?\n)"})  # a pattern in use whose inner choice decides itself by its first letter
REPEATS = 2  # without bound in one branch: a search then takes at most cubic time in the longest run of letters, spaces or digits


def check_tokenizer_file(path: Path) -> None:
    """Raises BadSeed."""
    try:
        spec = parse_json(path.read_bytes(), LARGEST)
        if not isinstance(spec, dict):
            raise ValueError("it is no JSON object")
        for part, inner in (("normalizer", "normalizers"), ("decoder", "decoders")):
            factor, added = _growth(list(_steps(spec.get(part), inner)))
            if factor > GROWTH or added > ADDED:
                raise ValueError(f"its {part} makes text up to {min(factor, 1e30):.3g} times longer, and {GROWTH} times is allowed")
        for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
            _check_pattern(step.get("pattern"))
            if step.get("type") == "FixedLength" and step.get("length") == 0:
                raise ValueError("its pre_tokenizer cuts text into pieces of no letters")
        _check_model(spec.get("model"), spec.get("added_tokens"))
        for step in _steps(spec.get("post_processor"), "processors"):
            if any(len(step.get(kind) or ()) > STEPS for kind in ("single", "pair", "special_tokens")):
                raise ValueError(f"its post_processor adds more than {STEPS} tokens to a text")
    except (OSError, ValueError) as error:
        raise BadSeed(f"{path} is not used ({error}): take the tokenizer.json of the original model") from error


@contextmanager
def tokenizer_errors(what: object) -> Iterator[None]:
    """Any error of the tokenizers library, and its panics, which are no Exceptions, as a BadSeed that begins with `what`."""
    try:
        yield
    except BaseException as error:  # the library raises nothing narrower than Exception
        if isinstance(error, BadSeed) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise BadSeed(f"{what} ({shorten(str(error), 300)}): save it again with transformers' save_pretrained") from error


def _check_model(model: Any, added: Any) -> None:
    """What the library would take the process down for, or draw at random. Raises ValueError."""
    if not isinstance(model, dict):
        return
    if model.get("dropout"):
        raise ValueError(f"its dropout of {str(model['dropout'])[:20]} cuts text by chance: set it to null")
    vocabulary, prefix = model.get("vocab"), model.get("continuing_subword_prefix")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [one.get("id") for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    if largest := next((one for one in ids if isinstance(one, int | float) and one >= MOST_IDS), 0):
        raise ValueError(f"a token of it has the id {largest}, and ids below {MOST_IDS} are read")
    if isinstance(added, list) and len(added) > MOST_ADDED:
        raise ValueError(f"it has {len(added)} added tokens, and {MOST_ADDED} are read at most")
    merges = model.get("merges")
    if prefix and model.get("type", "BPE") == "BPE" and isinstance(merges, list):
        parts = (merge.partition(" ")[2] if isinstance(merge, str) else merge[1:] and merge[1] for merge in merges if merge)
        if any(not isinstance(part, str) or not part.startswith(str(prefix)) for part in parts):
            raise ValueError(f"its merges do not begin with its continuing_subword_prefix {str(prefix)[:80]!r}")


def _steps(part: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a part, those of sequences in it one after another. Raises ValueError."""
    waiting, count = [part] if part is not None else [], 0
    while waiting:
        step = waiting.pop(0)
        if not isinstance(step, dict) or (count := count + 1) > STEPS:
            raise ValueError(f"it has more than {STEPS} {inner}" if isinstance(step, dict) else f"one of its {inner} is no JSON object")
        if isinstance(step.get(inner), list):
            waiting = [*step[inner], *waiting]
        else:
            yield step


def _growth(steps: list[Mapping[str, Any]]) -> tuple[float, float]:
    """A text of N characters has at most factor * N + added after these steps. Raises ValueError."""
    factor, added = 1.0, 0.0
    for step in steps:
        found = step.get("content")
        content = found if isinstance(found, str) else ""
        if step.get("type") == "Replace":
            literal = _check_pattern(step.get("pattern"))
            times = max(1.0, len(content) / len(literal)) if literal else 1.0 + len(content)
            factor, added = factor * times, added * times + len(content)
        elif step.get("type") == "Precompiled":
            times = _longest(step.get("precompiled_charsmap"))
            factor, added = factor * times, added * times
        elif step.get("type") == "Prepend" and not step.get("prepend"):
            raise ValueError("it puts nothing before the text, which the library fails on")
        else:
            added += sum(len(value) for value in step.values() if isinstance(value, str))  # Prepend, prefixes, suffixes
    return factor, added


def _longest(charsmap: Any) -> int:
    """The most characters that sentencepiece's map puts for one. Raises ValueError."""
    try:
        raw = base64.b64decode(charsmap or "", validate=True)
        size = int.from_bytes(raw[:4], "little")
        if len(raw) < 4 + size or size % 4:
            raise ValueError("its precompiled_charsmap is damaged")
        texts = raw[4 + size :].split(b"\0")
        return max(1, *(len(text.decode(errors="replace")) for text in texts))
    except (TypeError, binascii.Error) as error:
        raise ValueError("its precompiled_charsmap is no base64") from error


# ---- patterns ----------------------------------------------------------------------------------------------------


class Inside(NamedTuple):
    """What a part of a pattern holds."""

    repeats: int = 0  # without bound, in the branch that has most
    choices: int = 0  # places where it can go on in several ways, likewise


_QUANTIFIER = re.compile(r"([*+?]|\{(\d*)(,?)(\d*)\})[?+]?")
_GROUP = re.compile(r"\?(:|=|!|<=|<!|>|[ims]*(-[ims]+)?:|[ims]+(-[ims]+)?(?=\)))")


def _check_pattern(pattern: Any) -> str:
    """The text that a literal pattern stands for; "" for a regular expression, which is looked at. Raises ValueError."""
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        return str(pattern["String"])
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        text = pattern["Regex"]
        if len(text) > PATTERN:
            raise ValueError(f"a pattern of it has {len(text)} characters, and {PATTERN} are read at most")
        if text in KNOWN:
            return ""
        inside, place = _branches(text, 0, 0)
        if place < len(text):
            raise ValueError(f"its pattern {text[:80]!r} closes a group that was not opened")
        if inside.repeats > REPEATS or inside.choices > CHOICES + inside.repeats:
            raise ValueError(f"its pattern {text[:80]!r} can match a text in too many ways, so that it may never end")
        return ""
    if pattern is None:
        return ""
    raise ValueError(f"its pattern {str(pattern)[:80]!r} is neither a String nor a Regex")


def _branches(text: str, place: int, depth: int) -> tuple[Inside, int]:
    """Alternatives, up to the end of their group. Raises ValueError."""
    if depth > 20:
        raise ValueError(f"its pattern {text[:80]!r} is nested too deeply")
    found, repeats, choices = [], 0, 0
    while place < len(text) and text[place] != ")":
        if text[place] == "|":
            found.append(Inside(repeats, choices))
            repeats, choices, place = 0, 0, place + 1
            continue
        atom, place = _atom(text, place, depth)
        least = most = 1
        if quantifier := _QUANTIFIER.match(text, place):
            (least, most), place = _times(quantifier), quantifier.end()
        if _QUANTIFIER.match(text, place) or (most > MANY and (atom.repeats or atom.choices)):
            raise ValueError(f"its pattern {text[:80]!r} repeats what repeats, so that it may never end")
        times = 1 if most > MANY else most
        repeats += atom.repeats * times + (most > MANY)
        choices += atom.choices * times + (least != most)
    found.append(Inside(repeats, choices))
    alternatives = depth > 0 and len(found) > 1
    return Inside(max(one.repeats for one in found), max(one.choices for one in found) + alternatives), place


def _times(found: re.Match[str]) -> tuple[int, int]:
    """How often at least and at most."""
    if found[1] in "*+?":
        return (found[1] == "+") + 0, 1 if found[1] == "?" else MANY + 1
    least = min(int(found[2] or 0), MANY + 1)
    return least, least if not found[3] else min(int(found[4]), MANY + 1) if found[4] else MANY + 1


def _atom(text: str, place: int, depth: int) -> tuple[Inside, int]:
    """One letter, class or group. Raises ValueError for what a search cannot be bounded with."""
    letter = text[place]
    if letter == "[":
        return Inside(), _class_end(text, place)
    if letter == "\\":
        following = text[place + 1 : place + 2]
        if following.isdigit() or following in ("k", "g", ""):
            raise ValueError(f"its pattern {text[:80]!r} refers back to a group")
        return Inside(), place + 2 if following not in "pPx" else _escape_end(text, place + 2)
    if letter == "(":
        begin = place + 1
        if text[begin : begin + 1] in ("?", "*"):
            if not (found := _GROUP.match(text, begin)):
                raise ValueError(f"its pattern {text[:80]!r} has a kind of group that is not read here")
            begin = found.end()
        inside, end = _branches(text, begin, depth + 1)
        if end >= len(text):
            raise ValueError(f"its pattern {text[:80]!r} leaves a group open")
        return inside, end + 1
    return Inside(), place + 1


def _escape_end(text: str, place: int) -> int:
    return text.find("}", place) + 1 if text[place : place + 1] == "{" and "}" in text[place:] else place + 1


def _class_end(text: str, place: int) -> int:
    """The end of a class of letters, which may hold others. Raises ValueError."""
    open_, place = 0, place
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        if text[place] == "[":
            open_ += 1
            place += 2 if text[place + 1 : place + 2] == "^" else 1
            place += text[place : place + 1] == "]"  # a letter, where it stands first
            continue
        open_ -= text[place] == "]"
        place += 1
        if not open_:
            return place
    raise ValueError(f"its pattern {text[:80]!r} leaves a class of letters open")
