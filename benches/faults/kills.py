"""Commands killed with -9 at random moments, then run to the end; and two processes of one command at once.

    python -m benches.faults.kills --kills 200 --races 16

After each: the store is clean, every record, name and exported file is that of an undisturbed run, no temporary file is left. A parent that
has imported everything forks the commands, so that a kill costs what the command costs. Exit code 1 if anything failed.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from benches.common import parser, say
from benches.faults import world
from elmwood.store import Store, hash_file
from elmwood.store.verify import verify

ANEW = {"accept"}  # commands that do their work again when they are run again
BEGUN = 1.0  # seconds until a command has looked at what is there
UNWRITTEN = {"table"}  # commands that are killed and write nothing that is looked at


def state_of(folder: Path) -> dict[str, Any]:
    """What a run leaves: records, names, exported files by digest."""
    store = Store(folder / "store")
    files = {str(path.relative_to(folder)): hash_file(path) for path in (folder / "out").rglob("*") if path.is_file()}
    return {"records": set(store.records()), "names": store.names(), "files": files}


def problems(folder: Path, code: int, wanted: tuple[int, dict[str, Any]]) -> list[str]:
    """What is wrong after a command was run to its end."""
    found = [f"{damage.where}: {damage.problem}" for damage in verify(Store(folder / "store")) if not damage.elsewhere]
    found += [f"left over: {path.relative_to(folder)}" for path in folder.rglob("tmp*") if path.name.removesuffix(".tmp")[3:].isascii()]
    found += [f"left over: {path.name}" for path in (folder / "out").glob(".*")]
    if code != wanted[0]:
        found.append(f"exit code {code}, not {wanted[0]}: {(folder / 'log.txt').read_text(errors='replace')[-600:]}")
    here = state_of(folder)
    for part, value in wanted[1].items():
        if here[part] != value:
            more = set(here[part]) ^ set(value) or {key for key in value if here[part][key] != value[key]}
            found.append(f"other {part}: {sorted(more)[:6]}")
    return found


class Stage:
    """A command with the world before it, what it leaves undisturbed, and how long it takes."""

    def __init__(self, name: str, before: Path, after: Path, code: int, took: float):
        self.name, self.before, self.wanted, self.took = name, before, (code, state_of(after)), took

    def copy(self, folder: Path) -> Path:
        """The world before the command, in a new folder."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.before, folder, symlinks=True)
        return folder


def stages(base: Path, names: list[str]) -> list[Stage]:
    """Make the world, and keep what there was before each of these commands."""
    at, found = base / "now", []
    at.mkdir(parents=True)
    world.write_text(at)
    for name, words in world.COMMANDS.items():
        before = base / f"before-{name}"
        if name in names:
            shutil.copytree(at, before, symlinks=True)
        began = time.perf_counter()
        code = world.finish(world.start(words, at))
        if code not in (0, 1) or (code and name not in world.REFUSED):
            raise SystemExit(f"{name} ended with {code}: {(at / 'log.txt').read_text()[-2000:]}")
        if name in names:
            found.append(Stage(name, before, at, code, time.perf_counter() - began))
    return found


def killed(stage: Stage, folder: Path, share: float) -> bool:
    """Start the command, and kill it after this share of its time; whether it was still running."""
    pid = world.start(world.COMMANDS[stage.name], folder)
    time.sleep(share * stage.took)
    os.kill(pid, signal.SIGKILL)
    return world.finish(pid) == -signal.SIGKILL


def kill(stage: Stage, folder: Path, rng: Random) -> tuple[dict[str, Any], list[str]]:
    """Kill the command once or twice in a row, then run it to its end."""
    stage.copy(folder)
    share, hit = rng.random(), False
    for _ in range(20):
        hit = killed(stage, folder, share)
        if hit:
            break
        stage.copy(folder)  # it was faster: sooner
        share *= 0.7
    code = world.finish(world.start(world.COMMANDS[stage.name], folder))
    return {"share": share, "hit": hit}, problems(folder, code, stage.wanted)


def race(stage: Stage, folder: Path, rng: Random, number: int) -> tuple[dict[str, Any], list[str]]:
    """Start the command twice, the second time after a share of its time."""
    share = number / 16 + rng.random() / 16
    while True:
        stage.copy(folder)
        first = world.start(world.COMMANDS[stage.name], folder)
        time.sleep((share % 1) * stage.took)
        second = world.start(world.COMMANDS[stage.name], folder)
        if stage.name not in ANEW or not _ended(first, BEGUN):
            break
        world.finish(first)
        world.finish(second)
        share *= 0.7  # the second may have begun after the first: no race, but another submission
    codes = world.finish(first), world.finish(second)
    found = problems(folder, codes[1], stage.wanted)
    if codes[0] != stage.wanted[0]:
        found.append(f"exit code of the first: {codes[0]}")
    return {"share": share}, found


def _ended(pid: int, after: float) -> bool:
    time.sleep(after)
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def work(found: list[Stage], base: Path, asked: Any, worker: int) -> bool:
    """One worker's share of kills and races; whether all went well."""
    rng, bad, counted = Random(asked.rng_seed * 1000 + worker), 0, Counter()
    jobs = [("kill", found[number % len(found)], number) for number in range(asked.kills)]
    jobs += [("race", stage, number) for number in range(asked.races) for stage in found]
    for kind, stage, number in jobs[worker :: asked.workers]:
        folder = base / f"try-{worker}"
        facts, wrong = kill(stage, folder, rng) if kind == "kill" else race(stage, folder, rng, number)
        counted[kind] += kind == "race" or facts["hit"]
        bad += bool(wrong)
        say("kills", kind=kind, command=stage.name, number=number, **facts, problems=wrong)
        if wrong and asked.keep:
            shutil.copytree(folder, Path(asked.keep) / f"{kind}-{stage.name}-{number}", symlinks=True, dirs_exist_ok=True)
    (base / f"counted-{worker}.json").write_text(json.dumps({**counted, "failures": bad}))
    return not bad


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--races", type=int, default=16, help="of each command")
    options.add_argument("--commands", help="only these, joined by commas")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--rng-seed", type=int, default=0)
    options.add_argument("--keep", help="folder for the stores of failures")
    asked = options.parse_args()
    names = asked.commands.split(",") if asked.commands else [name for name in world.COMMANDS if name not in UNWRITTEN]
    if unknown := set(names) - set(world.COMMANDS):
        options.error(f"no command {min(unknown)}; have {', '.join(world.COMMANDS)}")
    world.warm()
    with tempfile.TemporaryDirectory() as folder:
        base, began = Path(folder), time.perf_counter()
        found = stages(base, names)
        pids = []
        for worker in range(asked.workers):
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                os._exit(0 if work(found, base, asked, worker) else 1)
            pids.append(pid)
        codes = [world.finish(pid) for pid in pids]
        total: Counter[str] = Counter()
        for path in base.glob("counted-*.json"):
            total.update(json.loads(path.read_text()))
    say("kills", summary=dict(total), commands=len(found), seconds=time.perf_counter() - began)
    sys.exit(1 if any(codes) else 0)


if __name__ == "__main__":
    main()
