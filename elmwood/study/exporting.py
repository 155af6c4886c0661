"""Folders that other tools read, and what a store holds: export, and a check of every digest."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.records import Expert, Merged, Mixture, Partition, Record, Seed, State, Statistics, fingerprint
from elmwood.store import AnyStore, Store, hash_file
from elmwood.store.verify import Damage
from elmwood.store.verify import verify as check_store
from elmwood.study.trial import check_use, why_no_gguf


def export(
    record: Record | str, folder: Path | str, *, format: str | None = None, dtype: str | None = None, store: AnyStore = None,
    progress: Progress = silent,
) -> Path:  # fmt: skip
    """Write a new folder that other tools read, and return it. A folder that the same export wrote before is left as it is.

    `format`: transformers, peft, gguf or gguf-adapter; parquet for a partition's text; by default as the record is. `dtype`: of a GGUF
    file's matrices. Raises BadInput, Damaged, MissingExtra.
    """
    store, target = Store(store), Path(folder)
    found = store.load(record)
    if isinstance(found, Expert | Merged) and "adapter_config.json" in found.files and format in ("transformers", "gguf"):  # it is folded
        seed = store.load(found.seed, Seed)
        check_use(seed, "merge")
        if format == "gguf" and (reason := why_no_gguf(seed, store)):
            raise BadInput(reason)
    key = fingerprint("export", found.digest, format, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with store.held(key, progress):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            if not _finished(target, key, store):
                raise BadInput(f"{target} is not empty: an export never overwrites; name a new folder")
            return target
        with _building(target, key, store) as building:
            _write(found, store, building, format, dtype, progress)
            about = "_elmwood.json" if format == "parquet" else "elmwood.json"  # readers of data sets skip names that begin with _
            (building / about).write_bytes(store.get(found.digest).read_bytes())
            store.log(key, folder=str(target.resolve()), content=_content(building))
            os.replace(building, target)
    return target


@contextmanager
def _building(target: Path, key: str, store: Store) -> Iterator[Path]:
    """A new hidden folder beside the target, removed if it is not moved away. Those of exports that were killed go first: they are called
    as it is, and the log names them, so no folder of the user's is taken for one."""
    logged = {line.get("building") for line in store.logged(key)}
    for left in target.parent.resolve().glob(f".{glob.escape(target.name)}.????????"):
        if str(left) in logged:
            shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    store.log(key, building=str(building.resolve()))
    building.chmod(0o755)
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _finished(folder: Path, key: str, store: Store) -> bool:
    """Whether this export wrote this folder, and it still holds the same files."""
    written = [line["content"] for line in store.logged(key) if line.get("folder") == str(folder.resolve())]
    return bool(written) and folder.is_dir() and _content(folder) in written


def _content(folder: Path) -> str:
    """A digest of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return fingerprint({path.relative_to(folder).as_posix(): hash_file(path) for path in files})


def _write(record: Record, store: Store, building: Path, form: str | None, dtype: str | None, progress: Progress) -> None:
    match record:
        case Seed() | Expert() | Merged() | Mixture():
            from elmwood.merge.export.folder import export as export_model  # numpy, and torch to look at what was written

            export_model(record, store, building, form, dtype and dtype.upper(), progress)
        case Partition() if form == "parquet" and not dtype:
            from elmwood.domains.publish import text_files  # scikit-learn

            _copy(store.folder(text_files(record, store)), building)
        case State() | Statistics() | Partition() if form or dtype:
            raise BadInput("--format and --dtype are for models, and --format parquet for the text of a partition: leave them out")
        case State() | Statistics():
            _copy(store.folder(record.files), building)
        case Partition():
            from elmwood.domains.publish import files_without_text, write_records  # scikit-learn

            _copy(store.folder(files_without_text(record, store)), building)
            write_records(record, store, building)
        case _:
            raise BadInput(
                f"a {record.kind} is no folder: export its seed, partition or experts (`elmwood show {record.digest[:8]}` lists them)"
            )


def _copy(source: Path, target: Path) -> None:
    """Copy a folder. The targets of its links come out as plain files."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def verify(*, store: AnyStore = None, progress: Progress = silent) -> list[Damage]:
    """Check every digest and every reference; return what is damaged, or absent because it stayed with its owner. Raises BadInput."""
    store = Store(store)
    if not any((store.root / name).is_dir() for name in ("records", "blobs", "refs")):
        raise BadInput(f"there is no store at {store.root}: name one with --store, or begin with `elmwood demo`")
    return list(check_store(store, lambda done, total: progress("verify", done, total, "B")))
