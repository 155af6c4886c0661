"""Find near-duplicates by MinHash and banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3).

Two texts are near-duplicates when the Jaccard similarity of their 5-word shingles, estimated from 120 hashes (standard
error 0.037), is 0.8 or more. A pair of similarity 0.8 shares a band with probability 0.998, one of 0.9 practically always.

N documents, H hashes, B bands
"""

import re
from collections.abc import Iterable, Iterator
from zlib import crc32

import numpy as np

SIMILAR = 0.8
SHINGLE = 5  # words
BANDS, ROWS = 20, 6
HASHES = BANDS * ROWS

_ODD = np.uint64(0x9E3779B97F4A7C15)
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # scripts without spaces:
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")  # each of their letters counts as a word


def shingles(text: str) -> np.ndarray:
    """Hashes of all runs of five words, without repeats: uint32. A text of fewer words is one run."""
    words = "\0".join(_WORD.findall(text.lower())).encode().split(b"\0")
    word = np.fromiter(map(crc32, words), np.uint64, len(words))
    runs = max(1, len(words) - SHINGLE + 1)
    mixed = np.zeros(runs, np.uint64)
    for place in range(min(SHINGLE, len(words))):
        mixed = (mixed + word[place : place + runs]) * _ODD  # modulo 2**64, on purpose
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def signatures(texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The MinHash of each text: uint32 [H]. The share of places where two agree estimates the similarity of the texts."""
    from datasketch import MinHash  # takes half a second, needed only here

    hashed = (shingles(text).tolist() for text in texts)
    for sketch in MinHash.generator(hashed, num_perm=HASHES, seed=1, hashfunc=int, scheme="affine32"):
        yield sketch.hashvalues


def near_duplicates(signature_NH: np.ndarray) -> np.ndarray:
    """Which documents to drop: bool [N]. In the order given, a document is dropped if it is near one that was kept.

    So the kept documents hold no pair of near-duplicates, and no document is dropped because of one that was itself dropped.
    """
    drop_N = np.zeros(len(signature_NH), bool)
    group_BN = np.stack([_groups(signature_NH[:, band * ROWS : (band + 1) * ROWS]) for band in range(BANDS)])
    kept: dict[tuple[int, int], list[int]] = {}  # (band, group) -> documents
    for n in np.flatnonzero((group_BN >= 0).any(0)).tolist():
        keys = [(band, group) for band, group in enumerate(group_BN[:, n].tolist()) if group >= 0]
        others = sorted({other for key in keys for other in kept.get(key, ())})
        if others and (signature_NH[others] == signature_NH[n]).mean(1).max() >= SIMILAR:
            drop_N[n] = True
        else:
            for key in keys:
                kept.setdefault(key, []).append(n)
    return drop_N


def _groups(rows_NR: np.ndarray) -> np.ndarray:
    """A group number for each document, equal where rows are equal, -1 where a row is unique: int32 [N]."""
    mixed_N = np.zeros(len(rows_NR), np.uint64)
    for row in rows_NR.T:
        mixed_N = (mixed_N + row) * _ODD
    _, group_N, size_G = np.unique(mixed_N, return_inverse=True, return_counts=True)
    return np.where(size_G[group_N] > 1, group_N, -1).astype(np.int32)
