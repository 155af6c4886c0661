"""A small store with everything in it: the commands that make it, and a process that forks to run them without a new import of torch."""

import json
import os
import runpy
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

WORDS = {
    "sea": "ship sail wave harbour captain tide anchor storm fish island deck rope gull salt north wind",
    "bread": "flour yeast oven dough crust salt water knead loaf bake rise grain butter slice warm table",
}
SMALL = ("--tokens", "256", "--batch", "2", "--length", "32", "--workers", "1")
LOOK = ("--documents", "8")
# name -> the words of a command; each needs those before it
COMMANDS: dict[str, tuple[str, ...]] = {
    "seed": ("seed", "train", "text.jsonl", "--tokens", "512", "--layers", "1", "--width", "32", "--vocabulary", "300", "--length", "64",
             "--batch", "2", "--name", "seed"),
    "cluster": ("cluster", "text.jsonl", "--domains", "2", "--name", "p"),
    "train": ("train", "p", "--seed", "seed", "--method", "lora", "--rank", "2", *SMALL, "--name", "low"),
    "full": ("train", "p", "--seed", "seed", "--method", "full", *SMALL, "--statistics", "--name", "full"),
    "forest": ("forest", "p", "low/", "--name", "forest"),
    "eval": ("eval", "forest", "--workers", "1", *LOOK, "--name", "ensemble"),
    "table": ("table", "forest", "--workers", "1", *LOOK),
    "merge": ("merge", "full/", "--method", "ties", "--name", "merged"),
    "adapters": ("merge", "low/", "--method", "svd", "--rank", "2", "--name", "merged-low"),
    "state": ("state", "make", "full/0", "--method", "ties", "--name", "state"),
    "mix": ("mix", "forest", "--gates", "random", "--name", "mixture"),
    "tune": ("train", "mixture", "--method", "router", "--tokens", "128", "--batch", "2", "--length", "32", "--name", "tuned"),
    "accept": ("accept", "low/0", "forest"),
    "compare": ("compare", "low/0", "low/1"),
    "export": ("export", "merged", "out/merged"),
    "export-seed": ("export", "seed", "out/seed"),
    "export-adapter": ("export", "low/0", "out/low"),
    "export-partition": ("export", "p", "out/p"),
    "export-state": ("export", "state", "out/state"),
    "import": ("seed", "import", "out/seed", "--name", "imported"),
    "adopt": ("adopt", "out/low", "--seed", "seed", "--name", "adopted"),
    "demo": ("demo", "--corpus", "text.jsonl", "--seed", "seed", "--domains", "2", "--tokens", "1k", "--workers", "1"),
}  # fmt: skip
REFUSED = {"accept"}  # commands whose exit code says no, which is an answer too


def write_text(folder: Path, documents: int = 48) -> None:
    """text.jsonl: documents on two subjects; and a store with a secret."""
    rng = Random(0)
    rows = [{"text": " ".join(rng.choices(WORDS[rng.choice(sorted(WORDS))].split(), k=60)) + f" {number}"} for number in range(documents)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "store").mkdir()
    (folder / "store" / "secret").write_bytes(bytes(32))  # else the ledger of `accept` has a key of its own in every store


def warm() -> None:
    """Import what the commands import, so that a fork has it. Nothing is computed here: threads do not survive a fork."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import peft
    import sklearn.cluster
    import sklearn.decomposition
    import transformers.models.llama.modeling_llama  # noqa: F401

    import elmwood.ensemble.mixture
    import elmwood.merge.export.folder
    import elmwood.study.demo
    import elmwood.study.mixing
    import elmwood.train.adopt
    import elmwood.train.router
    import elmwood.train.statistics
    import elmwood.train.tasks
    import elmwood.train.together  # noqa: F401

    assert peft
    assert sklearn


def start(words: tuple[str, ...], folder: Path) -> int:
    """Run a command in a fork, in this folder, with its store beside it; the process id. What it prints is added to log.txt."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["elmwood", *words]
        os.environ["ELMWOOD_STORE"] = "store"
        code = 0
        try:
            runpy.run_module("elmwood", run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a process: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make(folder: Path, names: list[str] | None = None) -> dict[str, float]:
    """Make the world in a folder; seconds that each command took."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder)
    took = {}
    for name in names or COMMANDS:
        began = time.perf_counter()
        code = finish(start(COMMANDS[name], folder))
        took[name] = time.perf_counter() - began
        if code and not (code == 1 and name in REFUSED):
            raise SystemExit(f"{name} ended with {code}:\n{(folder / 'log.txt').read_text()[-2000:]}")
    return took
