"""Verbs of evaluation: loss on held-out text, benchmarks, comparisons, admission."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from elmwood.cli import old_accept, old_benchmarks, old_compare, old_evaluation, old_table
from elmwood.cli.options import DocumentsOption, MixingOption, Output, WindowOption, WorkersOption


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


def compare(
    a: Annotated[str, Argument(help="What there is: a seed, expert, ensemble or forest; name or digest.")],
    b: Annotated[str, Argument(help="What may be better, of the same seed.")],
    partition: Annotated[str | None, Option(help="Whose holdout; default: the second model's, or the first's.")] = None,
    length: WindowOption = None,
    documents: DocumentsOption = None,
    min_effect: Annotated[float, Option(help="The least gain worth having, bits per byte where they can differ.")] = 0.002,
    alpha: Annotated[float, Option(help="How often 'better' may be wrong.")] = 0.05,
    beta: Annotated[float, Option(help="How often 'not better by the least effect' may be wrong.")] = 0.1,
    cap: Annotated[int, Option(help="Blocks of 2 KiB, then it stays undecided.")] = 5000,
    clip: Annotated[float, Option(help="Bits per byte a block counts for at most, where mathematics knows no bound.")] = 0.5,
    plot: Annotated[Path | None, Option(help="Draw wealth over blocks into this SVG file.")] = None,
    output: Output = Output(),
) -> None:
    """Is B better than A? Runs both only on as many held-out blocks as it takes to know."""
    old_compare.compare(a=a, b=b, partition=partition, length=length, documents=documents, min_effect=min_effect, alpha=alpha,
          beta=beta, cap=cap, clip=clip, plot=plot, store=output.store, as_json=output.as_json)  # fmt: skip


def accept(
    expert: Annotated[str, Argument(help="Who asks: an expert; name or digest.")],
    forest: Annotated[str, Argument(help="What it asks to join: a forest, or an ensemble whose settings are used.")],
    length: WindowOption = None,
    documents: DocumentsOption = None,
    cap: Annotated[int, Option(help="Blocks of 2 KiB for each question at most.")] = 5000,
    clip: Annotated[float, Option(help="Bits per byte a block counts for at most, where mathematics knows no bound.")] = 0.5,
    name: Annotated[str | None, Option("--name", help="Call the forest with the expert in it this, if it is accepted.")] = None,
    output: Output = Output(),
) -> None:
    """May an expert join a forest? Prints every check with its value and threshold; keeps the verdict."""
    old_accept.accept(expert=expert, forest=forest, length=length, documents=documents, cap=cap, clip=clip, name=name, store=output.store,
          as_json=output.as_json)  # fmt: skip
