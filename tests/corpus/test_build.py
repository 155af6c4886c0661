"""A corpus: each document on one side of the split, the same bytes in whatever order and files the documents come."""

import multiprocessing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import TEXTS, lines

from elmwood.corpus import build as building
from elmwood.corpus import stage as staging
from elmwood.corpus.build import Means, build, documents, open_work, parse_memory, split
from elmwood.corpus.read import Document, Reading
from elmwood.corpus.stage import pieces
from elmwood.errors import BadCorpus, BadInput, DoesNotFit
from elmwood.records import Corpus
from elmwood.store import Store
from elmwood.store.verify import verify


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


def test_cuts_memory_and_workers_decide_nothing(tmp_path, store, monkeypatch):
    """Several pieces of one file, several runs of a piece, several passes, two processes."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 300, rng.integers(3, 60))) for _ in range(300)]
    rows = [
        {"text": text, "licence": f"L{n % 3}"} for n, text in enumerate([*texts, *texts[:20], *(f"{text} end" for text in texts[20:60])])
    ]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "lines.jsonl").write_bytes(lines(*rows[:250]))
    pq.write_table(pa.Table.from_pylist(rows[250:]), folder / "rows.parquet", row_group_size=30)
    whole = build([str(folder)], store, holdout=0.3)
    assert whole.rejected["exact duplicate"] == 20
    assert whole.rejected["near-duplicate"] > 10
    monkeypatch.setattr(staging, "PIECE", 9000)
    assert len(list(pieces([str(folder)], Reading()))) > 3
    monkeypatch.setattr(building, "SHARD", 10**9)
    for number, means in enumerate([Means(memory=20_000), Means(workers=2, memory=10**6)]):
        assert build([str(folder)], Store(tmp_path / f"store{number}"), holdout=0.3, means=means) == whole


def test_an_interrupted_build_resumes(source, store, monkeypatch, tmp_path):
    monkeypatch.setattr(staging, "PIECE", 1500)
    monkeypatch.setattr(building, "SHARD", 1000)
    whole = build([source], Store(tmp_path / "other"))

    class Stop(Exception):
        pass

    def interrupted_at(what: str, number: int):
        seen = []

        def progress(label, done, total, unit):
            if label.startswith(what) and done == total:
                seen.append(label)
                if len(seen) == number:
                    raise Stop

        return progress

    for what, number in (("read piece", 3), ("write train-", 2), ("write holdout-", 1)):
        with pytest.raises(Stop):
            build([source], store, progress=interrupted_at(what, number))
    events = []
    assert build([source], store, progress=lambda what, *_: events.append(what)) == whole
    assert not {what for what in events if what.startswith("read piece") or what == "write train-0"}
    assert not list((store.root / "work").glob("*/"))


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
    with pytest.raises(DoesNotFit, match="no space left"), open_work(store, "task"), open("/dev/full", "w") as full:
        full.write("x")


def test_memory_has_a_range():
    assert parse_memory("2G") == 2 * 10**9
    for wrong in ("5", "0", "10000T"):
        with pytest.raises(BadInput, match="memory is"):
            parse_memory(wrong)
