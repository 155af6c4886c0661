"""Verbs of a hub and of those who work for one."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from typer import Argument, Option

from elmwood.cli.options import Output
from elmwood.cli.screen import bars, emit, out, talk, verdicts
from elmwood.cli.star import Serving, coordinated
from elmwood.ranges import NewFile
from elmwood.store import Store
from elmwood.units import duration

WATCH = 10.0  # seconds between two looks at the newest snapshot
RunOption = Annotated[str | None, Option(help="Name of the run; default: the only one.")]
RunArgument = Annotated[str | None, Argument(help="Name of the run; default: the only one in the store.")]


class Place(NamedTuple):
    """Where a hub keeps what it knows."""

    database: Annotated[str | None, Option(help="postgresql+psycopg://…; default: SQLite, or as published.")] = None
    blobs: Annotated[str | None, Option(help="s3://bucket/prefix; default: the store's folder, or as published.")] = None


@contextmanager
def opened(run: str | None, output: Output, place: Place = Place()) -> Iterator[Any]:
    """A hub, and the functions of its care."""
    from elmwood.hub.home import Hub, find_home

    hub = Hub(find_home(run, Store(output.store)), place.database, place.blobs)
    try:
        yield hub
    finally:
        hub.close()


def publish(
    run: Annotated[str, Argument(help="Name of the run.")],
    seed: Annotated[str, Argument(help="Name or digest.")],
    partition: Annotated[str, Argument(help="Name or digest.")],
    tokens: Annotated[str, Option(help="Training tokens per expert, e.g. 2M.")] = "1M",
    rank: Annotated[int, Option(help="Rank of the adapters.")] = 16,
    length: Annotated[int | None, Option(help="Tokens per sequence; default: the seed's context, at most 1024.")] = None,
    cards: Annotated[bool, Option(help="Recipes for GPUs of 4, 8, 12 and 24 GB beside the one for CPUs.")] = True,
    text: Annotated[bool, Option(help="Give volunteers the training text; else they bring their own.")] = True,
    days: Annotated[float, Option(help="Until the manifest expires and is published again.")] = 30.0,
    place: Place = Place(),
    output: Output = Output(),
) -> None:
    """Publish a run, or its next version: who joins trains experts of this seed for its domains."""
    from elmwood.hub.publishing import draft_run, publish_run

    store = Store(output.store)
    draft = draft_run(run, seed, partition, store, tokens=tokens, rank=rank, length=length, cards=cards, with_text=text, days=days)
    signed = publish_run(draft, store, *place)
    keys = store.root / "hub" / run / "keys"
    if output.as_json:
        return emit({"run": run, "version": signed.body["version"], "root_key": signed.key, "keys": str(keys)})
    out.print(f"{run} version {signed.body['version']}, {len(draft.domains)} domains, root key {signed.key}", soft_wrap=True)
    talk.print(f"keep {keys / 'root.key'} away from this machine; verifiers sign with {keys / 'verifier.key'}", soft_wrap=True)


def up(
    run: RunArgument = None,
    host: Annotated[str, Option(help="Address to listen on; a proxy with TLS stands before it.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0 to 65535.")] = 8700,
    host_name: Annotated[list[str] | None, Option(help="Refuse requests to other names than these (repeatable).")] = None,
    star: Annotated[str | None, Option(help="A star to coordinate here too, at /star; its options as of `star serve`.")] = None,
    serving: Serving = Serving(),
    place: Place = Place(),
    output: Output = Output(),
) -> None:
    """Serve a run to volunteers and verifiers."""
    from elmwood.hub.care import serve

    with ExitStack() as stack:
        hub = stack.enter_context(opened(run, output, place))
        led = stack.enter_context(coordinated(star, serving, Store(output.store), place.database)) if star else None
        talk.print(f"{hub.home.run} at http://{host}:{port}, {hub.blobs.probe()}; ctrl-c stops it", soft_wrap=True)
        serve(hub, host, port, host_name or [], led)


def status(run: RunArgument = None, place: Place = Place(), output: Output = Output()) -> None:
    """What a run has: domains, leases, submissions, experts."""
    from elmwood.hub import care

    with opened(run, output, place) as hub:
        found = care.status(hub)
    if output.as_json:
        return emit(found)
    for name, value in found.items():
        words = ", ".join(f"{n} {state}" for state, n in value.items()) if isinstance(value, dict) else value
        out.print(f"{name.replace('_', ' ')}: {words}", soft_wrap=True)


def trust(
    key: Annotated[str, Argument(help="Public key, 64 hex digits.")],
    role: Annotated[str, Argument(help="member, verifier or admin.")],
    run: RunOption = None,
    output: Output = Output(),
) -> None:
    """Give a key a role: member, verifier or admin."""
    from elmwood.hub import care

    with opened(run, output) as hub:
        care.trust(hub, key, role)


def retire(
    expert: Annotated[str, Argument(help="Digest, or the beginning of one.")],
    reason: Annotated[str, Option(help="regression, report, better-expert, copy, withdrawn, licence or other.")] = "other",
    compensate: Annotated[bool, Option("--compensate", help="Take its credit back, by a further line of the ledger.")] = False,
    run: RunOption = None,
    output: Output = Output(),
) -> None:
    """Take an expert out of the shared ensemble; its domain opens again."""
    from elmwood.hub import care

    with opened(run, output) as hub:
        version = care.retire(hub, expert, reason, compensate)
    emit({"snapshot": version}) if output.as_json else out.print(f"snapshot {version} is without it")


def merge(
    run: RunArgument = None,
    method: Annotated[str, Option(help="A merge rule, as of `elmwood merge`.")] = "average",
    watch: Annotated[bool, Option("--watch", help="Go on with each new snapshot, until ctrl-c.")] = False,
    also: Annotated[list[str] | None, Option(help="A further merge or mixture of these experts, to be marked when one is retired.")] = None,
    place: Place = Place(),
    output: Output = Output(),
) -> None:
    """Keep the merge of a run's experts: what was accepted is added, what was retired is subtracted exactly."""
    from elmwood.hub.merging import enter_derived, keep_merge

    with opened(run, output, place) as hub, bars() as progress, suppress(KeyboardInterrupt):
        for name in also or ():
            enter_derived(hub, name)
        seen = -1
        while seen < 0 or watch:
            kept = keep_merge(hub, method, progress)
            if kept.version != seen:
                digest = kept.merged.digest if kept.merged else None
                said = f"{digest} of snapshot {kept.version}: {len(kept.added)} added, {len(kept.removed)} removed"
                facts = {"snapshot": kept.version, "merged": digest, "added": kept.added, "removed": kept.removed}
                emit(facts) if output.as_json else out.print(said, soft_wrap=True)
            seen = kept.version
            if watch:
                time.sleep(WATCH)


def backup(
    folder: Annotated[Path, Argument(help="A new folder; it is a store with this hub in it."), NewFile(folder=True)],
    run: RunOption = None,
    output: Output = Output(),
) -> None:
    """Copy a running hub into a new folder: database, keys and blobs."""
    from elmwood.hub import care

    with opened(run, output) as hub, bars() as progress:
        care.backup(hub, folder, progress)
    emit({"folder": str(folder)}) if output.as_json else out.print(str(folder))


def move(
    database: Annotated[str, Argument(help="URL of an empty database: postgresql+psycopg://… or sqlite:///PATH.")],
    run: RunOption = None,
    output: Output = Output(),
) -> None:
    """Copy a hub's database into another, empty one: SQLite to PostgreSQL, or back."""
    from elmwood.hub import care
    from elmwood.hub.home import find_home

    home = find_home(run, Store(output.store))
    care.copy_database(home.database_url(), database)
    home.keep_settings(database, None)
    emit({"database": database}) if output.as_json else out.print(f"{home.run} is now in {database}", soft_wrap=True)


def doctor(run: RunArgument = None, place: Place = Place(), output: Output = Output()) -> None:
    """Check a hub: keys, manifest, log, ledger, snapshots and every blob."""
    from elmwood.hub import care

    with opened(run, output, place) as hub:
        found = list(care.doctor(hub))
    verdicts(found, lambda one: one.what, output.as_json)


def demo(
    keep: Annotated[bool, Option("--keep", help="Leave the hub and its pages up at the end, until ctrl-c.")] = False,
    port: Annotated[int, Option(help="Of the hub; 0: a free one.")] = 0,
    output: Output = Output(),
) -> None:
    """A community in a box: a hub here with five volunteers, two of them dishonest, one killed."""
    from elmwood.hub.demo.stage import play

    began = time.monotonic()

    def tell(text: str) -> None:
        talk.print(f"{duration(time.monotonic() - began):>12}  {text}", soft_wrap=True, markup=False)

    def show(made: Any) -> None:
        emit(made._asdict() | {"measured": made.measured.model_dump()}) if output.as_json else out.print(
            "\n".join(lines_of(made)), soft_wrap=True, markup=False
        )
        if keep:
            tell(f"the hub and its pages stay at {made.url} until ctrl-c")
            with suppress(KeyboardInterrupt):
                threading.Event().wait()

    with tempfile.TemporaryDirectory(prefix="elmwood-community-") as folder:
        play(output.store or Path(folder), port=port, on_event=tell, keep=show)


def lines_of(made: Any) -> Iterator[str]:
    """What came of it."""
    found = made.measured
    yield f"{len(made.filled)} domains have experts, by " + ", ".join(f"{name} ({place})" for place, name in made.filled.items())
    yield "refused: " + ", ".join(f"{name} ({code})" for name, code in made.refused.items())
    yield f"killed at step {made.resumed[0]} of {made.resumed[1]}, and resumed; retired {made.retired[:8]}, trained again by {made.again}"
    yield f"bits per byte over {found.documents} held-out documents, less is better:"
    yield f"  seed      {found.seed_bits_per_byte:.4f}"
    yield f"  ensemble  {found.bits_per_byte:.4f}   {found.over_seed:+.4f} ± {found.over_seed_error:.4f} over the seed"
    yield f"  dense     {found.control_bits_per_byte:.4f}   the ensemble is {found.gain:+.4f} ± {found.gain_error:.4f} over it"
