"""Floors one and two: records, registry, store, engine."""

import errno
import hashlib
import json
import os
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elmwood import engine, records
from elmwood.errors import BadRecord, Damaged, DoesNotFit, NewerRecord, UnknownName
from elmwood.records import FORMAT, Comparison, Corpus, Forest, Recipe, Seed, Shard, canonical, fingerprint, parse, references
from elmwood.registry import lookup
from elmwood.report.data import Ancestor, Report
from elmwood.report.page import html
from elmwood.store import Store, lineage
from elmwood.store.verify import verify
from elmwood.study import page

BLOB = "sha256:" + "a" * 64


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def corpus(store, text=b"text") -> Corpus:
    shard = Shard(blob=store.put(text), documents=1, bytes=len(text))
    return Corpus(train=(shard,), holdout=(), documents=1, bytes=len(text), holdout_share=0.1)


# ---- records


@given(st.lists(st.text("0123456789abcdef", min_size=64, max_size=64), max_size=5))
def test_a_forest_does_not_depend_on_the_order_of_its_experts(experts):
    forests = [Forest(seed="0" * 64, partition="1" * 64, experts=tuple(order)) for order in (experts, experts[::-1])]
    assert forests[0].digest == forests[1].digest
    assert parse(canonical(forests[0])) == forests[1]


def test_a_digest_is_of_the_content(store):
    one, two = corpus(store), corpus(store, b"other")
    assert one.digest == parse(canonical(one)).digest != two.digest


DEFAULTS = {  # left out of a record's spelling: to change one would change what is meant by records there are. New ones may be added
    "Recipe": {
        "method": "full", "batch": 8, "length": 256, "learning_rate": 1e-3, "schedule": "cosine", "warmup": 0.05, "final": 0.1,
        "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "clip": 1.0, "optimiser": "adamw", "accumulate": 1, "checkpointing": False,
        "patience": None, "rank": 16, "alpha": None, "targets": "all-linear", "late": 1.0, "together": 1, "rng_seed": 0, "threads": 1,
    },
    "Partition": {"method": "balanced", "rng_seed": 0, "fit_sizes": (), "greedy_sizes": (), "extra": {}, "parent": None},
    "Domain": {"terms": (), "train": (), "holdout": (), "examples": (), "origin": None},
    "Ensemble": {"router": "centroid", "top_k": 2, "temperature": 0.1, "seed_distance": None},
    "Expert": {"partition": None, "domain": None, "curve": (), "contributor": None},
    "State": {"part": (0, 1)},
    "Share": {"tensors": "", "layers": None},
    "Row": {"role": "result", "gain": None, "batch": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_a_default_never_changes(kind):
    fields = getattr(records, kind).model_fields
    assert {name: fields[name].default for name in DEFAULTS[kind]} == DEFAULTS[kind]


def test_a_field_added_later_changes_no_name():
    assert canonical(Recipe(steps=3, batch=8)) == b'{"steps":3}' == canonical(Recipe(steps=3))
    spelled = json.dumps({"kind": "forest", "format": 1, "seed": "0" * 64, "partition": "1" * 64, "experts": []}).encode()
    assert parse(spelled).digest == hashlib.sha256(spelled).hexdigest()  # another spelling, its own name


def test_references_are_found_at_any_depth(store):
    record = corpus(store)
    assert list(references(record)) == [record.train[0].blob]
    forest = Forest(seed="0" * 64, partition="1" * 64, experts=("2" * 64,))
    assert list(references(forest)) == ["0" * 64, "1" * 64, "2" * 64]


def test_unknown_keys_kinds_and_formats_are_refused(store):
    fields = json.loads(canonical(corpus(store)))
    with pytest.raises(BadRecord, match="surprise"):
        parse(json.dumps(fields | {"surprise": 1}).encode())
    with pytest.raises(BadRecord, match="unknown record kind"):
        parse(json.dumps(fields | {"kind": "shrub"}).encode())
    with pytest.raises(NewerRecord, match="upgrade"):
        parse(json.dumps(fields | {"format": FORMAT + 1, "new_field": 1}).encode())
    with pytest.raises(BadRecord, match="not a record"):
        parse(b"{")


def test_fingerprints_tell_inputs_apart():
    recipe = Recipe(steps=1)
    assert fingerprint("train", recipe) == fingerprint("train", Recipe(steps=1)) != fingerprint("train", Recipe(steps=2))


# ---- registry


def test_lookup_opens_rows_and_strangers():
    assert lookup({"a": 1}, "a") == 1
    assert lookup({}, "os:getpid") is os.getpid
    with pytest.raises(UnknownName, match="have a"):
        lookup({"a": 1}, "b", "router")
    with pytest.raises(UnknownName, match="Python path"):
        lookup({"a": 1}, "no_such_module:x")


# ---- store


def test_content_is_stored_once_and_comes_back(store, tmp_path):
    (tmp_path / "file").write_bytes(b"hello")
    assert store.put(b"hello") == store.put(tmp_path / "file")
    assert store.get(store.put(b"hello")).read_bytes() == b"hello"
    with pytest.raises(Damaged, match="not in"):
        store.get(BLOB)


def test_folders_come_back_as_folders(store, tmp_path):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "sub" / "b.txt").write_text("b")
    files = store.put_folder(source)
    view = store.folder(files)
    assert (view / "sub" / "b.txt").read_text() == "b"
    assert store.folder(files) == view
    with pytest.raises(Damaged, match="stay inside"):
        store.folder({"../escape": files["a.txt"]})


def test_names_and_digests_resolve(store):
    record = corpus(store)
    store.name("demo/corpus", store.add(record))
    for name in ("demo/corpus", record.digest, record.digest[:8]):
        assert store.load(name) == record
    assert store.names() == {"demo/corpus": record.digest}
    with pytest.raises(UnknownName, match="nothing here"):
        store.load("absent")
    with pytest.raises(UnknownName, match="is a corpus"):
        store.load("demo/corpus", Seed)
    for bad in ("../up", "/etc/passwd", "a//b", ""):
        with pytest.raises(UnknownName):
            store.name(bad, record.digest)


class Result(NamedTuple):
    record: Corpus
    seconds: float


def test_a_record_stands_for_itself_and_a_result_for_its_record(store):
    one = corpus(store)
    assert store.load(Result(one, 1.0), Corpus) is store.expand(Result(one, 1.0))[0] is one
    assert store.resolve(Result(one, 1.0)) == one.digest
    assert store.has(one.digest), "it was new, and is kept"
    assert store.load(one, Corpus) is one
    assert store.resolve(one) == one.digest
    with pytest.raises(UnknownName, match="a forest is needed"):
        store.load(one, Forest)


@pytest.mark.parametrize("name", ["seed/x", "seed/x/y", "mine", "n" * 201, "done", "done/x", "seed.tmp", "", "a b"])
def test_names_that_a_store_could_not_keep_are_refused(store, name):
    """Below a name, above names, too long, or taken by the store itself."""
    digest = store.add(corpus(store))
    store.name("seed", digest)
    store.name("mine/0", digest)
    with pytest.raises(UnknownName, match=r"cannot be a name|too long"):
        store.check_name(name)
    with pytest.raises(UnknownName):
        store.name(name, digest)
    store.name("seed", digest)  # again
    store.name("n" * 200, digest)


def test_a_name_that_ends_in_a_slash_stands_for_all_below_it(store):
    one = corpus(store)
    for name in ("mine/0", "mine/1", "other"):
        store.name(name, store.add(one))
    assert store.expand(["mine/", one, "other"]) == ["mine/0", "mine/1", one, "other"]
    assert store.expand(one) == [one]
    with pytest.raises(UnknownName, match="begin with"):
        store.expand("none/")


def test_a_store_is_found_where_none_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ELMWOOD_STORE", raising=False)
    assert Store().root == Store(".elmwood").root == Store(Store()).root
    monkeypatch.setenv("ELMWOOD_STORE", "elsewhere")
    assert str(Store().root) == "elsewhere"


def test_a_finished_task_is_found_again_and_its_work_is_gone(store):
    key, record = fingerprint("task", 1), corpus(store)
    (store.work(key) / "half").write_text("x")
    assert store.done(key) is None
    store.finish(key, record)
    assert store.done(key) == record.digest
    assert not (store.root / "work" / key).exists()
    store.path(record.digest).unlink()
    assert store.done(key) is None


def test_logs_survive_a_torn_line(store):
    store.log("k", seconds=1.5)
    with (store.root / "logs" / "k.jsonl").open("a") as file:
        file.write('{"seconds": 2')
    assert store.logged("k") == [{"seconds": 1.5}]


def test_a_full_disk_leaves_nothing_half_written(store, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DoesNotFit, match="--store"):
        store.put(b"x" * 1000)
    assert not [path for path in store.root.rglob("*") if path.is_file()]


def test_verify_says_exactly_what_is_damaged(store):
    record = corpus(store)
    other = corpus(store, b"other")
    store.add(record), store.add(other)
    store.name("good", record.digest)
    assert list(verify(store)) == []

    blob = store.path(record.train[0].blob)
    blob.chmod(0o644)
    blob.write_bytes(b"tampered")
    store.path(other.train[0].blob).unlink()
    store.name("gone", "f" * 64)
    found = {damage.where: damage.problem for damage in verify(store)}
    assert set(found) == {
        f"blobs/sha256/{blob.parent.name}/{blob.name}",
        str(store.path(other.train[0].blob).relative_to(store.root)),
        "refs/gone",
    }
    assert record.digest[:12] in found[f"blobs/sha256/{blob.parent.name}/{blob.name}"]

    store.path(record.digest).write_bytes(b"{}")
    with pytest.raises(Damaged):
        store.load(record.digest)
    assert f"records/{record.digest}.json" in {damage.where for damage in verify(store)}


def test_lineage_walks_to_the_roots(store):
    record = corpus(store)
    store.add(record)
    seed = Seed(
        name="s", architecture="LlamaForCausalLM", parameters=1, vocabulary=2, context=3, separator=0, files={}, corpus=record.digest
    )
    store.add(seed)
    assert [(depth, found.kind) for depth, found in lineage(store, seed.digest)] == [(0, "seed"), (1, "corpus")]


def generations(store, count, width):
    """The digest of the last of so many generations of records. Each names all records of the one before."""
    before: tuple[str, ...] = ()
    (store.root / "records").mkdir(parents=True)
    text = canonical(Comparison(controls=(), holdout="HOLDOUT", rows=())).decode().replace("{", '{"controls":CONTROLS,', 1)
    for _ in range(count):
        named = text.replace("CONTROLS", json.dumps(before))
        made = [named.replace("HOLDOUT", f"h{number}").encode() for number in range(width)]
        before = tuple(hashlib.sha256(one).hexdigest() for one in made)
        for digest, one in zip(before, made, strict=True):
            store.path(digest).write_bytes(one)
    return before[0]


@pytest.mark.parametrize(("count", "width"), [(40, 2), (5000, 1)])
def test_a_lineage_of_many_generations_takes_each_record_once(store, count, width, monkeypatch):
    youngest = generations(store, count, width)
    read = []
    monkeypatch.setattr(Store, "read", lambda self, digest, _read=Store.read: read.append(digest) or _read(self, digest))
    found = list(lineage(store, youngest))
    assert len(read) == len(set(read)) == (count - 1) * width + 1
    assert len(found) == 1 + width + (count - 2) * width**2  # each naming of a record
    assert max(depth for depth, _ in found) == count - 1


def test_a_deep_lineage_is_shown_and_drawn(store):
    youngest = generations(store, 1500, 1)
    shown = page.show(youngest, store)
    assert len(str(shown)) < 200_000
    drawn = tuple(Ancestor(depth=line.depth, kind=line.record.kind, digest=line.record.digest) for line in shown.lines)
    assert html(Report(title="deep", lineage=drawn)).count('class="kind"') == 1500


def test_files_that_name_one_another_are_no_lineage(store):
    """No record can hold its own digest, so one of the files lies about its content."""
    older = Comparison(controls=("b" * 64,), holdout="h", rows=())
    younger = Comparison(controls=(older.digest,), holdout="h", rows=())
    store.add(older)
    store.path("b" * 64).write_bytes(canonical(younger))
    store.add(younger)
    with pytest.raises(Damaged, match="does not match"):
        list(lineage(store, younger.digest))


# ---- engine


def double(item, progress):
    progress("double", item, 3, "items")
    return 2 * item, os.getpid()


def fail(item, progress):
    raise BadRecord(f"item {item} is bad")


def die(item, progress):
    os._exit(9)


def test_a_killed_worker_is_an_error_with_a_cure():
    with pytest.raises(DoesNotFit, match="--workers"):
        engine.run(die, [1, 2, 3], workers=2)


def test_tasks_run_in_order_here_and_elsewhere():
    here = engine.run(double, [1, 2, 3])
    assert [value for value, _ in here] == [2, 4, 6]
    assert {pid for _, pid in here} == {os.getpid()}
    there = engine.run(double, [1, 2, 3], workers=2)
    assert [value for value, _ in there] == [2, 4, 6]
    assert os.getpid() not in {pid for _, pid in there}


def find_device(item, progress):
    return os.environ["CUDA_VISIBLE_DEVICES"], engine.named_device()


def test_side_by_side_each_worker_has_one_device(monkeypatch):
    """Of those that the call names, whatever the environment does."""
    monkeypatch.setenv("ELMWOOD_DEVICE", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert engine.gpus() == []

    @engine.placed
    def run(inputs, *, device):
        assert engine.gpus() == ["3", "5"]
        return engine.run(find_device, inputs, workers=2, gpu=True)

    assert set(run([1, 2, 3], device="cuda")) <= {("3", "cuda"), ("5", "cuda")}
    assert run([1], device="cuda") == [("3, 5", "cuda")]
    monkeypatch.setenv("ELMWOOD_DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert engine.gpus() == []


def test_the_first_error_is_raised_as_itself():
    for workers in (1, 2):
        with pytest.raises(BadRecord, match="is bad"):
            engine.run(fail, [1, 2, 3], workers=workers)


def test_progress_of_other_processes_arrives():
    seen = []
    engine.run(double, [1, 2, 3], workers=2, progress=lambda *event: seen.append(event))
    assert set(seen) == {("double", 1, 3, "items"), ("double", 2, 3, "items"), ("double", 3, 3, "items")}


def test_a_finished_file_is_taken_without_a_copy(store, tmp_path):
    """By what it holds, whether its digest is known or not; a second one like it goes."""
    content = b"summed" * 1000
    for known in (None, hashlib.sha256(content).hexdigest()):
        path = store.work("key") / "out"
        path.write_bytes(content)
        number = path.stat().st_ino
        digest = store.take(path, known)
        assert digest == "sha256:" + hashlib.sha256(content).hexdigest()
        assert not path.exists()
        assert store.get(digest).read_bytes() == content
        assert known or store.get(digest).stat().st_ino == number
    assert not list(verify(store))


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes(tmp_path):
    store = Store(tmp_path / "store")
    left = store.root / "blobs" / "sha256" / "ab" / "tmpabcdefgh.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a bl")
    store.put(b"a blob")
    assert not left.exists()
