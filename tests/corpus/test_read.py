"""Documents are read whatever state their files are in; what is left out is counted."""

import gzip
import lzma
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources import lines

from elmwood.corpus.build import build, documents
from elmwood.corpus.read import SAMPLE, Document, Source, files, parse_source, read
from elmwood.errors import BadCorpus


def texts(source, **options):
    rejected = Counter()
    return [document.text for document in read(str(source), rejected, **options)], rejected


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


@pytest.mark.parametrize(
    "first", ['{"text": "cut sho', '{"n": ' + "9" * 5000 + "}", '{"text": "one"} more', '{"a": ' + "[" * 9000, "{'text': 'x'}"]
)
def test_a_bad_first_line_loses_only_itself(first, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(first.encode() + b"\n" + lines({"text": "one"}, {"text": "two"}))
    assert texts(path) == (["one", "two"], Counter({"not JSON": 1}))


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
    assert corpus.digest.startswith("cad8322a2f3abee8")  # the demo's figures are of this corpus
    notice = SAMPLE.with_name("NOTICE").read_text()
    assert all(document.meta["source"] in notice for document in documents(corpus.holdout, store))


def test_a_source_is_taken_apart(tmp_path):
    assert parse_source("sample") == Source(SAMPLE)
    assert parse_source("datasets:a:b").dataset == "a:b"
    own = parse_source(f"my.module:rows:{tmp_path}")
    assert (own.root, own.importer, own.repeatable) == (tmp_path, "my.module:rows", False)
    (tmp_path / "a:b:c").write_text("a file with colons in its name")
    assert parse_source(str(tmp_path / "a:b:c")).repeatable
