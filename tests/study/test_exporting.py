"""Folders written by export: found again, and nothing of the user's deleted."""

import os

import pytest
from tiny_models import tiny_seed

from elmwood.errors import BadInput
from elmwood.store import Store
from elmwood.study import exporting
from elmwood.study.exporting import export, verify


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "store")
    store.name("seed", tiny_seed(store).digest)
    return store


def test_the_same_export_finds_its_folder_again(store, tmp_path):
    folder = export("seed", tmp_path / "out", store=store)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert export("seed", tmp_path / "out", store=store) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"store", "out"}
    assert not verify(store=store)


def test_an_export_that_was_changed_or_differs_is_refused(store, tmp_path):
    export("seed", tmp_path / "out", store=store)
    with pytest.raises(BadInput, match="never overwrites"):
        export("seed", tmp_path / "out", format="transformers", store=store)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="never overwrites"):
        export("seed", tmp_path / "out", store=store)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_file_or_folder_of_the_user_stays(store, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    export("seed", tmp_path / "out", store=store)
    assert (tmp_path / "out.partial" / "mine").read_text() == "mine"
    with pytest.raises(BadInput, match="never overwrites"):
        export("seed", tmp_path / "file", store=store)
    with pytest.raises(BadInput, match="no format"):
        export("seed", tmp_path / "other", format="onnx", store=store)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "out", "out.partial", "file"}


def test_a_folder_that_a_killed_export_left_is_removed_by_the_next_and_no_other(store, tmp_path, monkeypatch):
    """The process ends while it builds: nothing is cleaned up."""
    seed, target = tiny_seed(store), tmp_path / "out" / "seed"
    mine = tmp_path / "out" / ".seed.abcdefgh"
    mine.mkdir(parents=True)
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(exporting, "_write", lambda *_: os._exit(9))
        exporting.export(seed, target, store=store)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert len(list(target.parent.iterdir())) == 2
    exporting.export(seed, target, store=store)
    assert set(target.parent.iterdir()) == {target, mine}
    assert not list((store.root / "work").iterdir())
