"""Verbs of the store: list, check, export, report."""

import sys
from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from elmwood.cli.options import Output
from elmwood.cli.screen import bars, emit, out, talk
from elmwood.records import Partition
from elmwood.store import Store, lineage
from elmwood.study import exporting
from elmwood.study.page import report as write_page
from elmwood.study.page import summary


def show(
    name: Annotated[str | None, Argument(help="A name or digest; default: list all names.")] = None,
    output: Output = Output(),
) -> None:
    """List the names in the store, or the lineage of one of them."""
    store = Store(output.store)
    if name is None:
        print_names(store, output.as_json)
    elif output.as_json:
        record = store.load(name)
        emit({"digest": record.digest, "record": record.model_dump(mode="json")})
    else:
        print_lineage(store, name)


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
    name: Annotated[str, Argument(help="A seed, an expert, a merge, a state or a partition: name or digest.")],
    folder: Annotated[Path, Argument(help="A new folder.")],
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
        written = exporting.export(name, folder, format=form, dtype=dtype, store=store, progress=progress)
    if form is None and isinstance(store.load(name), Partition):
        talk.print("no text is in it, but words are: terms and names of domains, and the vocabulary of embedders that keep one")
    if output.as_json:
        emit({"folder": str(written), "files": sorted(path.name for path in written.iterdir())})
    else:
        out.print(str(written), soft_wrap=True, markup=False)


def report(
    comparison: Annotated[str, Argument(help="A comparison (made by demo or eval) or its forest: name or digest.")],
    page: Annotated[Path, Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    output: Output = Output(),
) -> None:
    """Write one self-contained HTML page: domain map, curves, routing, results, lineage."""
    written = write_page(comparison, output=page, store=output.store)
    if output.as_json:
        emit({"report": str(written)})
    else:
        out.print(str(written), soft_wrap=True, markup=False)


def print_names(store: Store, as_json: bool) -> None:
    """Every name, with the kind, digest and summary of its record."""
    rows = [(name, record.kind, digest[:12], summary(record)) for name, digest in store.names().items() for record in [store.load(digest)]]
    if as_json:
        emit([dict(zip(("name", "kind", "digest", "summary"), row, strict=True)) for row in rows])
    elif not rows:
        talk.print(f"{store.root} names nothing yet: begin with `elmwood demo` or `elmwood cluster`")
    for name, kind, digest, words in [] if as_json else rows:
        out.print(f"{digest}  {kind:<10} {name}  [dim]{escape(words)}[/dim]", soft_wrap=True)


def print_lineage(store: Store, name: str) -> None:
    """A record and all it was made from, each indented below what it is for. What was shown above is not repeated."""
    names = {digest: name for name, digest in store.names().items()}
    seen: set[str] = set()
    below = None  # the depth of what was shown above
    for depth, record in lineage(store, store.resolve(name)):
        if below is not None and depth > below:
            continue
        again = record.digest in seen
        below = depth if again else None
        seen.add(record.digest)
        words = "(above)" if again else escape(summary(record))
        out.print(
            f"{'   ' * depth}{record.kind} {record.digest[:12]} {names.get(record.digest, '')}  [dim]{words}[/dim]".rstrip(), soft_wrap=True
        )
