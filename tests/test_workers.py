"""Workers are copies of a process that has imported what they need, and nothing else."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

from elmwood import engine

SCRIPT = """
import json, os, sys
sys.path[:] = [path for path in sys.path if path] + [{tests!r}]
from test_workers import look
from elmwood import engine
engine.prepare("elmwood.corpus.build", "elmwood.corpus.dedup:compile_loops", "no_module_at_all")
os.environ["SINCE"] = "then"
os.environ.pop("BEFORE", None)
print(json.dumps(engine.run(look, [1, 2], workers=2)))
"""


def look(item, progress) -> dict:
    """What a worker is."""
    return {
        "process": type(multiprocessing.current_process()).__name__,
        "pid": os.getpid(),
        "folder": os.getcwd(),
        "heavy": sorted({"torch", "transformers", "sklearn", "pandas"} & set(sys.modules)),
        "ready": sorted({"numba", "elmwood.corpus.build"} & set(sys.modules)),
        "environment": sorted({"SINCE", "BEFORE", "PYTHONSAFEPATH", "ELMWOOD_AHEAD"} & set(os.environ)),
        "paths": os.environ.get("PYTHONPATH"),
    }


def test_workers_begin_with_what_was_prepared_and_without_torch(tmp_path, forked, monkeypatch):
    monkeypatch.setenv("BEFORE", "now")
    (tmp_path / "numpy.py").write_text("print('of the working folder')")
    done = forked(SCRIPT.format(tests=str(Path(__file__).parent)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {one["process"] for one in found} == {"ForkServerProcess" if sys.platform == "linux" else "SpawnProcess"}
    for one in found:
        assert one["folder"] == str(tmp_path)
        assert one["heavy"] == []
        assert one["ready"] == (["elmwood.corpus.build", "numba"] if sys.platform == "linux" else [])
        assert one["environment"] == ["SINCE"], "that of their parent now"
        assert one["paths"] == os.environ.get("PYTHONPATH")


def test_what_imported_torch_is_not_copied_where_there_is_more_than_the_cpu(monkeypatch):
    monkeypatch.setattr(engine, "_prepared", os.getpid())
    monkeypatch.setattr(engine, "_with_torch", True)
    monkeypatch.setattr(engine, "ACCELERATORS", ("null",))
    for device, method in (("cpu", "forkserver"), ("cuda", "spawn"), ("", "spawn")):
        monkeypatch.setenv("ELMWOOD_DEVICE", device)
        assert engine._method() == method
    monkeypatch.setattr(engine, "ACCELERATORS", ("no such device",))
    assert engine._method() == "forkserver"
    monkeypatch.setattr(engine, "_prepared", os.getppid())
    assert engine._method() == "spawn", "its parent has one, it has not"
