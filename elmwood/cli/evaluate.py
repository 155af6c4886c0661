"""Verbs of evaluation: loss on held-out text, benchmarks, comparisons, admission."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from typer import Argument, Option

from elmwood.cli.options import DocumentsOption, MixingOption, Output, RoutingOption, WindowOption, WorkersOption, pairs_of
from elmwood.cli.screen import bars, emit, out, talk
from elmwood.cli.screen import table as print_table
from elmwood.ranges import NewFile
from elmwood.records import Comparison
from elmwood.report.contest import headline, lines
from elmwood.report.plots import Series, experts_plot, wealth_plot
from elmwood.study.quality import admission, contest, evaluation, forest_table
from elmwood.units import duration, short

STYLES = {"seed": "", "control": "cyan", "result": "green", "bound": "dim"}
PRECISION = "as each model is stored"


class HeldOut(NamedTuple):
    """Which held-out text, in what windows."""

    length: WindowOption = None
    documents: DocumentsOption = None


class Benchmarks(NamedTuple):
    """Standard benchmarks instead of held-out text."""

    tasks: Annotated[str | None, Option(help="Standard benchmarks instead: tasks of lm-evaluation-harness, by comma.")] = None
    limit: Annotated[int | None, Option(help="Items of each task, the same for every model; default: all.")] = None
    folder: Annotated[Path | None, Option("--tasks-folder", help="Your own tasks: the harness's YAML files and their data.")] = None
    download: Annotated[bool, Option("--download", help="Let tasks fetch their data.")] = False
    bos: Annotated[str, Option(help="Before each text of a task: what its tokenizer adds, always a bos, or never.")] = "tokenizer"


def evaluate(
    models: Annotated[list[str], Argument(help="Seeds, experts, merges, ensembles or forests: names or digests.")],
    mixing: MixingOption = None,
    settings: RoutingOption = None,
    partition: Annotated[str | None, Option(help="Whose held-out text; default: the first forest's or expert's.")] = None,
    text: HeldOut = HeldOut(),
    router: Annotated[
        str | None, Option(help="Of the fitted ensemble: centroid, sparse, live or posterior; default: the best of the first three.")
    ] = None,
    name: Annotated[
        str | None, Option("--name", help="Call the fitted ensemble of a forest this, or an ensemble with other settings.")
    ] = None,
    benchmarks: Benchmarks = Benchmarks(),
    workers: WorkersOption = None,
    output: Output = Output(),
) -> None:
    """Bits per byte on held-out documents, with every routing of a forest; or, with --tasks, benchmarks."""
    if benchmarks.tasks is not None:
        with bars() as progress:
            found = evaluation.benchmark(
                models, mixing=mixing, settings=pairs_of(settings), store=output.store, progress=progress, **benchmarks._asdict()
            )
        return _print_benchmarks(found, output.as_json)
    with bars() as progress:
        made = evaluation.evaluate(
            models, mixing=mixing, settings=pairs_of(settings), partition=partition, router=router, name=name, workers=workers,
            store=output.store, progress=progress, **text._asdict(),
        )  # fmt: skip
    comparison, fitted = made.record, made.fitted
    if made.claimed:
        talk.print(f"scores claimed by another store, not checked here: {', '.join(made.claimed)}", soft_wrap=True)
    if fitted and name:
        talk.print(f"{fitted.digest}  {name}  ({fitted.router}, top-{fitted.top_k}, temperature {fitted.temperature:.3g})")
    if output.as_json:
        return emit(comparison.model_dump(mode="json") | {"digest": comparison.digest, "domains": made.domains})
    print_comparison(comparison)
    if comparison.forest is None:
        _print_domains(comparison, made.domains)


def print_comparison(comparison: Comparison) -> None:
    """The table of results and controls."""
    has_gains = any(row.gain is not None for row in comparison.rows)
    head = ["", "bits/byte", "±", "ppl"]
    head += ["gain", "±"] if has_gains else []
    rows = []
    for row in comparison.rows:
        cells = [row.name, f"{row.bits_per_byte:.4f}", f"{row.standard_error:.4f}", f"{row.perplexity:.4g}"]
        cells += [_number(row.gain, "+.4f"), _number(row.gain_error, ".4f")] if has_gains else []
        rows.append(cells)
    gain = "; gain over the strongest dense control, paired" if has_gains else ""
    styles = [STYLES[row.role] for row in comparison.rows]
    print_table(f"bits per byte on held-out documents (test half){gain}", head, rows, styles)


def _print_domains(comparison: Comparison, domains: Sequence[str]) -> None:
    """Models side by side in each domain, then by domains, then by bytes."""
    head = ["", *(row.name for row in comparison.rows)]
    losses = [(name, [row.domains[place] for row in comparison.rows]) for place, name in enumerate(domains)]
    losses += [("macro: mean of the domains", [row.macro for row in comparison.rows])]
    losses += [("micro: by bytes", [row.bits_per_byte for row in comparison.rows])]
    rows = [[name, *(_number(value, ".4f") for value in values)] for name, values in losses]
    print_table("bits per byte of each domain", head, rows, [*[""] * len(domains), "cyan", "cyan"])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _print_benchmarks(found: Sequence[evaluation.Benchmarked], as_json: bool) -> None:
    """A line for each task and metric, a column for each model."""
    if as_json:
        return emit([{"name": one.name, "model": one.record.digest, **one.results} for one in found])
    first, rows, styles = found[0].results, [], []
    for name, task in first["tasks"].items():
        for metric in task["metrics"]:
            values = [one.results["tasks"][name]["metrics"][metric] for one in found]
            rows.append([name, task["version"], f"{task['items']}/{task['of']}", metric, *_with_errors(values)])
            styles.append("")
    for name, metrics in first["groups"].items():
        for metric in metrics:
            rows.append([name, "", "group", metric, *_with_errors([one.results["groups"][name][metric] for one in found])])
            styles.append("cyan")
    head = ["task", "version", "items", "metric", *(cell for one in found for cell in (one.name, "±"))]
    begins = first["bos"]["begins_with"]
    print_table(
        f"lm-evaluation-harness {first['lm_eval']}; items chosen by hash; each text begins with {begins or 'no special token'}",
        head, rows, styles,
    )  # fmt: skip
    for one in found:
        computed = one.results["asked"]
        talk.print(f"{one.name}: model {one.record.digest[:12]}, {computed} requests computed, the others known", style="dim")
        if unlike := one.results["not_applied"]:
            settings = ", ".join(f"{name} {value}" for name, value in unlike.items())[:200]
            talk.print(f"{one.name}: lm-eval's hf also applies {settings} of the seed to what it generates; here it is not", style="yellow")


def _with_errors(values: Sequence[dict[str, float | None]]) -> list[str]:
    found = [one[part] for one in values for part in ("value", "standard_error")]
    return ["" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}" for value in found]


def table(
    forest: Annotated[str, Argument(help="A forest, or an ensemble of one: name or digest.")],
    choose: Annotated[int | None, Option(help="Choose this many experts, one by one; default: as long as one more helps.")] = None,
    candidate: Annotated[list[str] | None, Option(help="An expert that may join: would it help? (repeatable)")] = None,
    near: Annotated[int | None, Option(help="Score experts only where they are among this many nearest; the rest is bounded.")] = None,
    top_k: Annotated[int, Option(help="Experts with weight at each token, for a forest.")] = 2,
    partition: Annotated[str | None, Option(help="Whose held-out text; default: the forest's.")] = None,
    text: HeldOut = HeldOut(),
    budget: Annotated[str | None, Option(help="Run at most this many tokens, e.g. 5M; run again to continue.")] = None,
    seconds: Annotated[float | None, Option(help="Run no longer than this.")] = None,
    source: Annotated[Path | None, Option("--from", help="Another store: take over its columns of these models.")] = None,
    plot: Annotated[Path | None, Option(help="Draw loss against the number of experts into this SVG."), NewFile()] = None,
    workers: WorkersOption = None,
    output: Output = Output(),
) -> None:
    """Best weights of a forest's experts, the value of each and which to keep. Each model is run at most once."""
    with bars() as progress:
        made = forest_table.table(
            forest, choose=choose, candidate=candidate or (), near=near, top_k=top_k, partition=partition, budget=budget, seconds=seconds,
            source=source, workers=workers, store=output.store, progress=progress, **text._asdict(),
        )  # fmt: skip
    if plot:
        test = [one.test for one in made.chosen]
        line = Series("chosen one by one", range(1, len(test) + 1), [one.value for one in test], [one.standard_error for one in test])
        plot.write_text(experts_plot([line], reference=("seed", made.seed.value)), encoding="utf-8")
    if output.as_json:
        return emit(_table_json(made))
    _print_experts(made)
    for text_line in _table_lines(made):
        out.print(text_line, soft_wrap=True)
    if plot:
        talk.print(f"loss against the number of experts: {plot}")


def _print_experts(made: forest_table.ForestTable) -> None:
    order = {one.place: n for n, one in enumerate(made.chosen, 1)}
    rows = [
        [one.name, f"{one.weight:.4f}", f"{one.value:+.5f}", str(order.get(e, "")),
         f"{made.chosen[order[e] - 1].test.value:.4f}" if e in order else ""]
        for e, one in sorted(enumerate(made.experts), key=lambda item: order.get(item[0], len(order) + 1))
    ]  # fmt: skip
    title = "value: loss without the expert; chosen: its place in the order chosen on the tune half, and the loss with those up to it"
    print_table(title, ["expert", "static weight", "value", "chosen", "bits/byte"], rows)


def _table_lines(made: forest_table.ForestTable) -> list[str]:
    routing, cost, static, routed = made.routing, made.cost, made.static, made.routed
    lines = [
        f"seed      {made.seed.value:.4f} ± {made.seed.standard_error:.4f} bits per byte on the test half",
        f"routed    {routed.loss.value:.4f} ± {routed.loss.standard_error:.4f} ({routing.router}, top-{routing.top_k}, temperature "
        f"{routing.temperature:.3g})",
        f"static    {static.loss.value:.4f} ± {static.loss.standard_error:.4f}, the seed's weight {static.seed_weight:.3f}",
        f"          no weights are better by more than {static.gap:.1e} nats per token ({static.passes} passes)",
        f"cost      {cost.models_run} models run, {short(cost.tokens)} tokens in {duration(cost.seconds)}",
        f"          {cost.brought} columns brought in; {made.looked} subsets tried for the choice, none run",
    ]
    if cost.claimed:
        lines.append(f"claimed   by another store, not checked here: {', '.join(cost.claimed)}")
    if cost.known < 1:
        least, most = (f"{end:.4f}" if end is not None else "an unknown loss" for end in (routed.least, routed.most))
        lines.append(f"missing   {1 - cost.known:.0%} of all entries, replaced by the seed's; whatever they are, the routed loss is")
        lines.append(f"          between {least} and {most}; {short(cost.missing)} tokens remain to be run")
    for one in made.candidates:
        word = "would help" if one.ratio > 1 else "would not help"
        error = float("nan") if one.error is None else one.error
        lines.append(f"new       {one.name} {word}: mean p_new / p_mix {one.ratio:.4f} ± {error:.4f} over {one.tokens:,} tokens")
    return lines


def _table_json(made: forest_table.ForestTable) -> dict[str, Any]:
    routing, static, routed = made.routing, made.static, made.routed
    return {
        "forest": made.record.digest, "holdout": made.holdout, "protocol": made.protocol, "router": routing.router,
        "temperature": routing.temperature, "top_k": routing.top_k, "seed_joins": routing.seed_distance is not None,
        "cost": made.cost._asdict(), "seed": made.seed._asdict(),
        "routed": routed.loss._asdict() | {"least": routed.least, "most": routed.most},
        "static": static.loss._asdict() | {
            "gap_nats_per_token": static.gap, "passes": static.passes, "seed_weight": static.seed_weight,
        },
        "experts": [one._asdict() for one in made.experts],
        "chosen": [{"place": one.place, "tune": one.tune, "test": one.test._asdict()} for one in made.chosen],
        "looked": made.looked, "candidates": [one._asdict() for one in made.candidates],
    }  # fmt: skip


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
    plot: Annotated[Path | None, Option(help="Draw wealth over blocks into this SVG file."), NewFile()] = None,
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
        plot.write_text(
            wealth_plot(finding.for_T, finding.against_T, alpha=alpha, beta=beta, names=("better", "not better")), encoding="utf-8"
        )
    machine = {"machine": platform.machine(), "precision": PRECISION}
    if output.as_json:
        facts = {"digest": record.digest, "overall": finding.effect * finding.share, **cost._asdict(), **machine}
        return emit(record.model_dump(mode="json") | facts | {"plot": plot and str(plot)})
    out.print(headline(record), style="bold", soft_wrap=True)
    facts_by_word = lines(record)
    tokens = f"{short(cost.tokens_forwarded)} forwarded; running what is missing on all blocks: {short(cost.full_tokens)}"
    run = f"{cost.models_known} models were known, {cost.models_run} were run, on {machine['machine']}, {PRECISION}"
    for word, line in (*facts_by_word[:2], ("tokens", tokens), *facts_by_word[2:-1], ("models", run), facts_by_word[-1]):
        out.print(f"{word:<9} {line}", soft_wrap=True)
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
        out.print(f"{'passed' if check.passed else 'FAILED':<7} {value:>13}  {threshold:<18} {check.name}", soft_wrap=True)
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
        out.print(f"blocks drawn: {drawn}; {short(cost.tokens_forwarded)} tokens forwarded", soft_wrap=True)
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
