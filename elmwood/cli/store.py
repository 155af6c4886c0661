"""Verbs of the store: list, check, export, report."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from elmwood.cli import old_page, old_things
from elmwood.cli.options import Output


def show(
    name: Annotated[str | None, Argument(help="A name or digest; default: list all names.")] = None,
    output: Output = Output(),
) -> None:
    """List the names in the store, or the lineage of one of them."""
    old_things.show(name=name, store=output.store, as_json=output.as_json)


def verify(output: Output = Output()) -> None:
    """Check every digest and every reference; report exactly what is damaged."""
    old_things.verify(store=output.store, as_json=output.as_json)


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
    old_things.export(name=name, folder=folder, form=form, dtype=dtype, store=output.store, as_json=output.as_json)


def report(
    comparison: Annotated[str, Argument(help="A comparison (made by demo or eval) or its forest: name or digest.")],
    page: Annotated[Path, Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    output: Output = Output(),
) -> None:
    """Write one self-contained HTML page: domain map, curves, routing, results, lineage."""
    old_page.report_verb(comparison=comparison, output=page, store=output.store, as_json=output.as_json)
