"""Documents are read whatever their state, one copy stands on one side, and every token is scored once."""

import gzip
import json
import lzma
import multiprocessing
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from elmwood.corpus import build as building
from elmwood.corpus.build import alone, build, documents, split
from elmwood.corpus.dedup import HASHES, SIMILAR, near_duplicates, shingles, signatures
from elmwood.corpus.read import SAMPLE, Document, files, read
from elmwood.corpus.tokens import END, Packed, load_tokenizer, pack, token_bytes, train_tokenizer, windows
from elmwood.errors import BadCorpus, BadInput, BadSeed, DoesNotFit
from elmwood.records import Corpus, Packing
from elmwood.store import Store, verify

TEXTS = [f"Tree {n} grows {n * n} leaves, and its {n}th branch holds {n + 7} birds of kind {n % 3}." for n in range(60)]


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def texts(source, **options):
    rejected = Counter()
    return [document.text for document in read(str(source), rejected, **options)], rejected


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "trees.jsonl"
    path.write_bytes(lines(*({"text": text, "source": "woods", "licence": "CC0"} for text in TEXTS)))
    return str(path)


# ---- reading


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_lines_in_every_compression(tmp_path, suffix):
    data = lines({"text": "one tree"}, {"text": "größer"})
    packed = {"": data, ".gz": gzip.compress(data), ".xz": lzma.compress(data), ".zst": pa.compress(data, codec="zstd", asbytes=True)}
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed[suffix])
    assert texts(path) == (["one tree", "größer"], Counter())


def test_bad_lines_are_counted_with_their_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    good = lines({"text": "one"})
    bad = lines({"body": "x"}, {"text": None}, {"text": 5}, {"text": " …\n"}, {"text": "\ud800 half"}, ["text"], "text")
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n" + bad + b'{"text": "caf\xe9"}\n' + b'{"text": "cut sho')
    assert texts(path) == (
        ["one"],
        Counter({"no field 'text'": 4, "field 'text' is not text": 1, "no words": 1, "not UTF-8": 2, "not JSON": 1}),
    )


def test_json_strings_are_not_taken_for_reasons(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("free text", {"text": "one"}))
    assert texts(path)[1] == Counter({"no field 'text'": 1})


@pytest.mark.parametrize(("name", "squeeze"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)])
def test_a_file_cut_short_gives_what_it_has(tmp_path, name, squeeze):
    rng = np.random.default_rng(0)
    whole = squeeze(lines(*({"text": f"word {rng.random()}"} for _ in range(20_000))))
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    found, rejected = texts(tmp_path / name)
    assert 1000 < len(found) < 20_000
    assert rejected["damaged file"] == 1


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", None, "two"], "licence": ["MIT", "MIT", None], "n": [1, 2, 3]}), path)
    assert list(read(str(path), Counter(), field="body")) == [Document("one", {"licence": "MIT"}), Document("two", {})]
    assert texts(path, field="body")[1] == Counter({"no field 'body'": 1})
    with pytest.raises(BadCorpus, match="3 × no field 'text'"):
        texts(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadCorpus, match="damaged file"):
        texts(path, field="body")


def test_a_folder_gives_all_below_it(tmp_path):
    for name, content in {
        "a.md": b"# Heading",
        "deep/b.py": b"print(1)",
        "deep/c.jsonl": lines({"text": "a line"}),
        "latin.txt": "café".encode("latin-1"),
        "picture.bin": b"\x89\0\0",
        ".git/config": b"hidden words",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    rejected = Counter()
    found = list(read(str(tmp_path), rejected))
    assert found == [Document("# Heading", {"source": "a.md"}), Document("print(1)", {"source": "deep/b.py"}), Document("a line")]
    assert rejected == Counter({"not UTF-8": 1, "not text": 1})


def test_data_sets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_bytes(lines({"text": "hello", "licence": "CC0", "n": 1}, {"text": "world", "licence": "CC0", "n": 2}))
    assert list(read(f"datasets:{tmp_path}", Counter())) == [Document("hello", {"licence": "CC0"}), Document("world", {"licence": "CC0"})]
    with pytest.raises(BadCorpus, match="test"):
        texts(f"datasets:{tmp_path}::test")


@pytest.mark.parametrize("source", ["nowhere", "datasets:", "datasets:a:b:c:d"])
def test_no_such_source(source):
    with pytest.raises(BadCorpus):
        texts(source)


def test_nothing_to_read(tmp_path):
    with pytest.raises(BadCorpus, match="it is empty"):
        texts(tmp_path)
    (tmp_path / "a.txt").write_text("?!")
    with pytest.raises(BadCorpus, match="1 × no words"):
        texts(tmp_path)


def test_the_sample(store):
    corpus = build(["sample"], store)
    assert files("sample") == [SAMPLE]
    assert SAMPLE.stat().st_size < 2.1e6
    assert corpus.documents == sum(shard.documents for shard in (*corpus.train, *corpus.holdout)) == 1990
    assert len(corpus.licences) == 10
    notice = SAMPLE.with_name("NOTICE").read_text()
    assert all(document.meta["source"] in notice for document in documents(corpus.holdout, store))


# ---- building


def test_build_splits_and_stores(source, store):
    corpus = build([source], store, holdout=0.2)
    train, holdout = ([document.text for document in documents(shards, store)] for shards in (corpus.train, corpus.holdout))
    assert sorted(train + holdout) == sorted(TEXTS)
    assert 4 <= len(holdout) <= 22  # 12 expected; five standard deviations
    assert corpus.bytes == sum(len(text.encode()) for text in TEXTS)
    assert corpus.licences == ("CC0",)
    assert next(documents(corpus.train, store)).meta == {"licence": "CC0", "source": "woods"}
    assert store.load(corpus.digest, Corpus) == corpus
    assert not list(verify(store))
    table = pq.read_table(store.get(corpus.train[0].blob))
    assert table.column_names == ["id", "text", "meta"]
    assert table["id"].to_pylist() == sorted(Document(text).id for text in train)


def test_the_same_content_is_built_once(source, store, tmp_path):
    events = []
    corpus = build([source], store)
    moved = tmp_path / "elsewhere" / "trees.jsonl"
    moved.parent.mkdir()
    moved.write_bytes((tmp_path / "trees.jsonl").read_bytes())
    assert build([str(moved)], store, progress=lambda what, *_: events.append(what)) == corpus
    assert set(events) == {"hash sources"}
    moved.write_bytes(lines({"text": "another"}, {"text": "corpus"}))
    assert build([str(moved)], store) != corpus


def test_shards_are_bounded(source, store, monkeypatch):
    whole = build([source], store)
    monkeypatch.setattr(building, "SHARD", 1000)
    monkeypatch.setattr(building, "GROUP", 300)
    corpus = build([source], store, holdout=0.1000001)  # another key
    assert len(corpus.train) > 3
    assert all(shard.bytes <= 1000 for shard in corpus.train)
    assert list(documents(corpus.train, store)) == list(documents(whole.train, store))


def test_one_document_is_too_few(tmp_path, store):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "one"}, {"text": "one"}))
    with pytest.raises(BadCorpus, match=r"2 different documents.*has 1: add text"):
        build([str(path)], store)
    assert not list(store.records())
    assert not [path for path in (store.root / "work").iterdir() if path.is_dir()]
    path.write_bytes(lines({"text": "one"}, {"text": "two"}))
    corpus = build([str(path)], store)
    assert [shard.documents for shard in (*corpus.train, *corpus.holdout)] == [1, 1]


@pytest.mark.parametrize("holdout", [0, 1, -0.1, 1.5])
def test_the_holdout_is_a_share(source, store, holdout):
    with pytest.raises(BadCorpus, match="between 0 and 1"):
        build([source], store, holdout=holdout)
    with pytest.raises(BadCorpus, match="needs a source"):
        build([], store)


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


@settings(max_examples=12, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_order_and_files_decide_nothing(tmp_path_factory, random, parts):
    rows = [{"text": text, "source": "a"} for text in TEXTS[:15]]
    rows += [{"text": TEXTS[0], "source": "b"}, {"text": TEXTS[1].upper()}, {"text": "?"}]
    folder = tmp_path_factory.mktemp("shuffled")
    expected = folder / "expected.jsonl"
    expected.write_bytes(lines(*rows))
    random.shuffle(rows)
    for part in range(parts):
        (folder / f"part{part}.jsonl").write_bytes(lines(*rows[part::parts]))
    sources = [str(folder / f"part{part}.jsonl") for part in range(parts)]
    shuffled = build(sources, Store(folder / "one"), holdout=0.3)
    assert shuffled == build([str(expected)], Store(folder / "two"), holdout=0.3)
    assert shuffled.rejected == {"exact duplicate": 1, "near-duplicate": 1, "no words": 1}


@settings(deadline=None)
@given(st.sets(st.text("0123456789abcdef", min_size=4, max_size=8), min_size=2), st.floats(0.01, 0.99))
def test_a_document_keeps_its_side(ids, share):
    ids = sorted(ids)
    held = split(ids, share)
    assert held.any()
    assert not held.all()
    moved = [n for n in range(len(ids)) if split([ids[n], *(f"x{m}" for m in range(200))], share)[0] != held[n]]
    assert len(moved) <= 1  # the one that crossed because a side would have been empty


def builds(root: str, source: str, answers) -> None:
    """Whether this process is the one that reads."""
    events = set()
    build([source], Store(root), progress=lambda what, *_: events.add(what))
    answers.put("read" in events)


def test_two_processes_build_once(tmp_path, source):
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    workers = [context.Process(target=builds, args=(str(tmp_path / "store"), source, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted([answers.get(), answers.get()]) == [False, True]


def test_a_full_disk_is_said(store):
    with pytest.raises(DoesNotFit, match="no space left"), alone(store, "task"), open("/dev/full", "w") as full:
        full.write("x")


# ---- tokens


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


# ---- windows


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
