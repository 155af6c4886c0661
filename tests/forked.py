"""Processes that start at once: copies of one that has imported what takes seconds. They live and die as others do."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from subprocess import CompletedProcess

from elmwood import engine

# what the processes of the demo of a hub, and scripts of tests, import
AHEAD = (
    "elmwood.train.tasks", "elmwood.train.together", "elmwood.ensemble.mixture", "elmwood.lm.experts", "elmwood.merge.checkpoint",
    "elmwood.cli", "elmwood.hub.demo.roles", "elmwood.hub.app", "peft",
)  # fmt: skip


def prepare() -> None:
    """Begin the process that is copied, for scripts and for workers of the library: the first call of a test process counts."""
    engine.prepare(torch=AHEAD)


class Forked:
    """Call it with a script and its words. Warnings are errors in the script, as in every test."""

    def __call__(self, script: str, *words: str, cwd: Path, stdin: str = "") -> "CompletedProcess[str]":
        prepare()
        with tempfile.TemporaryDirectory() as scratch:
            files = {name: Path(scratch) / name for name in ("in", "out", "err", "script.py")}
            for name, text in (("in", stdin), ("script.py", script)):
                files[name].write_text(text)
            environment = {name: value for name, value in os.environ.items() if not name.startswith(("ELMWOOD_STORE", "PYTEST_"))}
            process = multiprocessing.get_context("forkserver").Process(target=run, args=(scratch, words, str(cwd), environment))
            with engine._begin():
                process.start()
            process.join()
            code = process.exitcode
            process.close()
            return CompletedProcess(words, code, files["out"].read_text(), files["err"].read_text())


def run(scratch: str, words: tuple[str, ...], folder: str, environment: dict[str, str]) -> None:
    """A script in this process, as in one of its own."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for name, number in (("in", 0), ("out", 1), ("err", 2)):
        os.dup2(os.open(f"{scratch}/{name}", os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = [f"{scratch}/script.py", *words]
    sys.path.insert(0, "")
    sys.warnoptions[:] = ["error"]
    warnings.simplefilter("error")
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
