"""Find near-duplicates by MinHash and banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3).

Two texts are near-duplicates when the Jaccard similarity of their 5-word shingles, estimated from 120 hashes (standard
error 0.037), is 0.8 or more. A pair of similarity 0.8 shares a band with probability 0.998, one of 0.9 practically always.

N documents, H hashes, B bands; C candidates: documents that share a band with another, E their memberships in groups that share a band
"""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from elmwood.compiled import compiled

SIMILAR = 0.8
SHINGLE = 5  # words
BANDS, ROWS = 20, 6
HASHES = BANDS * ROWS
BATCH = 4_000_000  # bytes of text sketched at once

_ODD = np.uint64(0x9E3779B97F4A7C15)
# scripts without spaces, first and last letter; each of their letters counts as a word
UNSPACED = ((0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


def sketch(texts: Sequence[str]) -> np.ndarray:
    """The MinHash of each text: uint32 [N, H]. The share of places where two agree estimates the similarity of the texts.

    A word is lowered and hashed by CRC-32, a shingle by a sum of products modulo 2^64, and the H permutations are those of datasketch's
    `affine32` scheme with seed 1. Memory is a few times that of BATCH bytes of text, or of the longest text.
    """
    lowered = [text.lower().encode() for text in texts]
    sketch_NH = np.full((len(texts), HASHES), 2**32 - 1, np.uint32)
    first = 0
    while first < len(texts):
        last, size = first + 1, len(lowered[first])
        while last < len(texts) and size + len(lowered[last]) <= BATCH:
            size += len(lowered[last])
            last += 1
        end_N = np.cumsum([len(text) for text in lowered[first:last]])
        data = np.frombuffer(b"".join(lowered[first:last]), np.uint8)
        word_W, words_N = np.zeros(len(data) // 2 + len(end_N), np.uint32), np.zeros(len(end_N), np.int64)
        _hash_words(data, end_N, _letters(), _crc_table(), word_W, words_N)
        _sketch(word_W, words_N, *_permutations(), sketch_NH[first:last])
        first = last
    return sketch_NH


def compile_loops() -> None:
    """Compile what sketches and compares, or load it: most of a second, which is else spent by the first call of each process."""
    near_duplicates(sketch(["a", "b"]), np.arange(2), np.zeros(2, np.int64))


def bands(sketch_NH: np.ndarray) -> np.ndarray:
    """A hash of each band of each sketch: uint64 [B, N]. Documents are compared if they share one of these."""
    mixed_BN = np.zeros((BANDS, len(sketch_NH)), np.uint64)
    for band, mixed_N in enumerate(mixed_BN):
        for row in range(ROWS):
            mixed_N += sketch_NH[:, band * ROWS + row]
            mixed_N *= _ODD
    return mixed_BN


def shared(hash_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a hash occurs more than once: the places [E], and a number for each group of equal ones [E]."""
    order = np.argsort(hash_N)
    same = hash_N[order][1:] == hash_N[order][:-1]
    member = np.zeros(len(order), bool)
    member[1:] |= same
    member[:-1] |= same
    starts = member.copy()
    starts[1:] &= ~same
    return order[member], np.cumsum(starts)[member] - 1


def near_duplicates(sketch_CH: np.ndarray, candidate_E: np.ndarray, group_E: np.ndarray) -> np.ndarray:
    """Which candidates to drop: bool [C]. In the order given, one is dropped if it is near one that was kept and shares a group with it.

    So the kept documents hold no pair of near-duplicates, and no document is dropped because of one that was itself dropped.
    """
    drop_C = np.zeros(len(sketch_CH), bool)
    if len(candidate_E):
        by_candidate = np.argsort(candidate_E, kind="stable")
        start_C = np.searchsorted(candidate_E[by_candidate], np.arange(len(sketch_CH) + 1))
        last_G = np.full(int(group_E.max()) + 1, -1, np.int64)
        _drop(sketch_CH, start_C, group_E[by_candidate].astype(np.int64), last_G, int(np.ceil(SIMILAR * HASHES)), drop_C)
    return drop_C


@compiled
def _drop(sketch_CH, start_C, group_E, last_G, enough, drop_C):
    """last_G: the last kept membership of each group; the others follow by before_E."""
    before_E = np.full(group_E.size, -1, np.int64)
    owner_E = np.zeros(group_E.size, np.int64)
    compared_C = np.full(drop_C.size, -1, np.int64)
    for c in range(drop_C.size):
        for e in range(start_C[c], start_C[c + 1]):
            kept = last_G[group_E[e]]
            while kept >= 0 and not drop_C[c]:
                other = owner_E[kept]
                if compared_C[other] != c:
                    compared_C[other] = c
                    equal = 0
                    for h in range(sketch_CH.shape[1]):
                        equal += sketch_CH[c, h] == sketch_CH[other, h]
                    drop_C[c] = equal >= enough
                kept = before_E[kept]
        if not drop_C[c]:
            for e in range(start_C[c], start_C[c + 1]):
                owner_E[e], before_E[e] = c, last_G[group_E[e]]
                last_G[group_E[e]] = e


@compiled
def _hash_words(data, end_N, kind_U, crc_B, word_W, words_N):
    """CRC-32 of each word of UTF-8 texts. kind_U: of each character: 0 no letter, 1 a letter, 2 a letter that is a word of its own."""
    place, w = 0, 0
    for n in range(end_N.size):
        first, inside, crc = w, False, np.uint32(0xFFFFFFFF)
        while place < end_N[n]:
            letter, width = np.uint32(data[place]), 1
            if letter >= 0xC0:
                width = 4 if letter >= 0xF0 else 3 if letter >= 0xE0 else 2
                letter &= np.uint32(0x7F >> width)
                for byte in range(place + 1, place + width):
                    letter = np.uint32(letter << np.uint32(6)) | np.uint32(data[byte] & np.uint8(63))
            kind = kind_U[letter]
            if inside and kind != 1:
                word_W[w] = crc ^ np.uint32(0xFFFFFFFF)
                w, inside, crc = w + 1, False, np.uint32(0xFFFFFFFF)
            if kind:
                for byte in range(place, place + width):
                    crc = np.uint32(crc_B[(crc ^ np.uint32(data[byte])) & np.uint32(255)] ^ (crc >> np.uint32(8)))
                inside = kind == 1
                if not inside:
                    word_W[w] = crc ^ np.uint32(0xFFFFFFFF)
                    w, crc = w + 1, np.uint32(0xFFFFFFFF)
            place += width
        if inside:
            word_W[w] = crc ^ np.uint32(0xFFFFFFFF)
            w += 1
        words_N[n] = w - first


@compiled
def _sketch(word_W, words_N, factor_H, shift_H, sketch_NH):
    """MinHash over all runs of five words; over the one run of all words in a text of fewer."""
    start = 0
    for n in range(words_N.size):
        length = min(words_N[n], 5)
        for first in range(start, start + max(words_N[n] - 4, 1)):
            mixed = np.uint64(0)
            for w in range(first, first + length):
                mixed = (mixed + np.uint64(word_W[w])) * np.uint64(0x9E3779B97F4A7C15)
            x = np.uint32(mixed >> np.uint64(32))  # and the finaliser of MurmurHash3
            x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B))
            x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35))
            x = np.uint32(x ^ (x >> np.uint32(16)))
            for h in range(factor_H.size):
                sketch_NH[n, h] = min(sketch_NH[n, h], np.uint32(factor_H[h] * x + shift_H[h]))
        start += words_N[n]


@cache
def _letters() -> np.ndarray:
    """What each character is, as in `_hash_words`: uint8 [U]. A letter is what Python's `\\w` matches."""
    kind_U = np.zeros(0x110000, np.uint8)
    every = np.arange(len(kind_U), dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    for run in re.finditer(r"\w+", every):
        kind_U[run.start() : run.end()] = 1
    for first, last in UNSPACED:
        kind_U[first : last + 1] = 2
    return kind_U


@cache
def _crc_table() -> np.ndarray:
    """The table of CRC-32, by byte: uint32 [256]."""
    table_B = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table_B = np.where(table_B & 1, np.uint32(0xEDB88320) ^ (table_B >> np.uint32(1)), table_B >> np.uint32(1))
    return table_B


@cache
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Factor (odd) and shift of each hash: uint32 [H]."""
    draw = np.random.RandomState(1)  # as datasketch does: its sketches are in the corpora of before
    factor_H = draw.randint(0, 1 << 31, HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factor_H, draw.randint(0, 1 << 32, HASHES, dtype=np.uint32)
