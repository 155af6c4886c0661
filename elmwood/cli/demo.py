"""The demo: the whole experiment in one command."""

from pathlib import Path
from typing import Annotated

from typer import Option

from elmwood.cli import old_study
from elmwood.cli.options import Output, WorkersOption


def demo(
    quick: Annotated[bool, Option("--quick", help="About two minutes: too short to show a gain.")] = False,
    corpus: Annotated[list[str] | None, Option(help="Your own text instead of the bundled sample (repeatable).")] = None,
    seed: Annotated[str | None, Option(help="A seed you have (name or digest) instead of one trained here.")] = None,
    domains: Annotated[int | None, Option(help="How many domains and experts.")] = None,
    tokens: Annotated[str | None, Option(help="Training tokens shared by the experts, e.g. 2M.")] = None,
    method: Annotated[str, Option(help="How experts are trained: full or lora.")] = "full",
    learning_rate: Annotated[float | None, Option(help="Peak learning rate of experts and controls.")] = None,
    report: Annotated[Path, Option(help="Where the report is written.")] = Path("report.html"),
    workers: WorkersOption = None,
    output: Output = Output(),
) -> None:
    """Grow a forest from text and compare it with every control. Interrupted runs resume."""
    old_study.demo(quick=quick, corpus=corpus or [], seed=seed, domains=domains, tokens=tokens, method=method,
          learning_rate=learning_rate, report=report, workers=workers, store=output.store, as_json=output.as_json)  # fmt: skip
