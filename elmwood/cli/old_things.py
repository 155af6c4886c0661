"""What the verbs of any record do: list, check, write out, draw."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from elmwood.cli.screen import bars, emit, out, short, talk
from elmwood.errors import BadInput
from elmwood.records import (
    Comparison,
    Contest,
    Corpus,
    Ensemble,
    Expert,
    Forest,
    Ledger,
    Merged,
    Mixture,
    Partition,
    Record,
    Seed,
    State,
    Statistics,
    Verdict,
)
from elmwood.report.contest import headline
from elmwood.store import Store, lineage
from elmwood.store import verify as check


def show(*, name, store, as_json) -> None:
    home = Store(store)
    if name is None:
        rows = [(ref, home.load(digest).kind, digest[:12], summary(home.load(digest))) for ref, digest in home.names().items()]
        if as_json:
            emit([dict(zip(("name", "kind", "digest", "summary"), row, strict=True)) for row in rows])
        elif rows:
            for ref, kind, digest, words in rows:
                out.print(f"{digest}  {kind:<10} {ref}  [dim]{words}[/dim]", soft_wrap=True)
        else:
            talk.print(f"{store} names nothing yet: begin with `elmwood demo` or `elmwood cluster`")
        return
    if as_json:
        emit(made_json(home.load(name)))
        return
    names = {digest: ref for ref, digest in home.names().items()}
    seen: set[str] = set()
    below = None  # the depth of what was shown above, with all that it was made from
    for depth, record in lineage(home, home.resolve(name)):
        if below is not None and depth > below:
            continue
        again = record.digest in seen
        below = depth if again else None
        seen.add(record.digest)
        ref = names.get(record.digest, "")
        words = "(above)" if again else summary(record)
        out.print(f"{'   ' * depth}{record.kind} {record.digest[:12]} {ref}  [dim]{words}[/dim]".rstrip(), soft_wrap=True)


def made_json(record: Record) -> dict[str, Any]:
    return {"digest": record.digest, "record": record.model_dump(mode="json")}


def summary(record: Record) -> str:
    """One line on what a record holds."""
    match record:
        case Corpus():
            left = sum(record.rejected.values())
            return f"{record.documents} documents, {short(record.bytes)}B" + (f", {left} left out" if left else "")
        case Partition():
            return f"{len(record.domains)} domains, {record.embedder.name}, {record.method}"
        case Seed():
            return f"{record.name}: {record.architecture}, {short(record.parameters)} parameters, vocabulary {record.vocabulary}"
        case Expert():
            where = "all domains" if record.domain is None else f"domain {record.domain}"
            return f"{record.recipe.method}, {where}, {short(record.recipe.tokens)} tokens"
        case Statistics():
            return f"over {short(record.tokens)} tokens"
        case Forest():
            return f"{len(record.experts)} experts"
        case Ensemble():
            mixed = ", weights mixed for each prompt" if record.mixing == "weights" else ""
            return f"{record.router}, top-{record.top_k}, temperature {record.temperature:.3g}{mixed}"
        case Merged():
            off = "" if record.error is None else f", {record.error:.2g} from the exact sum"
            return f"{record.method} of {len(record.contributions)} experts{off}"
        case Mixture():
            tuned = f", tuned: {record.recipe.tuned}" if record.recipe else ""
            return f"{len(record.experts)} experts, top-{record.gates.top_k}, {record.gates.kind} gates, {record.layout}{tuned}"
        case State():
            part = "" if record.part == (0, 1) else f", part {record.part[0]}/{record.part[1]}"
            return f"{record.method} of {len(record.contributions)} experts, unfinished{part}"
        case Verdict():
            failed = [check.name.split(":")[0].split(",")[0] for check in record.checks if not check.passed]
            return "accepted" if record.accepted else f"refused: {failed[0]}"
        case Ledger():
            return f"{len(record.entries)} submissions, {sum(entry.accepted is True for entry in record.entries)} accepted"
        case Contest():
            return f"{headline(record)}: {record.effect:+.4f} bits per byte, {record.drawn} of {record.touched} blocks"
        case Comparison():
            best = min(record.rows, key=lambda row: row.bits_per_byte)
            return f"{len(record.rows)} rows; lowest {best.bits_per_byte:.4f} bits/byte: {best.name}"
    return ""


def verify(*, store, as_json) -> None:
    home = Store(store)
    if not home.root.exists():
        raise BadInput(f"there is no store at {store}: name one with --store, or begin with `elmwood demo`")
    with bars() as progress:
        damages = list(check(home, lambda done, total: progress("verify", done, total, "B")))
    broken = sum(not damage.elsewhere for damage in damages)
    if as_json:
        emit([damage._asdict() for damage in damages])
    else:
        for damage in damages:
            (talk if damage.elsewhere else out).print(f"{damage.where}: {damage.problem}", soft_wrap=True)
        talk.print(f"{broken} damaged" if broken else "every digest and reference holds")
    if broken:
        sys.exit(1)


def export(*, name, folder, form, dtype, store, as_json) -> None:
    home = Store(store)
    record = home.load(name)
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: an export never overwrites; name a new folder")
    building = folder.with_name(folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    try:
        _write(record, home, building, form, dtype)
        about = "_elmwood.json" if form == "parquet" else "elmwood.json"  # readers of data sets pass over what begins with _
        (building / about).write_bytes(home.get(record.digest).read_bytes())
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(building, folder)
    if as_json:
        emit({"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())})
    else:
        out.print(str(folder), soft_wrap=True)


def _write(record: Record, home: Store, building: Path, form: str | None, dtype: str | None) -> None:
    match record:
        case Seed() | Expert() | Merged() | Mixture():
            from elmwood.merge.export.folder import export  # numpy, and torch to look at what was written

            with bars() as progress:
                export(record, home, building, form, dtype and dtype.upper(), progress)
        case Partition() if form == "parquet" and not dtype:
            from elmwood.domains.publish import text_files  # scikit-learn

            shutil.copytree(home.folder(text_files(record, home)), building)
        case State() | Statistics() | Partition() if form or dtype:
            raise BadInput("--format and --dtype are for models, and --format parquet for the text of a partition: leave them out")
        case State() | Statistics():
            shutil.copytree(home.folder(record.files), building)  # follows the links: plain files come out
        case Partition():
            from elmwood.domains.publish import files_without_text, write_records  # scikit-learn

            shutil.copytree(home.folder(files_without_text(record, home)), building)
            write_records(record, home, building)
            talk.print("no text is in it, but words are: terms and names of domains, and the vocabulary of embedders that keep one")
        case _:
            raise BadInput(
                f"a {record.kind} is no folder: export its seed, partition or experts (`elmwood show {record.digest[:8]}` lists them)"
            )
