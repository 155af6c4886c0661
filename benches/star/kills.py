"""kill -9 of a star's coordinator at each step of a round: one chain, nothing applied twice, replay gives the same digests.

    python -m benches.star.kills [--kills 300] [--machines 4] [--seed 0] [--database postgresql+psycopg://…]

Each coordinator is a process of its own on the same database (SQLite by default) and store. It grants, takes uploads and proposals and
decides rounds, until it is killed at a place drawn by chance: before or after a write of the database, or at one of the named places of a
decision. The deltas are random numbers; nothing is trained, so this is about what is kept, not about losses.
"""

import os
import signal
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from benches.common import parser, say
from elmwood.hub.star.home import Home, check_chain
from elmwood.outer import round
from elmwood.outer.compress import write_delta
from elmwood.outer.round import Terms
from elmwood.outer.step import OUTER, shapes_of
from elmwood.records import Corpus, Recipe, Seed, Star, Version
from elmwood.store import Store
from elmwood.weights import exact

SHAPES = {"embed": (40, 16), "layer": (16, 16), "norm": (16,)}
TERMS = Terms(least=2, grace_s=0, beat_s=1e6, progress_s=1e6)


def new_star(store: Store, versions: int = 10**6, **fields: Any) -> Star:
    """A seed of random numbers, a corpus without text, and a plan."""
    rng = np.random.default_rng(0)
    weights = safetensors.numpy.save({name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()})
    seed = Seed(
        name="numbers", architecture="none", parameters=1, vocabulary=2, context=8, separator=0,
        files={"model.safetensors": store.put(weights)},
    )  # fmt: skip
    corpus = Corpus(train=(), holdout=(), documents=0, bytes=0, holdout_share=0.1)
    store.add(seed), store.add(corpus)
    plan: dict[str, Any] = {"steps": 1, "parts": 32, "form": "int8", "outer": OUTER} | fields
    recipe = Recipe(steps=versions, batch=1, length=8)
    star = Star(name="numbers", seed=seed.digest, corpus=corpus.digest, recipe=recipe, **plan)
    store.add(star)
    return star


def keys(machines: int) -> dict[str, str]:
    return {f"ed25519:{n:064x}": f"m{n}" for n in range(machines)}


def open_home(star: Star, store: Store, machines: int, **options: Any) -> Home:
    return Home(star, store, TERMS, keys(machines), holder="bench", **options)


def offer(home: Home, key: str, id: str, drawn: str | None = None) -> None:
    """Upload a delta that follows from its grant, or from an earlier one, in two parts, and propose it."""
    rng = np.random.default_rng(int(drawn or id))
    path = home.folder / f"delta-{id}"
    shapes = shapes_of(home.store.get(home.version(0).weights))
    write_delta(path, {name: rng.standard_normal(int(np.prod(shape))) * 1e-3 for name, shape in shapes.items()}, shapes, home.star.form)
    raw = path.read_bytes()
    home.write(lambda state, now: (round.begin_upload(state, key, id, len(raw), home.size), None))
    held = home.keeper.read().grants[id]
    for at in (0, len(raw) // 2):
        if at < sum(held.sent):
            continue
        part = raw[at : len(raw) // 2] if at == 0 else raw[at:]
        home.blobs.put_part(id, int(at > 0), part)
        whole = f"sha256:{home.blobs.join(id, 2)[0]}" if at else None
        home.write(lambda state, now, at=at, part=part, whole=whole: (round.keep_part(state, key, id, at, len(part), whole), None))
    held = home.keeper.read().grants[id]
    assert held.blob
    home.write(lambda state, now: (round.propose(state, home.star, key, id, held.base, str(held.blob)), None))
    path.unlink()


def live(star: Star, store: Store, machines: int, die_at: int, steps: int, database: str | None) -> None:
    """One life of a coordinator: it dies at a place, or after so many steps."""
    count = [0]

    def place(name: str) -> None:
        count[0] += 1
        if count[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    home = open_home(star, store, machines, at=place, database=database)
    write = home.keeper.write

    def watched(*arguments: Any) -> Any:
        place("before a write")
        made = write(*arguments)
        place("after a write")
        return made

    home.keeper.write = watched  # type: ignore[method-assign]
    for _ in range(steps):
        state = home.keeper.read()
        for key in state.workers:
            held = next((one for one in state.grants.values() if one.key == key), None)
            if held:
                offer(home, key, held.id)
            else:
                home.write(lambda state, now, key=key: round.grant(state, star, TERMS, key, now))
        home.tick()
    os._exit(0)


def kills(folder: Path, count: int, machines: int = 4, rng_seed: int = 0, database: str | None = None) -> dict[str, Any]:
    """Kill so many coordinators; what is left at the end, checked. Raises AssertionError."""
    store, rng = Store(folder), np.random.default_rng(rng_seed)
    star = new_star(store)
    exact.add(np.zeros(4, np.int64), np.ones(4), 1.0)  # compiled before processes are forked
    died = 0
    while died < count:
        die_at = int(rng.integers(1, 70))
        child = os.fork()
        if not child:
            try:
                live(star, store, machines, die_at, 6, database)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a coordinator failed"
        died += os.WIFSIGNALED(status)
    return check(star, store, machines, database) | {"kills": died}


def check(star: Star, store: Store, machines: int, database: str | None = None) -> dict[str, Any]:
    """Whether the chain, the receipts and the counts of tokens agree."""
    home = open_home(star, store, machines, database=database)
    try:
        state, chain = home.keeper.read(), home.keeper.chain()
        versions = [store.load(digest, Version) for digest in chain]
        assert [one.number for one in versions] == list(range(state.number + 1))
        assert all(one.parent == before.digest for before, one in pairwise(versions))
        fates = [fate for one in versions for fate in one.fates]
        most = max(Counter(fate.proposal for fate in fates).values(), default=0)
        assert most <= 1, "a proposal stands in two versions"
        assert all(home.keeper.receipt(fate.proposal) == fate for fate in fates)
        applied = sum(fate.tokens for fate in fates if fate.fate == "applied")
        assert applied == state.applied
        assert state.granted == state.applied + sum(state.rejected.values()) + state.gone + sum(one.tokens for one in state.unended)
        again = check_chain(star, chain, store)
        assert all(one.good for one in again), "replay gives other bytes"
        return {"versions": state.number, "applied": len([fate for fate in fates if fate.fate == "applied"]), "replayed": len(again)}
    finally:
        home.close()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=300)
    options.add_argument("--machines", type=int, default=4)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--database")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        say("star.kills", **kills(Path(folder), given.kills, given.machines, given.seed, given.database))


if __name__ == "__main__":
    main()
