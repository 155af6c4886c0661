"""Is a text source code, and in which programming language? Judged by the ends of its lines and by keywords."""

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CODE = 0.3  # share of lines that look like code, in a document of code
LEAST = 3  # different keywords of a language that a document of it has, at least
_LINE = re.compile(r"^\s*(?://|/\*)|(?:[{};]|\):)\s*(?:#.*|//.*)?$")
_WORD = re.compile(r"[A-Za-z_]\w*|#\w+|:=|=>|===|->|::")
KEYWORDS: dict[str, frozenset[str]] = {
    "Rust": _words("fn impl mut pub usize unsafe trait match crate :: self let where"),
    "Go": _words("func nil package chan defer := uint interface struct type range var"),
    "JavaScript": _words("const let var function => === export null undefined async await typeof this new class extends super constructor"),
    "Python": _words("def self elif None import lambda raise except yield True False"),
    "Java": _words("public private protected extends implements throws final void boolean class String"),
    "C": _words("#include #define #ifdef #endif void static sizeof typedef unsigned struct -> char"),
    "C++": _words("#include std template namespace virtual const_cast static_cast nullptr :: typename cout class"),
    "SQL": _words("SELECT FROM WHERE INSERT UPDATE CREATE TABLE JOIN VALUES"),
    "shell": _words("echo fi esac done then elif export function local"),
}
# words that say nothing of what a piece of code is about
PLUMBING = frozenset(word.lower() for words in KEYWORDS.values() for word in words if word.isalpha()) | _words(
    "bool int float double byte return true false string len err args argv param impl enum static inline null value"
)


def is_code(text: str) -> bool:
    """Whether the text reads as source code."""
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and sum(bool(_LINE.search(line)) for line in lines) >= CODE * len(lines)


def language(text: str) -> str:
    """The programming language with the most different keywords in the text; empty where that is fewer than LEAST."""
    found = set(_WORD.findall(text))
    count = {name: len(words & found) for name, words in KEYWORDS.items()}
    best = max(count, key=lambda name: count[name])
    return best if count[best] >= LEAST else ""
