"""Verbs of who works with a hub: join it, verify what others submit, pull what they made."""

import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from typer import Argument, Option

from elmwood.cli.options import NameOption, Output
from elmwood.cli.screen import bars, emit, out, printable, talk
from elmwood.errors import BadInput
from elmwood.units import parse_count

HubArgument = Annotated[str, Argument(metavar="URL", help="Address of a hub: https://HOST, or http://localhost:PORT.")]


class Identity(NamedTuple):
    """Who volunteers."""

    member: Annotated[str, Option(help="Name shown beside your experts; it can be erased.")] = "anonymous"
    account: Annotated[str, Option(help="Id of the account that another device of yours has; needs its recovery code.")] = ""
    recovery_code: Annotated[str, Option(help="Of that account.")] = ""
    agree: Annotated[bool, Option("--agree", help="Agree to the licences, which are printed; else you are asked.")] = False
    folder: Annotated[Path | None, Option(help="Folder of keys and unfinished work; default: one in the store.")] = None


class Pacing(NamedTuple):
    """When to train."""

    hours: Annotated[float | None, Option(help="Stop after so many hours; the lease is paused, and the next call goes on.")] = None
    once: Annotated[bool, Option("--once", help="One domain and its verdict, then end.")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Say what fits this machine and what it takes; lease nothing.")] = False
    pause_when_busy: Annotated[bool, Option("--pause-when-busy", help="Pause while others use this machine.")] = False
    max_temp: Annotated[float | None, Option(help="Pause above so many degrees Celsius.")] = None
    pause: Annotated[bool, Option("--pause", help="Pause the client that runs on this machine, and end.")] = False
    resume: Annotated[bool, Option("--resume", help="Let it go on, and end.")] = False


def join(
    url: HubArgument,
    text: Annotated[list[str] | None, Option(help="Train on text of your own, which stays here (repeatable).")] = None,
    identity: Identity = Identity(),
    pacing: Pacing = Pacing(),
    output: Output = Output(),
) -> None:
    """Volunteer for a hub: lease a domain, train its expert here, submit it, hear the verdict. Interrupted runs resume."""
    from elmwood.hub.client import join as volunteer
    from elmwood.hub.client.state import Told, open_folder
    from elmwood.store import Store

    if pacing.pause or pacing.resume:
        place = open_folder(url, Store(output.store), identity.folder)
        place.path.mkdir(parents=True, exist_ok=True)
        place.paused.touch() if pacing.pause else place.paused.unlink(missing_ok=True)
        return
    options = volunteer.Options(
        name=identity.member, account=identity.account, recovery_code=identity.recovery_code,
        agree=lambda texts: _agree(texts, identity.agree),
        text=tuple(text or ()), **{field: getattr(pacing, field) for field in ("hours", "once", "dry_run", "pause_when_busy", "max_temp")},
    )  # fmt: skip
    with bars() as progress:

        def tell(told: Told) -> None:
            if told.phase == "training":
                progress(f"train domain {told.grant.domain if told.grant else ''}", told.step, told.steps, "steps")
            elif told.phase in ("verdict", "fits"):
                talk.print(told.text, soft_wrap=True, style="bold" if told.reply and told.reply.state == "accepted" else "")
            else:
                talk.print(f"{told.phase}: {told.text}" if told.text else told.phase, soft_wrap=True, style="dim")

        decided = volunteer.join(url, output.store, options=options, folder=identity.folder, tell=tell, progress=progress)
    if output.as_json:
        return emit([reply.model_dump(mode="json") for reply in decided])
    for reply in decided:
        out.print(f"{reply.expert}  domain {reply.domain}: {reply.state}", soft_wrap=True)


def _agree(texts: dict[str, str], agreed: bool) -> bool:
    """Print the licences; ask, unless it was agreed to on the command line."""
    for name, text in texts.items():
        talk.print(f"licence ({name}):\n{printable(text)}\n", soft_wrap=True)
    return agreed or (sys.stdin.isatty() and typer.confirm("Do you agree to these licences?", err=True))


def verify_work(
    url: HubArgument,
    once: Annotated[bool, Option("--once", help="End when nothing is queued.")] = False,
    key: Annotated[Path | None, Option(help="File of the verifier's key; default: one made here.")] = None,
    show_key: Annotated[bool, Option("--show-key", help="Print the public key that is used, and end.")] = False,
    memory: Annotated[str, Option(help="Memory of the process that judges.")] = "8G",
    seconds: Annotated[int, Option(help="CPU time of it, and time of the clock.")] = 3600,
    folder: Annotated[Path | None, Option(help="Folder of the key and unfinished work; default: one in the store.")] = None,
    output: Output = Output(),
) -> None:
    """Verify what volunteers submitted to a hub: its form, copies, gain on secret text, harm to other domains."""
    from elmwood.hub.client import verify

    if show_key:
        out.print(verify.verifier_key(url, output.store, folder), soft_wrap=True)
        return
    limits = verify.Limits(parse_count(memory), seconds)
    with bars() as progress:
        count = verify.verify_work(
            url, output.store, folder=folder, key=key, limits=limits, once_only=once, progress=progress,
            tell=lambda told: talk.print(f"{told.phase}: {told.text}", soft_wrap=True, style="dim" if told.phase == "idle" else ""),
        )  # fmt: skip
    emit({"verdicts": count}) if output.as_json else out.print(f"{count} verdicts")


def pull(
    url: HubArgument,
    version: Annotated[int | None, Option(help="An older version of the snapshot.")] = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Bring a hub's shared ensemble into the store, checked: only what is missing. chat, merge and mix work on it at once."""
    from elmwood.hub.client import pull as pulling

    with bars() as progress:
        pulled = pulling.pull(url, output.store, name=name, version=version, progress=progress)
    facts = {
        "ensemble": pulled.ensemble.digest, "forest": pulled.ensemble.forest, "version": pulled.snapshot.version,
        "experts": len(pulled.snapshot.experts), "fetched": pulled.fetched, "name": pulled.name,
    }  # fmt: skip
    if output.as_json:
        return emit(facts)
    out.print(f"{pulled.ensemble.digest}  {pulled.name}/ensemble", style="bold", soft_wrap=True)
    out.print(f"snapshot {facts['version']}: {facts['experts']} experts, {pulled.fetched} files fetched", soft_wrap=True)


def mirror(
    forest: Annotated[str, Argument(help="A forest or ensemble, such as the one that `elmwood pull` names.")],
    account: Annotated[str, Argument(help="Your account or organisation on the Hugging Face hub.")],
    merged: Annotated[str | None, Option(help="A merge or mixture to upload as well.")] = None,
    prefix: Annotated[str, Option(help="Beginning of the names of the repositories.")] = "elmwood",
    public: Annotated[bool, Option("--public", help="Make the repositories public.")] = False,
    output: Output = Output(),
) -> None:
    """Upload each expert of a forest, and a merged or mixed model, to a Hugging Face account, each with its card."""
    from elmwood.hub.client import pull as pulling

    if not account or "/" in account:
        raise BadInput(f"{account!r} is no account: write its name alone")
    with bars() as progress:
        made = pulling.mirror(
            forest, account, output.store, merged=merged, prefix=prefix, private=not public, progress=progress,
            tell=lambda one: talk.print(one.repository, soft_wrap=True),
        )  # fmt: skip
    emit([one._asdict() for one in made]) if output.as_json else out.print(f"{len(made)} repositories")
