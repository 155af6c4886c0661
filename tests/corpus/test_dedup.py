"""Near-duplicates: found, counted, and none left."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import lines

from elmwood.corpus.build import build, documents
from elmwood.corpus.dedup import HASHES, SIMILAR, near_duplicates, shingles, signatures
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
        one, two = shingles(text), shingles(other)
        exact = len(np.intersect1d(one, two)) / len(np.union1d(one, two))
        first, second = signatures([text, other])
        errors.append((first == second).mean() - exact)
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.05


def test_short_and_unspaced_texts_have_shingles():
    assert len(shingles("Hello, World!")) == 1
    assert shingles("Hello, World!") == shingles("hello world")
    assert len(shingles("面白い本を読みました")) == 6  # ten letters, each a word
    assert len(shingles("one two three four five six")) == 2


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
    drop_N = near_duplicates(signature_NH)
    like_NN = (signature_NH[:, None] == signature_NH[None]).mean(2)
    assert not drop_N[0]
    for n in np.flatnonzero(drop_N):
        assert like_NN[n, :n][~drop_N[:n]].max() >= SIMILAR
    kept = np.flatnonzero(~drop_N)
    pairs = [(a, b) for a in kept for b in kept if a < b and like_NN[a, b] >= 0.9]
    assert not pairs  # below 0.9 a pair may escape every band, seldom
