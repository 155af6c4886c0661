"""The demo: the whole experiment in one command."""

import time
from pathlib import Path
from typing import Annotated

from typer import Option

from elmwood.cli.options import Output, WorkersOption
from elmwood.cli.screen import bars, emit, out, table, talk
from elmwood.engine import NOTE
from elmwood.ranges import NewFile
from elmwood.records import Comparison
from elmwood.store import Store
from elmwood.study import demo as study
from elmwood.study import page
from elmwood.study.quality.evaluation import conclusion, with_seconds
from elmwood.units import duration, short

LEGEND = """\
seed: the model all others start from. dense: one model trained further on all the text, with as many tokens as all experts
together; its batch is that of an expert, k times as large (one batch for k machines), or between. uniform: all experts alike.
live, c-BTM, sparse, posterior: how the experts near the text are weighted. random clusters: the same with experts of random parts
of the text. oracle: each document by the expert of its own domain. gain: over the strongest dense model; ± is one standard error."""
NEXT = """\
Try next:
  elmwood chat demo/ensemble --prompt "func main() {"     text, and which experts wrote it
  elmwood show demo/forest                                what it was made from
  elmwood table demo/ensemble                             what each expert is worth
  elmwood demo --corpus your.jsonl                        the same on your own text"""
SHOWN = ("read", "find near-duplicates", "seed", "train and score")  # progress; everything else takes seconds
STYLES = {"seed": "", "control": "cyan", "result": "green", "bound": "dim"}


def demo(
    quick: Annotated[bool, Option("--quick", help="A minute: fewer domains, documents and tokens.")] = False,
    corpus: Annotated[list[str] | None, Option(help="Your own text instead of the bundled sample (repeatable).")] = None,
    seed: Annotated[str | None, Option(help="A seed you have (name or digest) instead of the packaged one.")] = None,
    from_scratch: Annotated[bool, Option("--from-scratch", help="Train the seed here instead of taking the packaged one.")] = False,
    domains: Annotated[int | None, Option(help="How many domains and experts.")] = None,
    tokens: Annotated[str | None, Option(help="Training tokens shared by the experts, e.g. 2M.")] = None,
    method: Annotated[str, Option(help="How experts are trained: full or lora.")] = "full",
    learning_rate: Annotated[float | None, Option(help="Peak learning rate of experts and controls.")] = None,
    report: Annotated[Path, Option(help="Where the report is written."), NewFile()] = Path("report.html"),
    workers: WorkersOption = None,
    output: Output = Output(),
) -> None:
    """Grow a forest from text and compare it with every control. Interrupted runs resume."""
    started, took = time.perf_counter(), "about a minute" if quick else "about three minutes on two cores"
    talk.print(f"Elmwood trains small expert models on parts of a text and compares their ensemble with ordinary training: {took}.\n"
               f"You can stop it at any time: the same command resumes. The report will be in {report}.", soft_wrap=True)  # fmt: skip
    with bars() as show:

        def progress(what: str, done: float, total: float, unit: str) -> None:
            if what in SHOWN or unit == NOTE:
                show(what, done, total, unit)

        made = study.demo(
            corpus or [study.SAMPLE], quick=quick, from_scratch=from_scratch, seed=seed, domains=domains, tokens=tokens, method=method,
            learning_rate=learning_rate, workers=workers, store=output.store, progress=progress, on_phase=print_phase,
        )  # fmt: skip
    page.report(made.comparison, output=report, store=output.store)
    if output.as_json:
        shown = with_seconds(made.comparison, Store(output.store))
        emit(shown.model_dump(mode="json") | {"digest": made.comparison.digest, "report": str(report)})
        return
    print_table(made.comparison)
    out.print(LEGEND, style="dim", soft_wrap=True)
    out.print(f"\n{conclusion(made.comparison)}\n", style="bold", soft_wrap=True)
    if made.remade:
        talk.print(remade(made.remade), soft_wrap=True)
    out.print(NEXT, soft_wrap=True, markup=False)
    talk.print(f"{duration(time.perf_counter() - started)}; report: {report}", soft_wrap=True)


def print_phase(phase: study.Phase) -> None:
    """What begins, in plain words."""
    talk.print(f"{phase.number} of {study.PHASES}  {phase.text}", style="bold", soft_wrap=True)


def print_table(comparison: Comparison) -> None:
    """One line for each model, the chosen ensemble marked."""
    rows, styles = [], []
    for row in comparison.rows:
        gain = ["", ""] if row.gain is None else [f"{row.gain:+.4f}", f"{row.gain_error:.4f}"]
        name = f"{row.name} *" if row.name == comparison.chosen else row.name
        rows.append([name, f"{row.bits_per_byte:.4f}", *gain, "" if row.tokens is None else short(row.tokens)])
        styles.append(STYLES[row.role])
    head = ["", "bits per byte", "gain", "±", "tokens trained"]
    table("Held-out text: fewer bits per byte is better (* chosen on the other half of the documents)", head, rows, styles)


def remade(found: study.Remade) -> str:
    """How a seed trained here compares with the packaged one."""
    if found.same:
        return "The seed trained here has the same bytes as the packaged one."
    return (
        f"The seed trained here differs from the packaged one by at most {found.difference:.1e} of the largest weight: another kind of "
        "processor, or another version of torch, adds its floats in another order."
    )
