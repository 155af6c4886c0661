"""A file is what its name and its first bytes say: the same documents come out of every kind, and syntax never becomes one."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import zipfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import lines

from elmwood.corpus.formats import IMPORTERS
from elmwood.corpus.kinds import KINDS, NOT_TEXT
from elmwood.corpus.read import Document, Reading, read
from elmwood.corpus.unpack import PACKED
from elmwood.errors import BadCorpus, BadInput, ElmwoodError

TEXTS = ["one, two\nthree", 'a "quoted" größe', "面白い本"]
ROWS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
SQUEEZE = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


def texts(source, **options):
    rejected = Counter()
    return [document.text for document in read(str(source), rejected, reading=Reading.of(**options))], rejected


def refused(source, **options) -> str:
    with pytest.raises(BadCorpus) as error:
        texts(source, **options)
    return str(error.value)


def table(delimiter=",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in ROWS)])
    return file.getvalue().encode()


def arrow(opener) -> bytes:
    sink = io.BytesIO()
    with opener(sink, pa.schema({"id": pa.int64(), "text": pa.string()})) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS))
    return sink.getvalue()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


MADE = {
    "a.jsonl": lines(*ROWS),
    "a.NDJSON": lines(*ROWS),
    "lines.json": lines(*ROWS),
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "a.txt": lines(*ROWS),
    "array.md": json.dumps(ROWS, indent=1).encode(),
    "no-ending": lines(*ROWS),
    "a.csv": table(),
    "semicolons.csv": table(";"),
    "a.TSV": table("\t"),
    "json.csv": lines(*ROWS),
    "a.parquet": parquet(),
    "parquet.jsonl": parquet(),
    "parquet": parquet(),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "file.arrow": arrow(pa.ipc.new_file),
    "arrow.txt": arrow(pa.ipc.new_file),
}
WHOLE = (".parquet", "parquet", ".arrow", "arrow.txt", "parquet.jsonl")


@pytest.mark.parametrize("name", MADE)
def test_the_same_documents_come_out_of_every_kind(tmp_path, name):
    (tmp_path / name).write_bytes(MADE[name])
    assert texts(tmp_path / name) == (TEXTS, Counter())


@pytest.mark.parametrize("name", [name for name in MADE if not name.endswith(WHOLE)])
def test_and_out_of_every_compression(tmp_path, name):
    for ending, squeeze in SQUEEZE.items():
        (tmp_path / f"{name}{ending}").write_bytes(squeeze(MADE[name]))
        assert texts(tmp_path / f"{name}{ending}") == (TEXTS, Counter())
    (tmp_path / name).write_bytes(gzip.compress(MADE[name]))  # compressed, and not named so
    assert texts(tmp_path / name) == (TEXTS, Counter())


def test_one_object_is_one_document(tmp_path):
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps({"title": "x", "text": "only\none"}, indent=indent))
        assert texts(tmp_path / "a.json")[0] == ["only\none"]


def test_folders_of_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list(ROWS)
    split.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict(train=split, test=datasets.Dataset.from_dict({"text": ["a test"]})).save_to_disk(str(tmp_path / "all"))
    for source in (tmp_path / "one", f"datasets:{tmp_path / 'one'}"):
        assert texts(source) == (TEXTS, Counter())
    assert sorted(texts(tmp_path / "all")[0]) == sorted([*TEXTS, "a test"])
    assert "no field 'body'" in refused(tmp_path / "one", field="body")


def test_what_is_no_text_is_counted_by_kind(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "hidden words")
    array = io.BytesIO()
    np.save(array, np.arange(3))
    for name, data in {
        "a.txt": b"words",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
        "picture.txt": b"\x89PNG\r\n\x1a\n\0\0",
        "named.jpg": b"words",
        "b.zip": archive.getvalue(),
        "c": array.getvalue(),
        "d.dat": pickle.dumps(["words"]),
        "e.txt": b"%PDF-1.7 words",
        "f.jsonl": b'\x10\0\0\0\0\0\0\0{"a":{}}        words',
        "g.csv": b"\x7fELF\2\1\1\0",
        "h.md": b"words\0and more",
        "i.parquet": lines({"text": "words"}),
        "j.jsonl.gz": lines({"text": "words"}),
        "k.parquet.gz": gzip.compress(parquet()),
        "l.json": b'{"settings": {"depth": 3}}',
    }.items():
        (tmp_path / name).write_bytes(data)
    found, rejected = texts(tmp_path)
    assert found == ["words"]
    assert rejected == {
        "an image, not text": 3,
        "an archive, not text": 1,
        "arrays, not text": 1,
        "a pickle, not text": 1,
        "a PDF, not text": 1,
        "weights, not text": 1,
        "a program, not text": 1,
        "not text": 1,
        "named .parquet, and not Parquet": 1,
        "named .gz, and not compressed so": 1,
        "Parquet, compressed as a whole: unpack it": 1,
        "no field 'text'": 1,
    }
    places = {str(reason): reason.place for reason in rejected if reason.file}
    assert places["an image, not text"] == "named.jpg"
    assert places["not text"] == "h.md"


def test_prose_and_code_that_look_like_syntax_are_text(tmp_path):
    for text in (
        "[Illustration]\n\nOTTO von Bismarck", "{ pkgs }: { x = 1; }", "ID3 tags, MZ and GGUF are formats", "[1] A footnote.",
        '{"quoted"} is not JSON', "PK is a pair of letters", "BZh: an abbreviation",
    ):  # fmt: skip
        (tmp_path / "a.txt").write_text(text)
        assert texts(tmp_path / "a.txt")[0] == [text]


def test_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines({"doc": {"text": "inner", "more": {"body": "deep"}}, "a.b": "literal", "a": {"b": "x"}, "title": "A", "none": None})
    )
    for field, text in {
        "doc.text": "inner", "doc.more.body": "deep", "a.b": "literal", "title,doc.text": "A\n\ninner", "title, none": "A",
    }.items():  # fmt: skip
        assert texts(path, field=field)[0] == [text]
    assert "(1 × no field 'doc.none' (a.jsonl, fields doc, a.b, a, title, none))" in refused(path, field="doc.none")
    assert "is not text" in refused(path, field="doc")
    for name, table in {"a.parquet": pa.Table.from_pylist([{"doc": {"text": "inner"}, "title": "A"}])}.items():
        pq.write_table(table, tmp_path / name)
        assert texts(tmp_path / name, field="doc.text")[0] == ["inner"]
        assert texts(tmp_path / name, field="title,doc.text")[0] == ["A\n\ninner"]


CHATS = {
    "openai": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}],
    "sharegpt": [{"from": "user", "value": "Hello?"}, {"from": "assistant", "value": "Yes."}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "image", "url": "x"}, {"type": "text", "text": "lo?"}]},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "Yes."},
    ],
    "columns": {"role": ["user", "assistant"], "content": ["Hello?", "Yes."]},
}


@pytest.mark.parametrize("how", CHATS)
def test_conversations_are_joined(tmp_path, how):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"messages": CHATS[how]}))
    assert texts(path, field="messages")[0] == ["user: Hello?\n\nassistant: Yes."]
    if how != "parts":
        pq.write_table(pa.Table.from_pylist([{"messages": CHATS[how]}]), tmp_path / "a.parquet")
        assert texts(tmp_path / "a.parquet", field="messages")[0] == ["user: Hello?\n\nassistant: Yes."]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "gb18030"])
def test_encodings(tmp_path, encoding):
    text = "größer, café\n" * 9000  # longer than a block of UTF-32
    rows = f"id,text\n1,{'größer' * 5}\n"
    named = {} if encoding.startswith("utf") else {"encoding": encoding}
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "a.csv").write_bytes(rows.encode(encoding))
    (tmp_path / "a.jsonl").write_bytes(f'{{"text": "{text[:-1000].strip()!s}"}}\n'.replace("\n", " ").encode(encoding))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode(encoding)))
    assert texts(tmp_path / "a.txt", **named)[0] == texts(tmp_path / "a.txt.gz", **named)[0] == [text]
    assert texts(tmp_path / "a.csv", **named)[0] == ["größer" * 5]
    assert len(texts(tmp_path / "a.jsonl", **named)[0]) == 1


def test_undecodable_bytes_have_a_place(tmp_path):
    (tmp_path / "a.txt").write_bytes("some café".encode("latin-1"))
    assert "1 × not UTF-8 (a.txt, byte 8)" in refused(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(("word " * 500_000).encode() + b"\x81\x8d")
    assert "(a.txt, byte 2500000)" in refused(tmp_path / "a.txt", encoding="cp1252")
    for wrong in ("rot13", "hex", "nonsense"):
        with pytest.raises(BadInput, match="no text encoding"):
            Reading.of(encoding=wrong)


def test_one_bad_row_loses_only_itself(tmp_path):
    good = ["first", "second", "third"]
    raw = pa.array([b"first", b"caf\xe9", b"second", b"third"], pa.binary()).view(pa.string())
    rows = pa.table({"text": raw})
    pq.write_table(rows, tmp_path / "a.parquet")
    pq.write_table(pa.table({"doc": pa.StructArray.from_arrays([raw], ["text"])}), tmp_path / "nested.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", rows.schema) as writer:
        writer.write_table(rows)
    (tmp_path / "a.csv").write_bytes(b"text\nfirst\ncaf\xe9\nsecond\nthird\n")
    for name in ("a.parquet", "a.arrow", "a.csv"):
        assert texts(tmp_path / name) == (good, Counter({"not UTF-8": 1})), name
    assert texts(tmp_path / "nested.parquet", field="doc.text") == (good, Counter({"not UTF-8": 1}))


def test_links_and_what_is_no_file(tmp_path):
    corpus, outside = tmp_path / "corpus", tmp_path / "outside"
    (corpus / "deep").mkdir(parents=True)
    outside.mkdir()
    (corpus / "a.txt").write_text("inside")
    (outside / "b.txt").write_text("outside")
    (corpus / "file.txt").symlink_to(outside / "b.txt")
    (corpus / "folder").symlink_to(outside)
    (corpus / "nothing").symlink_to(tmp_path / "absent")
    (corpus / "deep" / "loop").symlink_to(corpus)
    (corpus / "null").symlink_to("/dev/null")
    os.mkfifo(corpus / "pipe")
    assert texts(corpus) == (["inside"], Counter({"a link, not followed": 5, "a pipe": 1}))
    found, rejected = texts(corpus, follow_links=True)
    assert sorted(found) == ["inside", "outside", "outside"]
    assert rejected == {"a pipe": 1, "a device": 1, "a link to nothing": 1}
    (tmp_path / "named").symlink_to(corpus)
    assert texts(tmp_path / "named")[0] == ["inside"]  # named by the user
    assert "a pipe" in refused(corpus / "pipe")
    assert "a device" in refused("/dev/zero")
    assert "this is ''" in refused("")


@pytest.mark.parametrize("ending", SQUEEZE)
def test_bombs_are_cut_and_long_lines_left_out(tmp_path, ending):
    """A hundred kilobytes are the bound here, so that the bomb is small."""
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(SQUEEZE[ending](lines({"text": "first"}) + lines({"text": "x" * 1000}) * 4000))
    found, rejected = texts(path, largest_document="100k")
    assert found[0] == "first"
    assert rejected == {"unpacks to more than 200 times its size": 1}
    assert len(found) <= max(100_000, 200 * path.stat().st_size) / 1000 + 70
    long = np.random.default_rng(0).bytes(100_000).hex()
    path.write_bytes(SQUEEZE[ending](lines({"text": "first"}, {"text": long}, {"text": "last"})))
    assert texts(path, largest_document="100k") == (["first", "last"], Counter({"longer than 100kB": 1}))
    assert len(texts(path, largest_document="300k")[0]) == 3


def test_long_documents_of_every_kind_are_left_out(tmp_path):
    rows = [{"text": "short"}, {"text": "x" * 20_000}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("text\nshort\n" + "x" * 20_000 + "\n")
    (tmp_path / "d.txt").write_text("x" * 20_000)
    found, rejected = texts(tmp_path, largest_document=10_000)
    assert found == ["short"] * 3
    assert rejected == {"longer than 10kB": 4}
    (tmp_path / "c.csv").write_text('text\nshort\n"never closed\n' + "x\n" * 20_000)
    assert texts(tmp_path / "c.csv", largest_document=10_000) == (["short"], Counter({"longer than 10kB": 1}))
    with pytest.raises(BadInput, match="largest-document is 0: choose"):
        Reading.of(largest_document=0)


def test_frames_and_members(tmp_path):
    half, other = lines(*ROWS[:2]), lines(ROWS[2])
    for ending, squeeze in SQUEEZE.items():
        (tmp_path / f"a.jsonl{ending}").write_bytes(squeeze(half) + squeeze(other))
        assert texts(tmp_path / f"a.jsonl{ending}")[0] == TEXTS
    raw = lines(*ROWS)
    for log in (27, 31):  # a frame by hand: one raw block, in a window of 2^log bytes
        frame = b"\x28\xb5\x2f\xfd\0" + bytes([(log - 10) << 3]) + ((len(raw) << 3) | 1).to_bytes(3, "little") + raw
        (tmp_path / f"{log}.jsonl.zst").write_bytes(frame)
    assert texts(tmp_path / "27.jsonl.zst")[0] == TEXTS
    assert "zstd with a window of 2^31 bytes: unpack it with zstd -d --long=31" in refused(tmp_path / "31.jsonl.zst")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(MADE)), st.sampled_from(["", *SQUEEZE]), st.integers(0, 2**32 - 1))
def test_mutated_files_end_in_documents_or_our_errors(tmp_path, name, ending, number):
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(mutated(SQUEEZE[ending](MADE[name]) if ending else MADE[name], np.random.default_rng(number)))
    try:
        found = list(read(str(path), Counter()))
    except ElmwoodError:
        return
    assert all(isinstance(one, Document) and one.text.encode() for one in found)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes set, cut out, put in and repeated, at a few places."""
    for _ in range(rng.integers(1, 9)):
        place = int(rng.integers(0, len(data)))
        size = int(rng.integers(1, 40))
        middle = [rng.bytes(1), b"", rng.bytes(size), data[place : place + size] * int(rng.integers(2, 40))][rng.integers(0, 4)]
        data = data[:place] + middle + data[place + (size if not middle else 1) :] or b"x"
    return data


def test_tables_are_whole():
    assert set(IMPORTERS) == set(KINDS)
    assert {ending for one in PACKED.values() for ending in one.endings} >= set(SQUEEZE)
    assert not {f".{ending}" for endings, _ in NOT_TEXT.values() for ending in endings.split()} & {
        ending for one in KINDS.values() for ending in one.endings
    }
