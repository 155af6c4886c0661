"""Parquet and Arrow files that unpack to far more than they take: refused or read in little memory, whatever they say of themselves."""

import struct
from collections import Counter
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elmwood.corpus.columnar import weight
from elmwood.corpus.read import Reading, read
from elmwood.errors import BadCorpus

BOMB, LONG = "unpacks to more than 200 times its size", "longer than 1.1MB"
MILLION = "x" * 1_000_000
CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def said(text, times=1):
    return [{"role": "user", "content": text}] * times


def documents(path, **how):
    """Lengths of the documents, what was left out, and the most bytes that Arrow had at once."""
    before, pool, rejected = pa.default_memory_pool(), pa.proxy_memory_pool(pa.system_memory_pool()), Counter()
    pa.set_memory_pool(pool)
    found = []
    try:
        with suppress(BadCorpus):
            found = [len(one.text) for one in read(str(path), rejected, reading=Reading.of(largest_document="1100k", **how))]
    finally:
        pa.set_memory_pool(before)
    return found, dict(rejected), pool.max_memory()


def varint(number, length=0):
    """In Thrift's compact protocol, in at least so many bytes."""
    number, found = number << 1, bytearray()
    while number >= 128 or len(found) + 1 < length:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def parquet(path, values, kind=None, lie=False, **how):
    pq.write_table(pa.table({"text": pa.array(values, kind)}), path, compression="zstd", **how)
    if lie:
        said = varint(pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size)
        raw = path.read_bytes()
        assert said in raw
        path.write_bytes(raw.replace(said, varint(9, len(said))))
        assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 9


def arrow(path, values, kind=None, file=False):
    table = pa.table({"text": pa.array(values, kind)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(path, table.schema, options=options) as writer:
        writer.write_table(table)


MADE = {  # what the file holds -> how it is made, what is found there, and what is left out
    "one text that rows repeat": (lambda path: parquet(path, [MILLION] * 40), [1_000_000] * 40, {}),
    "texts that begin alike": (
        lambda path: parquet(path, [MILLION] * 40, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}), [1_000_000] * 40, {}
    ),
    "a footer that says little": (lambda path: parquet(path, [MILLION] * 40, use_dictionary=False, lie=True), [], {BOMB: 1}),
    "lists without values": (lambda path: parquet(path, [[None] * 3_000_000], pa.list_(pa.string())), [], {BOMB: 1}),
    "rows without values": (lambda path: parquet(path, pa.nulls(30_000_000, pa.string())), [], {BOMB: 1}),
    "a list that repeats a text": (
        lambda path: parquet(path, [said(MILLION, 100), *[said("a"), said("b")] * 20], CHAT, row_group_size=15), [7] * 40, {LONG: 1}
    ),
    "a list of texts that begin alike": (
        lambda path: parquet(
            path, [[MILLION] * 100], pa.list_(pa.string()), use_dictionary=False,
            column_encoding={"text.list.element": "DELTA_BYTE_ARRAY"},
        ), [], {BOMB: 1},
    ),
    "a stream": (lambda path: arrow(path, [MILLION] * 40), [], {BOMB: 1}),
    "a file": (lambda path: arrow(path, [MILLION] * 40, file=True), [], {BOMB: 1}),
    "rows of nothing": (lambda path: arrow(path, pa.nulls(30_000_000)), [], {BOMB: 1}),
    "a list of nothing": (lambda path: arrow(path, pa.ListArray.from_arrays([0, 9_000_000], pa.nulls(9_000_000))), [], {LONG: 1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE)
def test_what_unpacks_to_far_more_is_left_out_or_read_in_little_memory(kind, tmp_path):
    make, lengths, left = MADE[kind]
    path = tmp_path / "a.parquet"
    make(path)
    found, rejected, most = documents(path)
    assert (found, rejected) == (lengths, left)
    assert most < 8_000_000


def test_a_buffer_that_lies_of_its_size_is_left_out(tmp_path):
    path = tmp_path / "a.arrow"
    arrow(path, ["a text " * 100] * 20)
    raw, said = path.read_bytes(), struct.pack("<q", 14_000)
    assert said in raw
    for lie, reason in ((1 << 40, BOMB), (1 << 62, BOMB), (13_000, "damaged file")):
        path.write_bytes(raw.replace(said, struct.pack("<q", lie)))
        found, rejected, most = documents(path)
        assert (found, rejected) == ([], {reason: 1})
        assert most < 1_000_000


@pytest.mark.parametrize("make", [parquet, arrow, lambda *given: arrow(*given, file=True)])
def test_conversations_and_repeated_texts_are_read_as_before(make, tmp_path):
    chats = [[{"role": "user", "content": f"question {n % 3}"}, {"role": "bot", "content": "yes"}] for n in range(50)] + [None, []]
    make(tmp_path / "a.parquet", chats, CHAT)
    found = [one.text for one in read(str(tmp_path / "a.parquet"), Counter())]
    assert found == [f"user: question {n % 3}\n\nbot: yes" for n in range(50)]
    if make is parquet:
        make(tmp_path / "a.parquet", chats, CHAT, row_group_size=7)
        assert [one.text for one in read(str(tmp_path / "a.parquet"), Counter())] == found
    make(tmp_path / "b.parquet", ["one", "two", None, "one"], pa.dictionary(pa.int32(), pa.string()))
    assert [one.text for one in read(str(tmp_path / "b.parquet"), Counter())] == ["one", "two", "one"]


def test_a_value_weighs_what_it_becomes():
    texts = pa.array(["aa", "bbb", None])
    for kind, wanted in (
        (pa.string(), 2), (pa.large_string(), 2), (pa.string_view(), 2), (pa.dictionary(pa.int8(), pa.string()), 2),
    ):  # fmt: skip
        assert weight(texts.cast(kind)[0]) == wanted
        assert weight(texts.cast(kind)[2]) == 0
    assert weight(pa.scalar(["aa", "bbb", None])) == 3 * 8 + 5
    assert weight(pa.array([["x"], ["aa", "bbb"]])[1]) == 2 * 8 + 5  # of the row alone
    assert weight(pa.array([["aa"] * 9], pa.list_(pa.dictionary(pa.int8(), pa.string())))[0]) == 9 * (8 + 2)
    assert weight(pa.scalar({"a": "aa", "b": ["c"]})) == 2 + 8 + 1
    assert weight(pa.scalar([{"a": "aa"}, {"a": None}])) == 2 * 64 + 2 * 8 + 2
    views = pa.ListViewArray.from_arrays(pa.array([0, 0]), pa.array([3, 3]), texts)
    assert weight(views[1]) == 3 * 8 + 5
    assert weight(pa.ListArray.from_arrays([0, 2], views)[0]) == float("inf")


def test_a_footer_that_says_other_types_ends_in_documents_or_is_refused(tmp_path):
    """pyarrow's metadata of a column abort the process where its statistics are those of another type."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two"]}), path)
    raw = path.read_bytes()
    text = bytes([0x15, 6 << 1])  # the first field of an element of the schema, and of a column: its type is BYTE_ARRAY
    places = [place for place in range(len(raw)) if raw.startswith(text, place)]
    assert len(places) >= 2
    for place in places:
        for other in (0, 1, 2, 3, 7):
            path.write_bytes(raw[: place + 1] + bytes([other << 1]) + raw[place + 2 :])
            found, rejected, _ = documents(path)
            assert found == [3, 3] or rejected
