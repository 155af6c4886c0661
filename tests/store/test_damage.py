"""Damaged, lost and left-over files: seen at their first use, healed by the command that made them, swept by the next."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from elmwood.errors import BadInput, BadRecord, Damaged
from elmwood.records import Contribution, Corpus, Expert, Recipe, Seed, Shard, State, canonical, fingerprint, parse
from elmwood.store import Store, disk, lineage
from elmwood.store.verify import verify
from elmwood.study import exporting


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def build(store, text=b"text") -> Corpus:
    """A task that is done once."""
    key = fingerprint("task", text.decode())
    with store.held(key):
        if done := store.done(key):
            return store.load(done, Corpus)
        shard = Shard(blob=store.put(text), documents=1, bytes=len(text))
        record = Corpus(train=(shard,), holdout=(), documents=1, bytes=len(text), holdout_share=0.1)
        store.finish(key, record)
        return record


def flip(path, keep_times=False):
    """Change a byte; the size stays."""
    data, about = path.read_bytes(), path.stat()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    if keep_times:
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def lose(path):
    path.unlink()


@pytest.mark.parametrize("harm", [flip, lose])
@pytest.mark.parametrize("what", ["blob", "record"])
def test_what_was_lost_or_changed_is_made_again_by_its_command(store, harm, what):
    record = build(store)
    harm(store.path(record.train[0].blob if what == "blob" else record.digest))
    assert build(store) == record
    assert store.get(record.train[0].blob).read_bytes() == b"text"
    assert not list(verify(store))


def test_a_change_that_kept_the_time_of_a_file_is_seen_at_its_use_and_then_healed(store):
    record = build(store)
    blob = store.path(record.train[0].blob)
    os.utime(blob, ns=(0, 0))
    assert store.done(fingerprint("task", "text"))
    flip(blob, keep_times=True)
    assert store.done(fingerprint("task", "text")), "nothing is hashed at the start"
    with pytest.raises(Damaged, match="does not match its digest"):
        store.get(record.train[0].blob)
    assert build(store) == record
    assert store.get(record.train[0].blob).read_bytes() == b"text"


@pytest.mark.parametrize("harm", [flip, lose])
def test_the_right_bytes_replace_a_damaged_blob(store, tmp_path, harm):
    digest = store.put(b"weights")
    for give in (b"weights", tmp_path / "file", store.work("key") / "file"):
        harm(store.path(digest))
        assert not store.whole(digest)
        if give == b"weights":
            store.put(give)
        else:
            give.write_bytes(b"weights")
            (store.take if give.is_relative_to(store.root) else store.put)(give)
        assert store.get(digest).read_bytes() == b"weights"


def test_a_blob_is_hashed_once_in_a_process(store, monkeypatch):
    digest = store.put(b"weights")
    os.utime(store.path(digest), ns=(0, 0))
    monkeypatch.setattr(disk, "SETTLED", -1)
    hashed = []
    monkeypatch.setattr(disk, "hash_file", lambda path, hash_file=disk.hash_file: hashed.append(path) or hash_file(path))
    for _ in range(3):
        assert Store(store.root).folder({"w": digest})
        assert store.get(digest)
    assert hashed == [store.path(digest)]


def test_a_view_is_links_to_its_blobs_and_nothing_else(store):
    files = {"a": store.put(b"a"), "sub/b": store.put(b"b")}
    view = store.folder(files)
    outside = store.root.parent / "outside"
    outside.write_bytes(b"other")

    def plain():
        (view / "a").unlink()
        (view / "a").write_bytes(b"other")

    def elsewhere():
        (view / "a").unlink()
        (view / "a").symlink_to(outside)

    def more():
        (view / "evil.py").write_bytes(b"other")

    def gone():
        (view / "a").unlink()

    for harm in (plain, elsewhere, more, gone):
        harm()
        assert store.folder(files) == view
        assert (view / "a").read_bytes() == b"a"
        assert {path.name for path in view.iterdir()} == {"a", "sub"}
    assert outside.read_bytes() == b"other"
    flip(store.path(files["sub/b"]))
    with pytest.raises(Damaged, match="does not match"):
        store.folder(files)


def test_a_record_of_another_spelling_is_not_kept_under_a_wrong_name(store):
    record = build(store)
    spelled = parse(canonical(record).replace(b",", b", "))
    with pytest.raises(BadRecord, match="spelled"):
        store.add(spelled)
    assert not list(verify(store))


KILLED = """
import os, signal, sys
from elmwood.store import Store
store = Store(sys.argv[1])
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # the bytes are written, the file has no name yet
store.put(b"x" * 1000)
"""
HOLDS = """
import os, sys
from elmwood.store import Store
def wait(handle):
    print("written", flush=True)
    sys.stdin.readline()
os.fsync, fsync = wait, os.fsync
try:
    print(Store(sys.argv[1]).put(b"live"), flush=True)
finally:
    os.fsync = fsync
"""


def left(store):
    return [path for path in store.root.rglob("*.tmp") if path.is_file()]


def test_left_over_files_are_swept_and_those_of_live_processes_are_not(store):
    subprocess.run([sys.executable, "-c", KILLED, str(store.root)])
    view = store.root / "views" / "tmpabcdefgh"
    view.mkdir(parents=True)
    mine = store.root / "blobs" / "notes.tmp"
    mine.write_text("mine")
    assert len(left(store)) == 2
    command = [sys.executable, "-c", HOLDS, str(store.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as live:
        assert live.stdout.readline() == "written\n"
        assert len(left(store)) == 2, "that of the killed process went when this one wrote"
        build(store)
        assert len(left(store)) == 2, "that of a live process stays"
        live.stdin.write("\n" * 9)
        live.stdin.flush()
        assert {line for line in live.stdout if line != "written\n"} == {f"sha256:{disk.hashlib.sha256(b'live').hexdigest()}\n"}
    assert left(store) == [mine]
    assert not view.exists()


def test_lock_files_are_removed_and_one_that_waited_takes_the_new_one(store):
    """Processes that come while another leaves never work at the same time."""
    at_work, most, done = [], [], []

    def work(_):
        for _ in range(20):
            with store.held("key"):
                at_work.append(1)
                most.append(len(at_work))
                done.append(1)
                at_work.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert (max(most), len(done)) == (1, 160)
    assert not list(store.root.glob("work/*.lock"))
    (store.root / "work" / "killed.lock").touch()
    assert [(one.where, one.elsewhere) for one in verify(store)] == [("work/killed.lock", True)]
    disk.sweep(store.temporary())
    assert not list(verify(store))


def fifo(path):
    os.mkfifo(path)


def test_a_check_names_everything_odd_and_goes_on(store):
    record = build(store)
    store.name("good", record.digest)
    view = store.folder({"a": record.train[0].blob})
    shard = store.path(record.train[0].blob).parent
    deep = b"[" * 200_000
    odd = {
        "refs/bytes": lambda path: path.write_bytes(b"\xff\xfe"),
        "refs/long": lambda path: path.write_text("a" * 5000),
        "refs/a b": lambda path: path.write_text(record.digest),
        "refs/pipe": fifo,
        "refs/dangling": lambda path: path.symlink_to("nowhere"),
        "refs/done/bytes": lambda path: path.write_bytes(b"\xff"),
        f"records/{disk.hashlib.sha256(deep).hexdigest()}.json": lambda path: path.write_bytes(deep),
        f"records/{disk.hashlib.sha256(KINDS).hexdigest()}.json": lambda path: path.write_bytes(KINDS),
        f"records/{'c' * 64}.json": lambda path: path.mkdir(),
        f"records/{'d' * 64}.json": fifo,
        f"records/{'e' * 64}.json": lambda path: path.symlink_to("nowhere"),
        "records/notes.txt": lambda path: path.write_text("mine"),
        "blobs/notes.txt": lambda path: path.write_text("mine"),
        f"blobs/sha256/{shard.name}/{'0' * 62}": fifo,
        f"blobs/sha256/{shard.name}/{'1' * 62}": lambda path: path.mkdir(),
        f"blobs/sha256/{shard.name}/{'2' * 62}": lambda path: path.symlink_to("/dev/zero"),
        f"blobs/sha256/{shard.name}/{'3' * 62}": lambda path: path.symlink_to(path),
        f"blobs/sha256/{shard.name}/{'4' * 62}": lambda path: path.symlink_to("nowhere"),
        "views/file": lambda path: path.write_text("mine"),
    }
    for where, make in odd.items():
        make(store.root / where)
    name = os.fsencode(store.root / "refs") + b"/\xff"
    with open(name, "w") as file:
        file.write(record.digest)
    assert {damage.where for damage in verify(store)} == {*odd, "refs/\\xff"}
    assert store.names() == {"good": record.digest}
    assert store.load("good") == record
    assert build(store) == record
    with pytest.raises(Damaged, match="holds no digest"):
        store.load("bytes")

    (view / "a").unlink()
    (view / "a").write_bytes(b"other")
    assert {damage.where for damage in verify(store)} - {*odd, "refs/\\xff"} == {view.relative_to(store.root).as_posix()}


KINDS = b'{"kind":[],"format":1}'


def seed(store) -> Seed:
    found = Seed(name="s", architecture="a", parameters=1, vocabulary=2, context=3, separator=0, files={})
    store.add(found)
    return found


def sum_of(store, *experts) -> State:
    rows = tuple(Contribution(expert=one, weight=(), whole=True, reach=1) for one in experts)
    return State(seed=seed(store).digest, method="ties", settings={}, contributions=rows, files={"sums": store.put(b"sums")})


def test_experts_of_a_received_sum_are_elsewhere_and_those_of_an_own_sum_are_missing(store):
    far, near = "f" * 64, store.add(Expert(seed=seed(store).digest, data=(), recipe=Recipe(steps=1), files={}))
    received = store.add(sum_of(store, far))
    both = sum_of(store, far, near)
    store.finish("sum", both)
    found = list(verify(store))
    assert {damage.where for damage in found} == {f"records/{one}.json" for one in (received, both.digest)}
    assert all(damage.elsewhere and "1 experts" in damage.problem for damage in found)
    assert len(list(lineage(store, both.digest))) == 4
    store.path(near).unlink()
    assert [damage.where for damage in verify(store) if not damage.elsewhere] == [f"records/{near}.json"]
    alone = sum_of(store, "e" * 64)
    store.finish("alone", alone)
    assert f"records/{'e' * 64}.json" in {damage.where for damage in verify(store) if not damage.elsewhere}


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for place in (tmp_path, tmp_path / "notes", tmp_path / "none", "/dev/null"):
        with pytest.raises(BadInput, match="no store"):
            exporting.verify(store=place)
