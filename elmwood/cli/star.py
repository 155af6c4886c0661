"""Verbs of a star: one seed, trained by several machines over slow links."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from typer import Argument, Option

from elmwood.cli.options import NameOption, Output, RngSeedOption
from elmwood.cli.screen import bars, emit, made, out, talk, verdicts
from elmwood.errors import BadInput
from elmwood.records import Star
from elmwood.store import Store

StarArgument = Annotated[str, Argument(help="Name of the star.")]
KeyOption = Annotated[Path | None, Option(help="File of this machine's key; default: one made in the store.")]


class InnerOptions(NamedTuple):
    """How each machine trains."""

    tokens: Annotated[str, Option(help="Training tokens of all machines together, e.g. 100M.")] = "10M"
    machines: Annotated[int, Option(help="Machines that are expected: the learning rate follows what each of them trains.")] = 4
    steps: Annotated[int, Option(help="Steps of a proposal.")] = 100
    batch: Annotated[int, Option(help="Sequences per step of a machine.")] = 8
    length: Annotated[int | None, Option(help="Tokens per sequence; default: the seed's context, at most 1024.")] = None
    learning_rate: Annotated[float | None, Option(help="Peak; default: by the size of the seed.")] = None
    schedule: Annotated[str, Option(help="cosine, linear, constant or wsd.")] = "wsd"
    threads: Annotated[int, Option(help="CPU threads of each machine.")] = 1
    rng_seed: RngSeedOption = 0


class OuterOptions(NamedTuple):
    """What becomes of what they send."""

    form: Annotated[str, Option(help="int8, int4, or top: the largest 3.1 % of values in two bits each.")] = "int8"
    rate: Annotated[float, Option(help="Of the outer step.")] = 0.7
    momentum: Annotated[float, Option(help="Of the outer step.")] = 0.5
    apart: Annotated[bool, Option("--apart", help="Average norms and directions of matrices apart.")] = False
    parts: Annotated[int, Option(help="Parts of the text, of which a machine has one at a time.")] = 64


def plan(
    name: StarArgument,
    seed: Annotated[str, Option(help="Name or digest of the seed to go on from.")],
    corpus: Annotated[str | None, Option(help="Name or digest; default: what the seed was trained on.")] = None,
    inner: InnerOptions = InnerOptions(),
    outer: OuterOptions = OuterOptions(),
    output: Output = Output(),
) -> None:
    """Plan a star: the seed, the text, the steps of a machine, and what becomes of what it sends."""
    from elmwood.hub.star.plan import make_star

    star = make_star(name, seed, Store(output.store), corpus=corpus, **inner._asdict(), **outer._asdict())
    versions = star.recipe.steps // star.steps
    talk.print(f"{versions} versions, of {star.tokens:,} tokens from each machine", soft_wrap=True)
    made(star, f"{name}/star", output.as_json)


class Serving(NamedTuple):
    """How a star is coordinated."""

    worker: Annotated[list[str] | None, Option(help="A machine: NAME=KEY, as `elmwood star key` prints it there (repeatable).")] = None
    gates: Annotated[str, Option(help="losses (computed here), or median: no losses, the median of three or more.")] = "losses"
    least: Annotated[int, Option(help="Proposals of a version, at least; and half of the machines at work.")] = 2
    grace: Annotated[float, Option(help="Seconds that a version waits for the others.")] = 30.0


def serve(
    name: StarArgument,
    serving: Serving = Serving(),
    host: Annotated[str, Option(help="Address to listen on; a proxy with TLS stands before it.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0 to 65535.")] = 8710,
    database: Annotated[str | None, Option(help="postgresql+psycopg://…; default: SQLite in the store.")] = None,
    output: Output = Output(),
) -> None:
    """Coordinate a star: grant text, check what comes, make versions. A killed one is started again and goes on."""
    from elmwood.hub.star.app import serve as answer

    with coordinated(name, serving, Store(output.store), database) as home:
        state = home.keeper.read()
        said = f"version {state.number}, {len(state.workers)} machines; ctrl-c stops it"
        talk.print(f"{name} at http://{host}:{port}, {said}", soft_wrap=True)
        answer(home, host, port)


@contextmanager
def coordinated(name: str, serving: Serving, store: Store, database: str | None) -> Iterator[Any]:
    """A star that this process leads."""
    from elmwood.hub.star.home import Home
    from elmwood.hub.star.judging import judge_with_losses
    from elmwood.hub.star.keeper import HOLD, Deposed
    from elmwood.outer.round import Terms

    worker, gates, least, grace = serving
    if gates not in ("losses", "median"):
        raise BadInput(f"--gates {gates}: losses, or median")
    star = store.load(f"{name}/star", Star)
    judge_of = judge_with_losses(star, store) if gates == "losses" else lambda base: None
    open_home = partial(Home, star, store, Terms(least=least, grace_s=grace), _named(worker or []), judge_of, database=database)
    try:
        home = open_home()
    except Deposed as error:  # killed just now, perhaps: its lead ends by itself
        talk.print(f"{error}; waiting for {HOLD:.0f} s", soft_wrap=True)
        time.sleep(HOLD)
        home = open_home()
    if (named := len(home.keeper.read().workers)) < least:
        talk.print(
            f"a version needs proposals of {least} machines, named: {named}; name more with --worker, or take --least 1", soft_wrap=True
        )
    try:
        yield home
    finally:
        home.close()


def _named(words: list[str]) -> dict[str, str]:
    """Key -> name. Raises BadInput."""
    found = {}
    for word in words:
        name, _, key = word.rpartition("=")
        key = key.removeprefix("ed25519:")
        if not name or len(key) != 64 or set(key) - set("0123456789abcdef"):
            raise BadInput(f"--worker {word}: write NAME=KEY, with the 64 digits that `elmwood star key` prints on that machine")
        found[f"ed25519:{key}"] = name
    return found


def key(key: KeyOption = None, output: Output = Output()) -> None:
    """Print the public key of this machine, which is made at the first call."""
    from elmwood.hub import signing

    found = signing.public(signing.load_or_make_key(_key_path(key, output)))
    emit({"key": found}) if output.as_json else out.print(found, soft_wrap=True)


def _key_path(key: Path | None, output: Output) -> Path:
    return key or Store(output.store).root / "star" / "machine.key"


def join(
    url: Annotated[str, Argument(help="Address of the star.")],
    key: KeyOption = None,
    proposals: Annotated[int | None, Option(help="End after so many; default: with the last version.")] = None,
    output: Output = Output(),
) -> None:
    """Take part in a star: train slices of its text, send what changed. Interrupted machines resume."""
    from elmwood.hub import signing
    from elmwood.hub.star.worker import Told, opened, take_part

    def tell(told: Told) -> None:
        talk.print(f"{told.what}: {told.said}" if told.said else told.what, soft_wrap=True, style="dim")

    mine = signing.load_or_make_key(_key_path(key, output))
    with bars() as progress, opened(url, Store(output.store), mine, progress=progress) as machine:
        ended = take_part(machine, proposals=proposals, tell=tell, progress=progress)
    if output.as_json:
        return emit(ended._asdict())
    refused = ", ".join(f"{count:,} {code}" for code, count in ended.rejected.items()) or "none"
    out.print(f"{ended.applied:,} tokens applied, rejected: {refused}; {ended.sent:,} bytes sent", soft_wrap=True)


def check(
    name: StarArgument,
    database: Annotated[str | None, Option(help="As for `serve`.")] = None,
    output: Output = Output(),
) -> None:
    """Compute every version of a star again from what it applied, and compare the bytes."""
    from elmwood.hub.star.home import check_chain, open_chain

    store = Store(output.store)
    star = store.load(f"{name}/star", Star)
    found = check_chain(star, open_chain(star, store, database), store)
    verdicts(found, lambda one: f"{one.number} {one.digest[:12]}", output.as_json)


def take(
    name: StarArgument,
    version: Annotated[int | None, Option(help="Its number; default: the newest.")] = None,
    database: Annotated[str | None, Option(help="As for `serve`.")] = None,
    seed: NameOption = None,
    output: Output = Output(),
) -> None:
    """Keep a version of a star as a seed, from which experts branch."""
    from elmwood.hub.star.home import open_chain, seed_at

    store = Store(output.store)
    star = store.load(f"{name}/star", Star)
    found = seed_at(star, open_chain(star, store, database), version, store)
    digest = store.add(found)
    if seed:
        store.name(seed, digest)
    made(found, seed, output.as_json)
