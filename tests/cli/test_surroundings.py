"""What the system refuses is one line with rule, value and cure; the same command works once it is allowed."""

import json
import os
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_models import WORDS, full_expert

from elmwood.records import Expert
from elmwood.store.verify import verify

NOBODY = 65534


@pytest.fixture(scope="module")
def full(store, seed):
    """A store with experts and a text."""
    store.name("seed", seed.digest)
    for number in range(2):
        store.name(f"full/{number}", full_expert(seed, store, number).digest)
    (store.root / "text.jsonl").write_text("".join(json.dumps({"text": f"{WORDS} {n} " * 9}) + "\n" for n in range(60)))
    return store


@contextmanager
def file_size(most):
    """A real limit on the size of files. Python ignores the signal, so writing fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_the_size_of_files(full, run, tmp_path):
    text = full.root / "text.jsonl"
    verbs = [
        ("merge", "full/", "--method", "ties"), ("state", "make", "full/0", "--method", "ties"), ("export", "full/0", tmp_path / "out"),
        ("cluster", text, "--domains", "2"), ("seed", "train", text, "--tokens", "64", "--layers", "1", "--width", "32", "--length", "32",
                                              "--vocabulary", "300", "--batch", "1"),
    ]  # fmt: skip
    for words in verbs:
        with file_size(3000):
            code, err = run(*words, "--store", full.root)
        assert code == 1, words
        assert err.splitlines()[-1].startswith("elmwood: a file would be larger than the limit on file sizes"), (words, err)
        assert "Traceback" not in err
    assert not [one for one in verify(full) if not one.elsewhere]
    assert run(*verbs[0], "--store", full.root)[0] == 0
    assert run(*verbs[2], "--store", full.root)[0] == 0


def test_a_store_that_is_a_file(full, run, tmp_path):
    place = tmp_path / "file"
    place.write_text("mine")
    for words in (("show",), ("show", "x"), ("verify",), ("cluster", full.root / "text.jsonl"), ("merge", "a", "b"), ("chat", "x")):
        for where in (place, place / "below"):
            code, err = run(*words, "--store", where)
            assert "Traceback" not in err
            assert code or words == ("show",), words
            assert not code or err.splitlines()[-1].startswith("elmwood: "), err
    assert place.read_text() == "mine"


@contextmanager
def permissions_hold():
    """Root may write anywhere; a test that runs as root does this as somebody else."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_store_that_may_not_be_written(full, run):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        store = Path(folder) / "store"
        shutil.copytree(full.root, store, symlinks=True)
        for path in (store, *store.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o555 if path.is_dir() else 0o444)
        with permissions_hold():
            for words in (
                ("merge", "full/", "--method", "average"),
                ("cluster", store / "text.jsonl"),
                ("export", "full/0", store / "out"),
            ):
                code, err = run(*words, "--store", store)
                assert (code, err.splitlines()[-1][:27]) == (1, "elmwood: permission denied "), (words, err)
            assert run("show", "full/0", "--store", store)[0] == 0
        for path in (store, *store.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)


def test_no_folder_for_temporary_files(full, run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))  # as TMPDIR once it was removed
    monkeypatch.delenv("HOME")
    assert isinstance(full.load("full/0"), Expert)
    code, err = run("cluster", full.root / "text.jsonl", "--domains", "2", "--store", full.root)
    assert "Traceback" not in err
    assert code == 0 or "TMPDIR" in err.splitlines()[-1], err
