"""Near-duplicates: found, counted, and none left."""

import re
from zlib import crc32

import numpy as np
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import lines

from elmwood.corpus.build import build, documents
from elmwood.corpus.dedup import BANDS, HASHES, ROWS, SIMILAR, bands, near_duplicates, shared, sketch
from elmwood.corpus.read import Document


def edited(text: str, words: int) -> str:
    """The text with its last words replaced."""
    return " ".join([*text.split()[:-words], *(f"other{n}" for n in range(words))])


def test_near_duplicates_go_and_are_counted(tmp_path, store):
    rng = np.random.default_rng(0)
    base = [" ".join(f"w{n}" for n in rng.integers(0, 5000, 200)) for _ in range(20)]
    near = [edited(text, 5) for text in base[:10]]  # 191 of 201 shingles in common
    far = [edited(text, 60) for text in base[10:]]  # 136 of 256
    rows = [{"text": text} for text in [*base, *near, *far, base[0], base[0].upper()]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*rows))
    corpus = build([str(path)], store, holdout=0.5)
    assert corpus.rejected == {"exact duplicate": 1, "near-duplicate": 11}
    kept = {document.text for document in documents((*corpus.train, *corpus.holdout), store)}
    for pair in zip(base[1:10], near[1:], strict=True):
        assert kept & set(pair) == {min(pair, key=lambda text: Document(text).id)}
    assert kept >= set(base[10:]) | set(far)


def test_similarity_is_estimated_without_bias():
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(100):
        text = " ".join(f"w{n}" for n in rng.integers(0, 5000, 300))
        other = edited(text, int(rng.integers(5, 60)))
        one, two = set(shingles(text)), set(shingles(other))
        exact = len(one & two) / len(one | two)
        first, second = sketch([text, other])
        errors.append((first == second).mean() - exact)
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.05


UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+")


def shingles(text: str) -> list[int]:
    """Hashes of runs of five words, written a second time with Python's own regular expressions and integers."""
    words = [crc32(word.encode()) for word in WORD.findall(text.lower())] or [0]
    found = []
    for place in range(max(1, len(words) - 4)):
        mixed = 0
        for word in words[place : place + 5]:
            mixed = (mixed + word) * 0x9E3779B97F4A7C15 % 2**64
        found.append(mixed >> 32)
    return found


def by_datasketch(texts: list[str]) -> np.ndarray:
    hashed = (shingles(text) for text in texts)
    sketches = MinHash.generator(hashed, num_perm=HASHES, seed=1, hashfunc=int, scheme="affine32")
    return np.stack([one.hashvalues for one in sketches])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.text(st.sampled_from("ab c.,_İΣßǅไท面白\u0301\U0001f600\U00020000é"), max_size=80) | st.text(max_size=80), min_size=1, max_size=9
    )
)
def test_sketches_are_those_of_datasketch(texts):
    """Corpora that were built with the library keep their digests."""
    np.testing.assert_array_equal(sketch(texts), by_datasketch(texts))


def test_short_and_unspaced_texts_have_shingles():
    assert len(shingles("Hello, World!")) == 1
    np.testing.assert_array_equal(*sketch(["Hello, World!", "hello world"]))
    assert len(shingles("面白い本を読みました")) == 6  # ten letters, each a word
    assert len(shingles("one two three four five six")) == 2


def plain_near_duplicates(signature_NH: np.ndarray) -> list[bool]:
    """The rule written a second time: in order, one is dropped if it is near one that was kept and equals it in a band."""
    kept, drop = [], []
    for one in signature_NH:
        in_bands = [
            (one.reshape(BANDS, ROWS) == other.reshape(BANDS, ROWS)).all(1).any() and (one == other).mean() >= SIMILAR for other in kept
        ]
        drop.append(any(in_bands))
        if not drop[-1]:
            kept.append(one)
    return drop


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_kept_holds_no_near_pair(data):
    count = data.draw(st.integers(1, 30))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    signature_NH = rng.integers(0, 2**32, (count, HASHES), dtype=np.uint32)
    for n in range(1, count):  # grow chains of likeness
        share = rng.choice([0, 0.7, 0.85, 0.95])
        same = rng.random(HASHES) < share
        signature_NH[n, same] = signature_NH[rng.integers(0, n), same]
    drop_N = np.zeros(count, bool)
    number_E, group_E = zip(*(shared(hash_N) for hash_N in bands(signature_NH)), strict=True)
    offset_B = np.cumsum([0, *(len(one) for one in group_E[:-1])])
    drop_N = near_duplicates(
        signature_NH, np.concatenate(number_E), np.concatenate([one + more for one, more in zip(group_E, offset_B, strict=True)])
    )
    assert drop_N.tolist() == plain_near_duplicates(signature_NH)
    like_NN = (signature_NH[:, None] == signature_NH[None]).mean(2)
    assert not drop_N[0]
    for n in np.flatnonzero(drop_N):
        assert like_NN[n, :n][~drop_N[:n]].max() >= SIMILAR
    kept = np.flatnonzero(~drop_N)
    pairs = [(a, b) for a in kept for b in kept if a < b and like_NN[a, b] >= 0.9]
    assert not pairs  # below 0.9 a pair may escape every band, seldom
