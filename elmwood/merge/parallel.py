"""A merge in parts, side by side: each task sums its share of every tensor's blocks, and no process ever holds the whole.

A part is a state, named by its inputs: what was finished before a worker was killed is found again, with the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from elmwood.engine import Progress, run, silent
from elmwood.errors import BadInput
from elmwood.merge.checkpoint import Answer, finalize
from elmwood.merge.rules.table import RULES, Rules, open_rules, settle
from elmwood.merge.states import state
from elmwood.records import Digest, Frozen, Merged, Seed, Share, State
from elmwood.store import Store


class StateJob(Frozen):
    """One part of a sum."""

    store: Path
    seed: Digest
    members: dict[Digest, tuple[Share, ...]]
    method: str
    settings: dict[str, float]
    part: tuple[int, int] = (0, 1)
    typed: tuple[str, ...] = ()  # rules of the user's own, 'module:function'


def make_state(job: StateJob, progress: Progress) -> Digest:
    """The digest of the State."""
    store = Store(job.store)
    label = "merge" if job.part == (0, 1) else f"merge {job.part[0]}/{job.part[1]}"

    def told(_: str, done: float, total: float, unit: str) -> None:
        progress(label, done, total, unit)

    return state(store.load(job.seed, Seed), job.members, job.method, job.settings, store, job.part, told,
                 open_rules(job.typed)).digest  # fmt: skip


def spread(
    seed: Seed, members: dict[str, tuple[Share, ...]], answers: Sequence[Answer], store: Store, *,
    parts: int, workers: int = 1, engine: str = "local", progress: Progress = silent, rules: Rules = RULES,
) -> list[Merged]:  # fmt: skip
    """As elmwood.merge.checkpoint.merge, with `workers` tasks at a time on an engine. Raises what that does."""
    if len(members) < 2:
        raise BadInput("a merge takes two experts or more; one alone is exported as it is: `elmwood export`")
    sums: dict[str, list[State]] = {}
    settled = [(answer.method, *settle(*answer, rules)[1:]) for answer in answers]
    for method, begins, _ in settled:
        if (key := f"{method} {begins}") in sums:
            continue
        jobs = [
            StateJob(
                store=store.root.resolve(),
                seed=seed.digest,
                members=members,
                method=method,
                settings=begins,
                part=(part, parts),
                typed=tuple(rules.keys() - RULES.keys()),
            )
            for part in range(parts)
        ]
        sums[key] = [store.load(digest, State) for digest in run(make_state, jobs, workers=workers, engine=engine, progress=progress)]
    return [finalize(sums[f"{method} {begins}"], ends, store, progress, rules) for method, begins, ends in settled]
