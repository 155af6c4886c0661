"""Filters of quality and language: rows of a table that one may name. Each is a function of a text that says why it is left out, or "".

The heuristics are of English web text; they leave out much code and many tables.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from elmwood.errors import BadInput
from elmwood.registry import require

Filter = Callable[[str], str]

_STOP = {"the", "be", "to", "of", "and", "that", "have", "with"}
_BULLETS = ("-", "*", "•", "‣", "●")
_ENDS = (".", "!", "?", '"', "”", "…")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def gopher(text: str) -> str:
    """Rae et al. 2021 (arXiv:2112.11446, appendix A.1): length, symbols, bullets, letters, English stop words, and repetition."""
    words = text.split()
    count = len(words)
    if not 50 <= count <= 100_000:
        return "not 50 to 100,000 words"
    if not 3 <= sum(map(len, words)) / count <= 10:
        return "mean length of words not 3 to 10"
    if (text.count("#") + text.count("...") + text.count("…")) / count > 0.1:
        return "a symbol in ten words"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
        return "nine lines in ten begin with a bullet"
    if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "three lines in ten end with an ellipsis"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * count:
        return "a fifth of the words without a letter"
    if len(_STOP & {word.lower().strip(".,;:!?\"'()") for word in words}) < 2:
        return "fewer than two stop words"
    return _repeats(text, words, lines)


def _repeats(text: str, words: list[str], lines: list[str]) -> str:
    """The repetition filters of table A1: shares of characters in repeated lines and in frequent or repeated runs of words."""
    for parts, most, what in ((lines, (0.3, 0.2), "lines"), ([one for one in text.split("\n\n") if one.strip()], (0.3, 0.2), "paragraphs")):
        seen = Counter(parts)
        again = sum(times - 1 for times in seen.values())
        if again > most[0] * len(parts):
            return f"repeated {what}"
        if sum((times - 1) * len(one) for one, times in seen.items()) > most[1] * len(text):
            return f"much text in repeated {what}"
    size = max(1, sum(map(len, words)))
    for n, most_of in ((2, 0.20), (3, 0.18), (4, 0.16)):
        runs = Counter(zip(*(words[place:] for place in range(n)), strict=False))
        (run, times), *_ = runs.most_common(1)
        if times > 1 and times * sum(map(len, run)) > most_of * size:
            return f"one run of {n} words is frequent"
    for n, most_of in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
        known: set[int] = set()
        covered, last = 0, 0
        for place in range(len(words) - n + 1):
            key = hash(tuple(words[place : place + n]))
            if key in known:
                covered += sum(map(len, words[max(place, last) : place + n]))
                last = place + n
            known.add(key)
        if covered > most_of * size:
            return f"much text in repeated runs of {n} words"
    return ""


def c4(text: str) -> str:
    """Raffel et al. 2020 (arXiv:1910.10683, section 2.2), for whole documents: five sentences, no place holders, no code, no policies."""
    low = text.lower()
    if "lorem ipsum" in low:
        return "lorem ipsum"
    if "{" in text:
        return "a curly bracket"
    if "javascript" in low:
        return "mentions JavaScript"
    if any(phrase in low for phrase in _POLICY):
        return "a policy"
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line.endswith(_ENDS) and not line.endswith("...") and len(line.split()) >= 3]
    if sum(len(re.findall(r"[.!?]+(?=\s|$|[\"”])", line)) for line in kept) < 5:
        return "fewer than five sentences"
    return ""


def fineweb(text: str) -> str:
    """Penedo et al. 2024 (arXiv:2406.17557, section 3.6): ends of lines, short lines, repeated lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    if sum(line.rstrip().endswith(_ENDS) for line in lines) < 0.12 * len(lines):
        return "few lines end a sentence"
    if sum(len(line) <= 30 for line in lines) > 0.67 * len(lines):
        return "most lines are short"
    if sum((times - 1) * len(line) for line, times in Counter(lines).items()) > 0.1 * sum(map(len, lines)):
        return "repeated lines"
    if text.count("\n") > 0.3 * len(text.split()):
        return "more than three lines for ten words"
    return ""


FILTERS: dict[str, Filter] = {"gopher": gopher, "c4": c4, "fineweb": fineweb}
LANGUAGE = "language="  # and the codes of ISO 639-1, with + between


def parse_filters(typed: str) -> tuple[str, ...]:
    """'gopher,language=en+de' -> the names, checked. Raises BadInput, MissingExtra."""
    names = tuple(name.strip() for name in typed.split(",") if name.strip())
    for name in names:
        if name.startswith(LANGUAGE):
            known = set(_identifier().nb_classes)
            if not (codes := set(name.removeprefix(LANGUAGE).split("+"))) <= known:
                raise BadInput(f"no language {'+'.join(sorted(codes - known))!r}: name codes of ISO 639-1, such as language=en+de")
        elif name not in FILTERS:
            raise BadInput(f"no filter {name!r}: have {', '.join(FILTERS)}, {LANGUAGE}CODE")
    return names


def unfit(name: str, text: str) -> str:
    """Why a filter leaves a text out; empty if it does not."""
    if name.startswith(LANGUAGE):
        code = _identifier().classify(text[:1000])[0]
        return "" if code in name.removeprefix(LANGUAGE).split("+") else "another language"
    return FILTERS[name](text)


@cache
def _identifier() -> Any:
    """py3langid (Lui and Baldwin 2012): its model is part of the package. Raises MissingExtra."""
    langid = require("py3langid.langid", "language")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
