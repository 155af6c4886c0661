"""Files of strangers, changed at random, given to every reader: no crash, no hang, no memory, nothing touched or run outside the store.

    python -m benches.faults.fuzz --inputs 20000 --minutes 10
    python -m benches.faults.fuzz --only 1234

Input N is made from the number N alone, so a failure can be made again. Failures are kept in --keep. Exit code 1 if there was one.
"""

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from benches.common import parser, say
from benches.faults import world
from benches.faults.mutations import SECRET, change

HANG = 1.0  # CPU seconds for one input
STUCK = 60.0  # seconds of wall clock, for one that does not even take signals: a busy machine is slow
MEMORY = 1 << 30  # bytes more than before an input
SPACE = 8 << 30  # of addresses, beyond which an allocation fails
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {f"os.{one}" for one in ("rename", "remove", "mkdir", "rmdir", "link", "symlink", "truncate", "chmod", "chown")} | {
    "shutil.rmtree"
}
TWO = {"os.rename", "os.link"}  # paths
NEVER = {"socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
         "pickle.find_class", "ctypes.dlopen", "webbrowser.open"}  # fmt: skip


UNLINKED = {"partition", "state"}  # readers of folders that follow no links; a hub's own folders of a model are links


class Hang(BaseException):
    """An input took too long."""


class Watch:
    """What Python says it does (sys.addaudithook), held against what a reader may do. A hook cannot be removed: this is a fork's."""

    def __init__(self, folder: Path):
        self.inside, self.secret, self.found, self.on = os.path.realpath(folder), Path(SECRET).name, [], False
        self.code = [os.path.realpath(place) for place in (*sys.path, sys.prefix, sys.base_prefix) if place]
        sys.addaudithook(self.hear)

    def hear(self, event: str, given: tuple) -> None:
        if not self.on:
            return
        self.on = False
        try:
            if event in NEVER and not (event == "ctypes.dlopen" and self.known(str(given[0]))):
                self.found.append(f"{event} {given!r}"[:200])
            elif event == "open" and isinstance(given[0], str | bytes):
                path = os.path.realpath(os.fsdecode(given[0]))
                if path.endswith(self.secret) or ((given[2] or 0) & WRITES and not self.allowed(path)):
                    self.found.append(f"open {path} {given[1:]!r}")
            elif event in CHANGES:
                places = given[1:2] if event == "os.symlink" else given[: 2 if event in TWO else 1]
                if not all(self.allowed(os.path.abspath(os.fsdecode(one))) for one in places if isinstance(one, str | bytes)):
                    self.found.append(f"{event} {given!r}"[:200])
            elif event == "exec" and not self.known(given[0].co_filename):
                self.found.append(f"code of {given[0].co_filename}")
        finally:
            self.on = True

    def allowed(self, path: str) -> bool:
        return path.startswith((self.inside, "/dev/", "/proc/self/"))

    def known(self, file: str) -> bool:
        return file.startswith("<") or any(os.path.realpath(file).startswith(place) for place in self.code)


def make_input(number: int, right: Path, folder: Path, shares: list[str]) -> tuple[str, Path]:
    """The reader that input N is for, and the changed file in this new folder."""
    from benches.faults.readers import READERS

    rng = Random(number)
    name = rng.choice(shares)
    shutil.copytree(right / name, folder)
    files = sorted(path for path in folder.rglob(READERS[name].files) if path.is_file())
    file = rng.choice(files)
    odd = rng.random()
    data = file.read_bytes()
    if odd > 0.01:
        file.write_bytes(change(data, rng, file.name))
        return name, file
    file.unlink()
    if odd < 0.002:
        file.mkdir()
    elif odd < 0.004:
        file.symlink_to("nowhere")
    elif odd < 0.006:
        file.symlink_to(SECRET if name in UNLINKED else "nowhere")
    elif odd < 0.008:
        file.write_bytes(b"")
    else:
        file.write_bytes(rng.randbytes(len(data) % 5000))
    return name, file


def try_input(number: int, right: Path, place: Path, store: Any, shares: list[str], watch: Watch) -> tuple[str, str]:
    """The reader, and what went wrong with one input; empty: nothing."""
    from benches.faults.readers import READERS
    from elmwood.errors import ElmwoodError

    folder = place / "input"
    shutil.rmtree(folder, ignore_errors=True)
    name, file = make_input(number, right, folder, shares)
    before, problem = _memory(), ""
    watch.found.clear()
    signal.setitimer(signal.ITIMER_PROF, HANG)
    watch.on = True
    try:
        READERS[name].read(folder, file, store)
    except ElmwoodError as error:
        problem = f"a message of {len(str(error))} letters" if len(str(error)) > 4000 else ""
    except Hang:
        problem = "hang: " + traceback.format_exc()[-1500:]
    except FileNotFoundError as error:
        problem = "" if file.is_symlink() or not file.is_file() else f"crash: {error}"
    except (OSError, Exception) as error:
        problem = "" if isinstance(error, IsADirectoryError) and file.is_dir() else f"crash: {traceback.format_exc()[-1500:]}"
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
    if watch.found:
        problem = f"outside: {watch.found[0]}"
    if (grown := _memory() - before) > MEMORY:
        problem = f"memory: {grown >> 20} MiB"
    return name, problem


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(first: int, step: int, asked: Any, base: Path, out: int, until: float) -> None:
    """In a fork: try every step-th input from `first`, and write a line for each."""
    import numba

    from benches.faults.readers import READERS
    from elmwood.store import Store

    place = base / f"worker-{first % step}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(place)
    os.environ["HOME"] = str(place)
    os.chdir(place)
    numba.config.DISABLE_JIT = True  # to compile for a new dtype takes longer than an input may, and writes into a cache
    shutil.copytree(base / "world" / "store", place / "store", symlinks=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries warn

    def stop(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (_addresses() + SPACE, resource.RLIM_INFINITY))
    shares, watch = [name for name, one in READERS.items() for _ in range(one.share)], Watch(place)
    for number in range(first, asked.inputs, step):
        if time.time() > until:
            break
        os.write(out, (json.dumps({"begin": number, "worker": first % step}) + "\n").encode())
        name, problem = try_input(number, base / "right", place, Store(place / "store"), shares, watch)
        os.write(out, (json.dumps({"number": number, "worker": first % step, "reader": name, "problem": problem}) + "\n").encode())
        if problem:
            shutil.copytree(place / "input", Path(asked.keep) / str(number), symlinks=True, dirs_exist_ok=True)
    os._exit(0)


def _addresses() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with size and time."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def run(asked: Any, base: Path) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Inputs by reader, and failures."""
    until, counted, failed = time.time() + 60 * asked.minutes, Counter(), []
    into, out = os.pipe()
    os.set_blocking(into, False)
    at: dict[int, tuple[int, float]] = {}
    pids: dict[int, int] = {}

    def begin(worker: int, first: int) -> None:
        if (pid := os.fork()) == 0:
            work(first, asked.workers, asked, base, out, until)
        pids[pid], at[worker] = worker, (first, time.time())

    for worker in range(asked.workers):
        begin(worker, asked.first + worker)
    rest = b""
    while pids:
        time.sleep(0.2)
        for pid, worker in list(pids.items()):
            number, since = at[worker]
            if time.time() - since > STUCK:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            rest = _take(into, rest, at, counted, failed)
            if ended:
                del pids[pid]
                if code := os.waitstatus_to_exitcode(status):
                    number = at[worker][0]
                    failed.append({"number": number, "reader": "", "problem": f"the process ended with {code}"})
                    begin(worker, number + asked.workers)
    return counted, failed


def _take(into: int, rest: bytes, at: dict[int, tuple[int, float]], counted: Counter[str], failed: list[dict[str, Any]]) -> bytes:
    """Read the lines of the workers; what is left of the last one."""
    try:
        while more := os.read(into, 1 << 16):
            rest += more
    except BlockingIOError:
        pass
    *whole, rest = rest.split(b"\n")
    for line in map(json.loads, whole):
        if "begin" in line:
            at[line["worker"]] = line["begin"], time.time()
            continue
        counted[line["reader"]] += 1
        if line["problem"]:
            failed.append(line)
            say("fuzz", **line)
    return rest


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--inputs", type=int, default=20_000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--only", type=int, help="try this input alone, in this process")
    options.add_argument("--keep", default="fuzz-failures", help="folder for the files of inputs that failed")
    options.add_argument("--world", help="folder of a world that is there, or is made; default: a temporary one")
    asked = options.parse_args()
    world.warm()
    asked.keep = os.path.abspath(asked.keep)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        made = Path(asked.world) if asked.world else base / "made"
        if not (made / "out").is_dir():
            world.make(made)
        shutil.copytree(made, base / "world", symlinks=True)
        import benches.faults.readers as readers

        readers.lay_out(base / "world", base / "right")
        for outside in (base / "outside", base / "worker-0" / "outside"):
            outside.mkdir(parents=True)
            (outside / "secret").write_text("secret")
        if asked.only is not None:
            asked.first, asked.inputs, asked.workers = asked.only, asked.only + 1, 1
        watched = [base / name for name in ("outside", "right", "world")]
        before, began = [snapshot(one) for one in watched], time.perf_counter()
        counted, failed = run(asked, base)
        for one, then in zip(watched, before, strict=True):
            if changed := {path for path, _ in set(then.items()) ^ set(snapshot(one).items())}:
                failed.append({"number": -1, "problem": f"outside: {sorted(changed)[:5]}"})
                say("fuzz", **failed[-1])
    kinds = Counter(str(one["problem"]).partition(":")[0] for one in failed)
    say("fuzz", inputs=sum(counted.values()), by_reader=dict(counted), failures=len(failed), kinds=dict(kinds),
        seconds=time.perf_counter() - began)  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
