"""Verbs of the store: list, check, export, report."""

import sys
from pathlib import Path
from typing import Annotated

from rich.text import Text
from typer import Argument, Option

from elmwood.cli.options import Output
from elmwood.cli.screen import bars, emit, out, printable, talk
from elmwood.ranges import NewFile
from elmwood.records import Partition
from elmwood.store import Store
from elmwood.study import exporting, page


def show(
    name: Annotated[str | None, Argument(help="A name or digest; default: list all names.")] = None,
    output: Output = Output(),
) -> None:
    """List the names in the store, or the lineage of one of them."""
    if name is None:
        print_names(output)
    elif output.as_json:
        record = Store(output.store).load(name)
        emit({"digest": record.digest, "record": record.model_dump(mode="json")})
    else:
        for line in page.show(name, output.store).lines:
            print_record(f"{'   ' * line.indent}{line.record.kind} {line.record.digest[:12]} {line.name}", line.words)


def verify(output: Output = Output()) -> None:
    """Check every digest and every reference; report exactly what is damaged."""
    with bars() as progress:
        damages = exporting.verify(store=output.store, progress=progress)
    broken = sum(not damage.elsewhere for damage in damages)
    if output.as_json:
        emit([damage._asdict() for damage in damages])
    else:
        for damage in damages:
            (talk if damage.elsewhere else out).print(f"{damage.where}: {damage.problem}", soft_wrap=True, markup=False)
        talk.print(f"{broken} damaged" if broken else "every digest and reference holds")
    if broken:
        sys.exit(1)


def export(
    record: Annotated[str, Argument(help="A seed, an expert, a merge, a state or a partition: name or digest.")],
    folder: Annotated[Path, Argument(help="A new folder."), NewFile(folder=True)],
    form: Annotated[
        str | None,
        Option("--format", help="transformers, peft, gguf or gguf-adapter; for a partition's text, parquet. Default: as it is."),
    ] = None,
    dtype: Annotated[str | None, Option(help="Of a GGUF file's matrices: f32, f16 or bf16; default: as stored.")] = None,
    output: Output = Output(),
) -> None:
    """Write a folder that other tools read: transformers, PEFT, GGUF, or a partition with or without its text."""
    store = Store(output.store)
    with bars() as progress:
        written = exporting.export(record, folder, format=form, dtype=dtype, store=store, progress=progress)
    if form is None and isinstance(store.load(record), Partition):
        talk.print("no text is in it, but words are: terms and names of domains, and the vocabulary of embedders that keep one")
    if output.as_json:
        emit({"folder": str(written), "files": sorted(path.name for path in written.iterdir())})
    else:
        out.print(str(written), soft_wrap=True, markup=False)


def report(
    comparison: Annotated[str, Argument(help="A comparison (made by demo or eval) or its forest: name or digest.")],
    html: Annotated[Path, Option("--output", "-o", help="The HTML file."), NewFile()] = Path("report.html"),
    output: Output = Output(),
) -> None:
    """Write one self-contained HTML page: domain map, curves, routing, results, lineage."""
    written = page.report(comparison, output=html, store=output.store)
    if output.as_json:
        emit({"report": str(written)})
    else:
        out.print(str(written), soft_wrap=True, markup=False)


def print_names(output: Output) -> None:
    """Every name, with the kind, digest and summary of its record."""
    found = page.show(store=output.store)
    for one in found.damaged:
        talk.print(one, soft_wrap=True)
    if output.as_json:
        rows = [(line.name, line.record.kind, line.record.digest[:12], page.summary(line.record)) for line in found.lines]
        return emit([dict(zip(("name", "kind", "digest", "summary"), row, strict=True)) for row in rows])
    if not found.lines and not found.damaged:
        talk.print(f"{output.store} names nothing yet: begin with `elmwood demo` or `elmwood cluster`")
    for line in found.lines:
        print_record(f"{line.record.digest[:12]}  {line.record.kind:<10} {line.name}", page.summary(line.record))


def print_record(head: str, words: str) -> None:
    """A line on a record; its words, which may come from others, are text and never markup."""
    out.print(Text.assemble(printable(head), "  ", (printable(words), "dim")) if words else head.rstrip(), soft_wrap=True)
