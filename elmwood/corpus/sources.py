"""Take sources apart, and find their files.

A source is one string:
    sample                           the corpus that comes with elmwood
    datasets:NAME[:CONFIG[:SPLIT]]   a data set of the `datasets` library, streamed; the split is `train` unless given
    FILE                             a file of one of the KINDS (kinds.py)
    FOLDER                           all files below it, hidden ones excepted; links only if they are to be followed
    s3://BUCKET/PATH and the like    files of any store that fsspec knows: one, a folder, or a pattern with *
    MODULE:FUNCTION:PATH             a file, or all files below a folder, read by an importer of your own
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from elmwood.errors import BadCorpus, MissingExtra

SAMPLE = Path(__file__).parent / "sample" / "sample-corpus.jsonl.xz"
STATES = {"state.json", "dataset_info.json", "dataset_dict.json"}  # beside the Arrow files that `Dataset.save_to_disk` writes
_URL = re.compile(r"[a-z][a-z0-9+.]*://")
_OWN = re.compile(r"([\w.]+:\w+):(.+)")  # module:function:path
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class Reason(str):
    """Why there is no document where one should be, or no documents in a file."""

    documents: int = 1  # how many it stands for
    place: str = ""  # where; shown, and kept for files only
    file: bool = False  # a whole file is left out

    @classmethod
    def of(cls, reason: str, place: str = "", *, documents: int = 1, file: bool = False) -> "Reason":
        made = cls(reason)
        made.place, made.documents, made.file = place, documents, file
        return made


class Source(NamedTuple):
    """A source, taken apart."""

    root: Path  # a file or a folder; without meaning for a data set
    importer: str = ""  # module:function; empty: by the kind of each file
    dataset: str = ""  # NAME[:CONFIG[:SPLIT]]
    url: str = ""  # of a file, a folder or a pattern in an object store

    @property
    def repeatable(self) -> bool:
        """Whether the documents depend on the bytes of the files alone, so that a corpus made of them before can be reused."""
        return not self.importer and not self.dataset

    def name(self, path: Path) -> str:
        """The name of one of its files: its path in the folder, or its file name. Bytes that are not UTF-8 are spelled out."""
        inside = path.relative_to(self.root).as_posix() if self.root.is_dir() else path.name
        return inside.encode(errors="surrogateescape").decode(errors="backslashreplace")


def parse_source(source: str) -> Source:
    """Take a source apart. Raises BadCorpus when it is empty."""
    if not source.strip():
        raise BadCorpus(f"a source has a name, and this is {source!r}: name a file or a folder; . is the current one")
    if source == "sample":
        return Source(SAMPLE)
    if source.startswith("datasets:"):
        name = source.removeprefix("datasets:")
        return Source(Path(name)) if name and _saved(Path(name)) else Source(Path(), dataset=name)
    if _URL.match(source) and not Path(source).exists():
        return Source(Path(), url=source)
    if (match := _OWN.fullmatch(source)) and not Path(source).exists():
        return Source(Path(match[2]), importer=match[1])
    return Source(Path(source))


def files(source: str, follow_links: bool = False) -> list[Path]:
    """The files of a source, sorted: none for a data set of the `datasets` library. Raises BadCorpus when it does not exist."""
    return sorted(path for path, reason in walk(source, follow_links) if not reason)


def walk(source: str, follow_links: bool = False) -> Iterator[tuple[Path, str]]:
    """The files of a source, and what is not read there, with the reason: links unless they are followed, pipes, sockets, devices.

    A source that is a link itself is followed, as it was named. Raises BadCorpus.
    """
    parsed = parse_source(source)
    path = parsed.root
    if parsed.dataset or parsed.url or source == "datasets:":
        return
    if path.is_dir():
        yield from _below(path, follow_links)
    elif path.is_file():
        yield path, ""
    else:
        found = _SPECIAL.get(stat.S_IFMT(path.stat().st_mode), "no file or folder") if path.exists() else "no such file or folder"
        raise BadCorpus(f"{source}: {found}; a corpus is a file, a folder, 'sample' or 'datasets:NAME'")


class Remote(NamedTuple):
    """A file in an object store."""

    url: str
    name: str  # its path below the folder of the source
    size: int
    version: str  # of its content, as the store says it; empty: it does not


def remote(url: str) -> list[Remote]:
    """The files of an object store, sorted. Raises BadCorpus, MissingExtra."""
    store, path = open_store(url)
    try:
        if store.isfile(path):
            paths, root = [path], path.rpartition("/")[0]
        else:
            paths = sorted(store.glob(path) if "*" in path else store.find(path))
            root = path.partition("*")[0].rpartition("/")[0] if "*" in path else path.rstrip("/")
        infos = [store.info(one) for one in paths]
    except Exception as error:  # each store has errors of its own
        raise BadCorpus(f"{url}: cannot be listed ({type(error).__name__}: {error}); check the address and your rights") from error
    found = []
    for info in infos:
        name = str(info["name"]).removeprefix(root).lstrip("/")
        version = next((str(info[key]) for key in ("ETag", "etag", "md5Hash", "content_md5", "sha256") if info.get(key)), "")
        if info.get("type") == "file" and not any(part.startswith(".") for part in name.split("/")):
            found.append(Remote(store.unstrip_protocol(info["name"]), name, int(info.get("size") or 0), version))
    if not found:
        raise BadCorpus(f"{url}: no such file, folder or pattern in this store; check the address")
    return found


def fetch(url: str, path: Path) -> None:
    """Copy a file of an object store. Raises BadCorpus, MissingExtra."""
    store, inside = open_store(url)
    try:
        store.get_file(inside, str(path))
    except Exception as error:
        raise BadCorpus(f"{url}: cannot be read ({type(error).__name__}: {error}); run the command again to resume") from error


def open_store(url: str) -> tuple[Any, str]:
    """The store of a URL, and the path in it. Raises BadCorpus, MissingExtra."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise MissingExtra(f"{url} needs a library of its store: {error}; elmwood[s3] has that of s3://") from error
    except ValueError as error:
        raise BadCorpus(f"{url}: no store of this kind ({error}); use s3://, gs://, https:// or another that fsspec knows") from error


def _below(root: Path, follow_links: bool) -> Iterator[tuple[Path, str]]:
    """All below a folder. A folder that links lead to twice is read once."""
    seen = set()
    for here, folders, names in os.walk(root, followlinks=follow_links, onerror=_refuse):
        folder = Path(here)
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = sorted(name for name in names if not name.startswith("."))
        if not follow_links:
            yield from ((folder / name, "a link, not followed") for name in folders if (folder / name).is_symlink())
        saved = _saved(folder)
        for path in (folder / name for name in visible if saved is None or name in saved):
            yield path, _odd(path, follow_links)


def _odd(path: Path, follow_links: bool) -> str:
    """Why this is not a file to read; empty if it is one."""
    if path.is_symlink() and not follow_links:
        return "a link, not followed"
    if not path.exists():
        return "a link to nothing"
    return "" if path.is_file() else _SPECIAL.get(stat.S_IFMT(path.stat().st_mode), "not a file")


def _saved(folder: Path) -> set[str] | None:
    """The Arrow files of a data set that `save_to_disk` wrote to this folder; None: the folder is not one."""
    if (folder / "dataset_dict.json").is_file():
        return set()  # its splits are folders
    try:
        if not (folder / "dataset_info.json").is_file() or (folder / "state.json").stat().st_size > 1 << 24:
            return None
        named = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return {str(one["filename"]) for one in named}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def _refuse(error: OSError) -> None:
    raise BadCorpus(f"{error.filename}: cannot be read ({error.strerror}); give read permission or leave it out") from error
