"""A state folder from elsewhere: nothing of it enters the store before all of it was checked."""

import json
import os
import shutil

import pytest

from elmwood.errors import ElmwoodError
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.states import state
from elmwood.store import Store
from elmwood.study import merging
from elmwood.study.exporting import export

SUMS = "sums.safetensors"


@pytest.fixture(scope="module")
def sent(forest, tmp_path_factory):
    """An exported state, and its digest."""
    store, seed, experts = forest
    made = state(seed, {experts[0].digest: everywhere(1.0)}, "average", {}, store)
    return export(made, tmp_path_factory.mktemp("sent") / "state", store=store), made


def change_record(folder, **changed):
    path = folder / "elmwood.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changed))


def change_files(folder, *names):
    blob = json.loads((folder / "elmwood.json").read_bytes())["files"][SUMS]
    change_record(folder, files=dict.fromkeys(names, blob))


def replace_sums(folder, by):
    (folder / SUMS).unlink()
    by(folder / SUMS)


WRONG = {
    "lie in its own folder": lambda folder: change_files(folder, "../secret"),
    "names the file '/etc/passwd'": lambda folder: change_files(folder, "/etc/passwd"),
    "names the file '..'": lambda folder: change_files(folder, ".."),
    "names the file 'a/b'": lambda folder: change_files(folder, "a/b"),
    "names the file ''": lambda folder: change_files(folder, ""),
    "is missing": lambda folder: (folder / SUMS).unlink(),
    "no regular file": lambda folder: replace_sums(folder, lambda path: path.symlink_to("../secret")),
    "missing or no regular": lambda folder: replace_sums(folder, os.mkfifo),
    "header is damaged": lambda folder: os.truncate(folder / SUMS, (folder / SUMS).stat().st_size + (1 << 40)),
    "cut short|damaged": lambda folder: (folder / SUMS).write_bytes(b"\0" * 90),
    "not what its record says": lambda folder: (folder / SUMS).write_bytes((folder / SUMS).read_bytes()[:-1] + b"\x07"),
    "has the files": lambda folder: change_files(folder, SUMS, "more") or shutil.copy(folder / SUMS, folder / "more"),
    "names an expert twice": lambda folder: change_record(
        folder, contributions=json.loads((folder / "elmwood.json").read_bytes())["contributions"] * 2
    ),
    "stands there twice": lambda folder: (folder / "elmwood.json").write_bytes(b'{"kind":"state","kind":"state","format":1}'),
}


@pytest.mark.parametrize("complaint", WRONG)
def test_nothing_of_a_wrong_folder_enters_the_store(complaint, forest, sent, tmp_path):
    store, seed, _ = forest
    folder, home = tmp_path / "state", new_store(tmp_path / "home", store, seed)
    (tmp_path / "secret").write_text("secret")
    shutil.copytree(sent[0], folder)
    WRONG[complaint](folder)
    before = listing(home)
    with pytest.raises(ElmwoodError, match=complaint):
        merging.open_state(folder, home)
    assert listing(home) == before


def test_a_record_spelled_otherwise_is_stored_under_the_digest_of_what_is_written(forest, sent, tmp_path):
    store, seed, _ = forest
    folder, home = tmp_path / "state", new_store(tmp_path / "home", store, seed)
    shutil.copytree(sent[0], folder)
    record = json.loads((folder / "elmwood.json").read_bytes())
    (folder / "elmwood.json").write_text(json.dumps(record | {"part": [0, 1]}, indent=1))
    assert merging.open_state(folder, home).digest == sent[1].digest
    assert home.load(sent[1].digest) == sent[1]
    assert home.get(sent[1].files[SUMS]).read_bytes() == (folder / SUMS).read_bytes()


def new_store(root, store: Store, seed) -> Store:
    """A store that has the seed alone."""
    home = Store(root)
    for digest in seed.files.values():
        home.put(store.get(digest))
    home.add(seed)
    home.folder(seed.files)  # the view that reading it makes
    return home


def listing(store: Store) -> list[str]:
    return sorted(path.relative_to(store.root).as_posix() for path in store.root.rglob("*"))
