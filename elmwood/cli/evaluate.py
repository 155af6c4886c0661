"""Verbs of evaluation: loss on held-out text, benchmarks, comparisons, admission."""

import platform
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from typer import Argument, Option

from elmwood.cli import old_benchmarks, old_evaluation, old_table
from elmwood.cli.options import DocumentsOption, MixingOption, Output, WindowOption, WorkersOption
from elmwood.cli.screen import bars, emit, out, short, talk
from elmwood.report.contest import headline, lines
from elmwood.report.wealth import wealth_plot
from elmwood.study import admission, contest

PRECISION = "as each model is stored"


class HeldOut(NamedTuple):
    """Which held-out text, in what windows."""

    length: WindowOption = None
    documents: DocumentsOption = None


def evaluate(
    models: Annotated[list[str], Argument(help="Seeds, experts, merges, ensembles or forests: names or digests.")],
    mixing: MixingOption = None,
    partition: Annotated[str | None, Option(help="Whose holdout; default: the first forest's or expert's.")] = None,
    length: WindowOption = None,
    documents: DocumentsOption = None,
    router: Annotated[
        str | None, Option(help="Of the fitted ensemble: centroid, sparse, live or posterior; default: the best of the first three.")
    ] = None,
    name: Annotated[str | None, Option("--name", help="Call the fitted ensemble of a forest this.")] = None,
    tasks: Annotated[str | None, Option(help="Standard benchmarks instead: tasks of lm-evaluation-harness, by comma.")] = None,
    limit: Annotated[int | None, Option(help="Items of each task, the same for every model; default: all.")] = None,
    folder: Annotated[Path | None, Option("--tasks-folder", help="Your own tasks: the harness's YAML files and their data.")] = None,
    download: Annotated[bool, Option("--download", help="Let tasks fetch their data.")] = False,
    workers: WorkersOption = None,
    output: Output = Output(),
) -> None:
    """Bits per byte on held-out documents, with every routing of a forest; or, with --tasks, benchmarks."""
    if tasks is not None:
        old_benchmarks.benchmarks(models=models, mixing=mixing, tasks=tasks, limit=limit, folder=folder, download=download,
              store=output.store, as_json=output.as_json)  # fmt: skip
        return
    old_evaluation.evaluate_verb(models=models, mixing=mixing, partition=partition, length=length, documents=documents,
          router=router, name=name, workers=workers, store=output.store, as_json=output.as_json)  # fmt: skip


def table(
    forest: Annotated[str, Argument(help="A forest, or an ensemble of one: name or digest.")],
    choose: Annotated[int | None, Option(help="Choose so many experts, one by one; default: as long as one more helps.")] = None,
    candidate: Annotated[list[str] | None, Option(help="An expert that may join: would it help? (repeatable)")] = None,
    near: Annotated[int | None, Option(help="Score experts only where they are among so many nearest; the rest is bounded.")] = None,
    top_k: Annotated[int, Option(help="Experts that speak at once, for a forest.")] = 2,
    partition: Annotated[str | None, Option(help="Whose holdout; default: the forest's.")] = None,
    length: WindowOption = None,
    documents: DocumentsOption = None,
    budget: Annotated[str | None, Option(help="Run at most so many tokens, e.g. 5M; run again to go on.")] = None,
    seconds: Annotated[float | None, Option(help="Run no longer than this.")] = None,
    source: Annotated[Path | None, Option("--from", help="Another store: take its columns of these models over.")] = None,
    plot: Annotated[Path | None, Option(help="Draw loss against the number of experts into this SVG.")] = None,
    workers: WorkersOption = None,
    output: Output = Output(),
) -> None:
    """Best weights of a forest's experts, the value of each and which to keep. Each model is run at most once."""
    old_table.table(forest=forest, choose=choose, candidate=candidate or [], near=near, top_k=top_k, partition=partition,
          length=length, documents=documents, budget=budget, seconds=seconds, source=source, plot=plot, workers=workers, store=output.store,
          as_json=output.as_json)  # fmt: skip


class Samples(NamedTuple):
    """How many blocks a test may draw, and what one counts."""

    cap: Annotated[int, Option(help="Blocks of 2 KiB that a test may draw.")] = 5000
    clip: Annotated[float, Option(help="Most bits per byte that a block counts, where no bound is certain.")] = 0.5


def compare(
    a: Annotated[str, Argument(help="The present model: a seed, expert, ensemble or forest; name or digest.")],
    b: Annotated[str, Argument(help="The model that may be better, of the same seed.")],
    partition: Annotated[str | None, Option(help="Whose held-out text; default: the second model's, or the first's.")] = None,
    text: HeldOut = HeldOut(),
    min_effect: Annotated[float, Option(help="The least gain worth having, bits per byte where the two can differ.")] = 0.002,
    alpha: Annotated[float, Option(help="How often 'better' may be wrong.")] = 0.05,
    beta: Annotated[float, Option(help="How often 'not better by the least effect' may be wrong.")] = 0.1,
    samples: Samples = Samples(),
    plot: Annotated[Path | None, Option(help="Draw wealth over blocks into this SVG file.")] = None,
    output: Output = Output(),
) -> None:
    """Is B better than A? Runs both only on as many held-out blocks as it takes to know."""
    with bars() as progress:
        found = contest.compare(
            a, b, partition=partition, min_effect=min_effect, alpha=alpha, beta=beta, store=output.store, progress=progress,
            **text._asdict(), **samples._asdict(),
        )  # fmt: skip
    record, (finding, cost) = found.record, found[1:]
    if plot:
        plot.write_text(wealth_plot(finding.for_T, finding.against_T, alpha=alpha, beta=beta, names=("better", "not better")))
    machine = {"machine": platform.machine(), "precision": PRECISION}
    if output.as_json:
        facts = {"digest": record.digest, "overall": finding.effect * finding.share, **cost._asdict(), **machine}
        return emit(record.model_dump(mode="json") | facts | {"plot": plot and str(plot)})
    out.print(headline(record), style="bold", soft_wrap=True)
    said = lines(record)
    tokens = f"{short(cost.tokens_forwarded)} forwarded; running what is missing on all blocks: {short(cost.full_tokens)}"
    run = f"{cost.models_known} models were known, {cost.models_run} were run, on {machine['machine']}, {PRECISION}"
    for word, line in (*said[:2], ("tokens", tokens), *said[2:-1], ("models", run), said[-1]):
        out.print(f"{word:<9} {line}", soft_wrap=True, markup=False)
    if plot:
        talk.print(f"wealth over blocks: {plot}")


def accept(
    expert: Annotated[str, Argument(help="The expert: name or digest.")],
    forest: Annotated[str, Argument(help="The forest to join, or an ensemble whose settings are used.")],
    text: HeldOut = HeldOut(),
    samples: Samples = Samples(),
    name: Annotated[str | None, Option("--name", help="Name of the forest with the expert in it, if it is accepted.")] = None,
    output: Output = Output(),
) -> None:
    """May an expert join a forest? Prints every check with its value and threshold; keeps the verdict."""
    with bars() as progress:
        made = admission.accept(
            expert, forest, name=name, store=output.store, progress=progress, on_submission=_print_submission,
            **text._asdict(), **samples._asdict(),
        )  # fmt: skip
    if output.as_json:
        return emit(_admission_json(made))
    verdict = made.record
    out.print(f"{verdict.digest}  {expert} {'may join' if verdict.accepted else 'may not join'} {forest}", style="bold", soft_wrap=True)
    for check in verdict.checks:
        value = "not measured" if check.value is None else f"{check.value:+.4f}"
        threshold = "no threshold" if check.threshold is None else f"{check.side} {check.threshold:g}"
        out.print(f"{'passed' if check.passed else 'FAILED':<7} {value:>13}  {threshold:<18} {check.name}", soft_wrap=True, markup=False)
    _print_cost(made)


def _print_submission(submission: admission.Submission) -> None:
    talk.print(f"submission {submission.number + 1}: the order is {submission.commitment}", soft_wrap=True)


def _print_cost(made: admission.Admission) -> None:
    if made.evidence is None:
        out.print("another process submitted the same expert at the same time: this is its verdict", soft_wrap=True)
    elif made.submission is None:
        out.print("its weights decided: nothing was drawn, and no error budget was spent", soft_wrap=True)
    else:
        one, cost = made.submission, made.cost
        drawn = ", ".join(f"{what} {count:,}" for what, count in cost.blocks.items() if count is not None)
        out.print(f"blocks drawn: {drawn}; {short(cost.tokens_forwarded)} tokens forwarded", soft_wrap=True, markup=False)
        out.print(
            f"submission {one.number + 1}, error level {one.level:.4g}; from a slice of {one.slice_G.sum():,} blocks, in the order of key "
            f"{one.key.hex()[:16]}…, sealed before as {one.commitment[:20]}…", soft_wrap=True,
        )  # fmt: skip


def _admission_json(made: admission.Admission) -> dict[str, Any]:
    found: dict[str, Any] = {
        "digest": made.record.digest, "verdict": made.record.model_dump(mode="json"),
        "evidence": made.evidence and made.evidence.model_dump(mode="json"), "tokens_forwarded": made.cost.tokens_forwarded,
    }  # fmt: skip
    if (one := made.submission) is None:
        return found
    return found | {
        "blocks": made.cost.blocks, "holdout": made.record.holdout, "clip": made.cost.clip, "level": one.level,
        "submission": one.number + 1, "sealed": one.commitment, "key": one.key.hex(), "slice_blocks": int(one.slice_G.sum()),
    }  # fmt: skip
