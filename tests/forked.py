"""Processes that start at once: a server has imported what takes seconds, and forks one for each script. They live and die as others do."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, CompletedProcess

SERVER = """
import atexit, gc, json, os, runpy, sys, traceback
gc.disable()
import elmwood.cli, elmwood.lm.experts, elmwood.train.together, elmwood.ensemble.mixture, elmwood.merge.checkpoint
gc.freeze()
gc.enable()

def run(job):
    os.chdir(job["folder"])
    for name, number in (("in", 0), ("out", 1), ("err", 2)):
        os.dup2(os.open(job["files"] + "/" + name, os.O_RDWR | os.O_CREAT), number)
    sys.stdin, sys.argv = open(0, closefd=False), [job["script"], *job["words"]]
    code = 1
    try:
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    process = os.fork()
    if not process:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Forked:
    """Call it with a script and its words. Warnings are errors in the script, as in every test."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None

    def __call__(self, script: str, *words: str, cwd: Path, stdin: str = "") -> "CompletedProcess[str]":
        if self.server is None:
            environment = {name: value for name, value in os.environ.items() if name != "ELMWOOD_STORE"}
            command = [sys.executable, "-W", "error", "-c", SERVER]
            self.server = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment)
        with tempfile.TemporaryDirectory() as scratch:
            files = {name: Path(scratch) / name for name in ("in", "out", "err", "script.py")}
            for name, text in (("in", stdin), ("script.py", script)):
                files[name].write_text(text)
            job = {"folder": str(cwd), "files": scratch, "script": str(files["script.py"]), "words": words}
            assert self.server.stdin
            assert self.server.stdout
            self.server.stdin.write(json.dumps(job) + "\n")
            self.server.stdin.flush()
            code = self.server.stdout.readline()
            return CompletedProcess(words, int(code), files["out"].read_text(), files["err"].read_text())

    def end(self) -> None:
        if self.server:
            self.server.communicate()
