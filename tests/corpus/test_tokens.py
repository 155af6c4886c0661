"""Tokenizers, packed tokens, and windows that score each token once."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import TEXTS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from elmwood.corpus.build import build, documents
from elmwood.corpus.tokens import END, Packed, load_tokenizer, pack, token_bytes, train_tokenizer, windows
from elmwood.errors import BadInput, BadSeed
from elmwood.records import Packing
from elmwood.store.verify import verify


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_training_a_tokenizer(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(END) == 0
    assert train_tokenizer(TEXTS, 300).to_str() == tokenizer.to_str()
    with pytest.raises(BadInput, match="257"):
        train_tokenizer(TEXTS, 256)


def test_loading_a_tokenizer(tokenizer, tmp_path):
    with pytest.raises(BadSeed, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadSeed, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(3)
    other.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()


@settings(deadline=None)
@given(st.text())
def test_byte_level_tokens_spell_the_text(tokenizer, text):
    spelled = token_bytes(tokenizer)
    assert b"".join(spelled[token] for token in tokenizer.encode(text, add_special_tokens=False).ids) == text.replace(END, "").encode()


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Gemma have it: ▁ for a space, <0xAB> for what the vocabulary lacks."""
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "r", "e", "tr", "ee", "tree", "▁tree"]
    merges = [("t", "r"), ("e", "e"), ("tr", "ee"), ("▁", "tree")]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["née"])
    return tokenizer


def test_sentencepiece_tokens_spell_the_text():
    tokenizer = sentencepiece()
    spelled = token_bytes(tokenizer)
    text = "tree née 木 tree\n"
    assert b"".join(spelled[token] for token in tokenizer.encode(text).ids) == text.encode()
    assert spelled[tokenizer.token_to_id("<s>")] == b""


def test_other_tokenizers_are_refused():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "tree": 1, "##s": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(BadSeed, match="byte-level"):
        token_bytes(tokenizer)


def test_packing(source, store, tokenizer):
    corpus = build([source], store)
    packed = pack(corpus.train, tokenizer, 0, store)
    expected = [[0, *tokenizer.encode(document.text).ids] for document in documents(corpus.train, store)]
    assert packed.tokens.dtype == np.uint16
    assert packed.tokens.tolist() == [token for document in expected for token in document]
    assert packed.starts.tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()
    assert not packed.tokens.flags.writeable
    record = next(record for digest in store.records() if isinstance(record := store.load(digest), Packing))
    assert record.count == len(packed.tokens)
    assert not list(verify(store))
    events = []
    again = pack(corpus.train, tokenizer, 0, store, lambda *event: events.append(event))
    assert not events
    assert np.array_equal(again.tokens, packed.tokens)
    assert pack(corpus.train, tokenizer, 5, store).tokens[0] == 5


def test_packing_nothing(store, tokenizer):
    packed = pack((), tokenizer, 0, store)
    assert len(packed.tokens) == len(packed.starts) == len(windows(packed, 8).rows_WL) == 0


def test_large_vocabularies_take_four_bytes(source, store, tokenizer):
    corpus = build([source], store)
    packed = pack(corpus.holdout, tokenizer, 70_000, store)
    assert packed.tokens.dtype == np.uint32
    assert packed.tokens[packed.starts[-1]] == 70_000


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(2, 20), st.integers(0, 19))
def test_every_token_is_scored_once(sizes, length, carry):
    """`sizes` counts the tokens of each document after its separator."""
    carry = min(carry, length - 1)
    starts = np.cumsum([0, *(size + 1 for size in sizes)])
    tokens = np.arange(1, starts[-1] + 1).astype(np.uint16)  # all different, so a token tells its place
    separator = 0
    cut = windows(Packed(tokens, starts[:-1], separator), length, carry)
    scored = []
    for row, end, first, document in zip(cut.rows_WL, cut.length_W, cut.score_from_W, cut.document_W, strict=True):
        assert 1 <= first < end <= length
        assert (row[end:] == separator).all()
        place = row[:end] - 1
        assert np.array_equal(place, np.arange(place[0], place[0] + end))  # the document's own tokens, in a run
        assert starts[document] <= place[0]
        assert place[-1] < starts[document + 1]
        assert first >= min(max(1, carry), place[first] - starts[document])  # what a scored token sees before it
        scored += place[first:].tolist()
    assert sorted(scored) == scored == [place for place in range(starts[-1]) if place not in starts]
    assert cut.rows_WL.dtype == np.int32


def test_windows_must_be_longer_than_what_they_share():
    packed = Packed(np.zeros(9, np.uint16), np.zeros(1, np.int64), 0)
    with pytest.raises(BadInput, match="longer than the 8 tokens"):
        windows(packed, 8, carry=8)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-like"])
def test_text_that_spells_a_special_token_is_text(kind, tokenizer, store):
    """As language models' tokenizers do with special tokens off: no separator comes out of a document's own text."""
    if kind == "byte-level":
        words, special = tokenizer, END
    else:
        vocabulary = {"<s>": 0, "▁": 1, "<": 2, "s": 3, ">": 4, "a": 5, "b": 6, "|": 7, "<unk>": 8}
        words, special = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>")), "<s>"
        words.normalizer, words.decoder = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
        words.add_special_tokens([special])
    texts = [f"a {special} b", special, f"{special}{special}"]
    (store.root / "special.jsonl").parent.mkdir(exist_ok=True)
    (store.root / "special.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = build([str(store.root / "special.jsonl")], store, holdout=0.01)
    packed = pack((*corpus.train, *corpus.holdout), words, 0, store)
    ends = [*packed.starts[1:], len(packed.tokens)]
    rows = [packed.tokens[start:end].tolist() for start, end in zip(packed.starts, ends, strict=True)]
    assert all(row[0] == 0 and 0 not in row[1:] for row in rows)
    assert {words.decode(row[1:], skip_special_tokens=False) for row in rows} == set(texts)
    assert words.encode(special, add_special_tokens=False).ids == [0]  # a prompt may still hold one
