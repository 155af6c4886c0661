"""Packages by name, downloaded with the clients and registries that the user has configured, and unpacked without installing them."""

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path


def run(command: Sequence[str], folder: Path) -> str:
    """What a command prints. Raises CalledProcessError."""
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def fetch_debian(package: str, folder: Path) -> tuple[Path, str]:
    """A Debian package: the archive, and its version. Unpacks into `unpacked`; needs apt-get and dpkg, no root."""
    run(["apt-get", "download", "-q", package], folder)
    (archive,) = folder.glob("*.deb")
    version = run(["dpkg-deb", "-f", archive.name, "Version"], folder).strip()
    run(["dpkg", "-x", archive.name, "unpacked"], folder)
    return archive, version


def fetch_python(package: str, folder: Path) -> tuple[Path, str]:
    run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", package], folder)
    archive = next(path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".zip"))
    version = re.sub(r"\.tar\.gz$|\.zip$", "", archive.name).split("-")[1]
    if archive.suffix == ".gz":
        with tarfile.open(archive) as file:
            file.extractall(folder / "unpacked", filter="data")
    else:
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder / "unpacked")
    return archive, version


def fetch_node(package: str, folder: Path) -> tuple[Path, str]:
    archive = folder / run(["npm", "pack", "-s", package], folder).split()[-1]
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    return archive, json.loads((folder / "unpacked" / "package" / "package.json").read_text())["version"]


CLIENTS: dict[str, Callable[[str, Path], tuple[Path, str]]] = {"apt": fetch_debian, "pip": fetch_python, "npm": fetch_node}


def fetch(client: str, package: str, cache: Path) -> tuple[Path, str]:
    """The folder of an unpacked package, and its version; a package that is in the cache is not downloaded again."""
    folder = cache / client / re.sub(r"[^\w.+-]", "_", package)
    done = folder / ".version"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.*"):  # of an interrupted download
            if left.is_file():
                left.unlink()
        archive, version = CLIENTS[client](package, folder)
        archive.unlink()
        done.write_text(version)
    return folder / "unpacked", done.read_text()
