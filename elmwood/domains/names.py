"""Names for domains: the terms that tell one from the others.

Shapes: N documents, K domains, V terms.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.words import Lexicon

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

TERMS = 10  # for each domain
LEAST = 3  # documents a term must stand in, so that a name tells nothing of a single document


def count_documents(texts: Iterable[str], label_N: Ints, k: int) -> tuple[list[str], Floats]:
    """Words, and the number of documents of each domain with the word [K, V]."""
    row: dict[str, int] = {}
    lexicon = Lexicon(lambda word: row.setdefault(word, len(row)))
    keys = [np.zeros((0, 2), np.int64)]
    for text, label in zip(texts, label_N, strict=True):
        found = np.unique(lexicon.rows(text))
        keys.append(np.stack([np.full(len(found), label), found], 1)[found >= 0])
    label_P, row_P = np.concatenate(keys).T
    count_KV = np.bincount(label_P * max(len(row), 1) + row_P, minlength=k * len(row)).reshape(k, -1)
    return list(row), count_KV.astype(np.float64)


def top_terms(words: Sequence[str], count_KV: Floats, documents_K: Ints) -> list[tuple[str, ...]]:
    """The TERMS most telling words of each domain, best first.

    A word tells by the share of documents with it in the domain, times the log of how many times that of the others it
    is: its part of the divergence between the two. So it must be frequent and distinctive. Shares start at the whole
    corpus's (a prior of one document). Of words that begin another, such as singular and plural, the best is kept.
    """
    count_V = count_KV.sum(0)
    total = documents_K.sum()
    prior_V = count_V / max(total, 1)
    inside_KV = (count_KV + prior_V) / (documents_K[:, None] + 1)
    outside_KV = (count_V - count_KV + prior_V) / (total - documents_K[:, None] + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        telling_KV = np.where(count_V >= min(LEAST, total), inside_KV * np.log(inside_KV / outside_KV), -np.inf)
    terms = []
    for telling_V in telling_KV:
        best: list[str] = []
        for v in np.lexsort((np.arange(len(words)), -telling_V))[: 8 * TERMS]:
            if telling_V[v] > 0 and not any(_same(words[v], term) for term in best) and len(best) < TERMS:
                best.append(words[v])
        terms.append(tuple(best))
    return terms


def names(terms: Sequence[Sequence[str]], taken: Iterable[str] = ()) -> list[str]:
    """A name for each domain: its three top terms, and a number where that name is taken."""
    used = set(taken)
    made = []
    for place, found in enumerate(terms):
        name = first = "-".join(found[:3]) or f"domain-{place}"
        number = 2
        while name in used:
            name, number = f"{first}-{number}", number + 1
        used.add(name)
        made.append(name)
    return made


def _same(a: str, b: str) -> bool:
    shorter, longer = sorted((a, b), key=len)
    return len(shorter) >= 4 and longer.startswith(shorter)
