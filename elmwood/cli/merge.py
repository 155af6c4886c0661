"""Verbs of merging: experts into one checkpoint, and the sums they are made from."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from typer import Argument, Option

from elmwood.cli.options import (
    DocumentsOption,
    EngineOption,
    ExpertsArgument,
    LayersOption,
    NameOption,
    Output,
    SettingOption,
    TensorsOption,
    WeightsOption,
    WorkersOption,
    pairs_of,
)
from elmwood.cli.screen import bars, emit, made, out, table, talk
from elmwood.errors import BadInput
from elmwood.report.contest import headline, lines
from elmwood.study import merging
from elmwood.study.merging import Merges
from elmwood.study.quality.selection import BY_LAYER, ChosenMerge, Ranked
from elmwood.units import duration, short

OwnRuleOption = Annotated[str | None, Option("--method", help="The rule, where it is one of your own: module:function.")]
PartOption = Annotated[str, Option(help="Sum this share of every tensor alone: 0/4 to 3/4.")]
ScaleOption = Annotated[str | None, Option(help="What is added to the seed is multiplied by this; several: 0.3,0.5,1.")]
StateArgument = Annotated[str, Argument(help="Name, digest, or a folder written by export.")]
StatesArgument = Annotated[list[str], Argument(help="Names, digests, or folders written by export.")]
BY = {
    "statistics": "estimates from statistics alone, no model run (in {}): distance from all experts by their Fisher matrices",
    "columns": "some expert left no statistics, so estimates are from columns, no merge run (in {}): log-linear pools, bits per byte",
}


class MemberOptions(NamedTuple):
    """How experts enter a merge."""

    weights: WeightsOption = None
    layers: LayersOption = None
    tensors: TensorsOption = ""


class SelectionOptions(NamedTuple):
    """How one of several answers is chosen."""

    choose: Annotated[bool, Option("--choose", help="Of several answers name the best on the tune half of held-out text.")] = False
    per_layer: Annotated[bool, Option("--per-layer", help="With --choose: go on from the best, layer by layer.")] = False
    run: Annotated[int | None, Option(help="With --choose: score only so many answers, the best by estimates.")] = None
    partition: Annotated[str | None, Option(help="Whose held-out text; default: the first expert's.")] = None
    documents: DocumentsOption = None


class TaskOptions(NamedTuple):
    """How a merge is shared out."""

    parts: Annotated[int | None, Option(help="Sum in so many tasks, each a share of every tensor.")] = None
    workers: WorkersOption = None
    engine: EngineOption = "local"


def merge(
    experts: Annotated[list[str], Argument(help="A forest, experts (NAME/ stands for all so named), or a mergekit YAML file.")],
    method: Annotated[str | None, Option(help="A merge rule or module:function, default average; several: ties,dare.")] = None,
    members: MemberOptions = MemberOptions(),
    scale: ScaleOption = None,
    density: Annotated[str | None, Option(help="Share of values that trimming keeps; several: 0.2,0.5.")] = None,
    rank: Annotated[str | None, Option(help="Of an adapter that is made of adapters; several: 8,16.")] = None,
    settings: SettingOption = None,
    resize: Annotated[bool, Option("--resize", help="Experts of another vocabulary: merge the rows they share.")] = False,
    selection: SelectionOptions = SelectionOptions(),
    tasks: TaskOptions = TaskOptions(),
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Merge experts into one checkpoint, or adapters into one adapter. Several settings give several merges."""
    with bars() as progress:
        done = merging.merge(
            experts, method=method and method.split(","), weights=weights_of(members.weights), layers=layers_of(members.layers),
            tensors=members.tensors, scale=values_of("scale", scale), density=values_of("density", density),
            rank=values_of("rank", rank), settings=settings_of(settings), resize=resize, **selection._asdict(), **tasks._asdict(),
            name=name, store=output.store, progress=progress,
        )  # fmt: skip
    if done.choice:
        _print_choice(done, done.choice, name, output.as_json)
    else:
        _print_merges(done, name, output.as_json)


def state_make(
    experts: ExpertsArgument,
    method: Annotated[str, Option(help="A merge rule, or module:function.")] = "average",
    members: MemberOptions = MemberOptions(),
    density: Annotated[float | None, Option(help="Share of values that trimming keeps.")] = None,
    settings: SettingOption = None,
    part: PartOption = "0/1",
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Sum one or more experts under a merge rule: what another machine can add to its own sum."""
    index, _, count = part.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise BadInput(f"--part {part!r}: write 0/4 for the first of four parts")
    with bars() as progress:
        state = merging.state_make(
            experts, method=method, weights=weights_of(members.weights), layers=layers_of(members.layers),
            tensors=members.tensors, density=density, settings=settings_of(settings), part=(int(index), int(count)), name=name,
            store=output.store, progress=progress,
        )  # fmt: skip
    made(state, name, output.as_json)


def state_add(states: StatesArgument, method: OwnRuleOption = None, name: NameOption = None, output: Output = Output()) -> None:
    """Add states. An expert that is in several counts once."""
    made(merging.state_add(states, output.store, method=method, name=name), name, output.as_json)


def state_remove(
    state: StateArgument,
    experts: Annotated[list[str], Argument(help="Names or digests; NAME/ stands for all experts so named.")],
    method: OwnRuleOption = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Subtract experts from a state, exactly."""
    with bars() as progress:
        rest = merging.state_remove(state, experts, output.store, method=method, name=name, progress=progress)
    made(rest, name, output.as_json)


def state_finalize(
    states: Annotated[list[str], Argument(help="A state, or all parts of one: names, digests, or folders written by export.")],
    method: OwnRuleOption = None,
    scale: ScaleOption = None,
    settings: SettingOption = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Turn states into a checkpoint. No expert is read."""
    with bars() as progress:
        done = merging.state_finalize(
            states, output.store, method=method, scale=values_of("scale", scale), settings=settings_of(settings), name=name,
            progress=progress,
        )  # fmt: skip
    _print_merges(done, name, output.as_json)


# ---- what was typed -------------------------------------------------------------------------------------------------


def number_of(name: str, text: str) -> float:
    """Raises BadInput."""
    try:
        return float(text)
    except ValueError as error:
        raise BadInput(f"{name} {text!r} is not a number") from error


def values_of(name: str, text: str | None) -> list[float] | None:
    """'0.3,0.5' -> [0.3, 0.5]. Raises BadInput."""
    return None if text is None else [number_of(name, one) for one in text.split(",")]


def weights_of(text: str | None) -> list[list[float]] | None:
    """'1,0.5' -> a weight for each expert; '0:1' -> a gradient from the first layer to the last. Raises BadInput."""
    return None if text is None else [[number_of("weight", one) for one in each.split(":")] for each in text.split(",")]


def settings_of(texts: Sequence[str] | None) -> dict[str, list[float]]:
    """['gamma=0.1,0.2'] -> {'gamma': [0.1, 0.2]}. Raises BadInput."""
    return {name: [number_of(name, one) for one in value.split(",")] for name, value in pairs_of(texts).items()}


def layers_of(text: str | None) -> range | None:
    """'4-11' -> range(4, 12); '3' -> range(3, 4). Raises BadInput."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise BadInput(f"--layers {text!r} is no range of layers: write 4-11, both included, or one number")
    return range(int(first), int(last or first) + 1)


# ---- what was made --------------------------------------------------------------------------------------------------


def _print_merges(done: Merges, name: str | None, as_json: bool) -> None:
    if len(done.made) == 1:
        return made(done.record, name, as_json)
    rows = list(zip(merging.names_of(name, done.made), done.made.items(), strict=True))
    if as_json:
        return emit([{"name": called, "digest": one.digest, "record": one.model_dump(mode="json")} for called, (_, one) in rows])
    for called, (answer, record) in rows:
        out.print(f"{record.digest}  {called or answer}", soft_wrap=True)


def _print_choice(done: Merges, choice: ChosenMerge, name: str | None, as_json: bool) -> None:
    """What was chosen, why, and what it all cost."""
    test, _, cost = choice.test
    if choice.ranked:
        _print_ranked(choice.ranked)
    if as_json:
        return emit(_choice_json(done, choice, name))
    losses, behind = choice.tuned.losses, choice.tuned.behind
    rows = [[one, *(f"{value:.4f}" for value in (*losses[one], *behind[one]))] for one in done.made]
    table("bits per byte on the tune half, and behind the best (paired)", ["", "bits/byte", "±", "behind", "±"], rows, to=talk)
    if BY_LAYER in done.made:
        names = {record.digest: one for one, record in done.made.items()}
        talk.print("by layer: " + ", ".join(f"{layer} {names[digest]}" for layer, digest in done.made[BY_LAYER].layers.items()))
    talk.print(f"the search scored {choice.looked} models on {short(choice.tokens)} tokens, the test {short(cost.tokens_forwarded)}, in "
               f"{duration(choice.seconds)}")  # fmt: skip
    talk.print(f"on fresh blocks {headline(test)}: {dict(lines(test))['effect']}; {test.drawn:,} of {test.touched:,} blocks")
    out.print(f"{done.record.digest}  {name or choice.best}", soft_wrap=True)


def _print_ranked(ranked: Ranked) -> None:
    rows = [[one, f"{value:.4g}"] for one, value in sorted(ranked.total.items(), key=lambda item: item[1])]
    table(BY[ranked.by].format(duration(ranked.seconds)), ["", "estimate"], rows, to=talk)


def _choice_json(done: Merges, choice: ChosenMerge, name: str | None) -> dict[str, object]:
    test, _, tested = choice.test
    losses, behind = choice.tuned.losses, choice.tuned.behind
    answers = [
        {"answer": one, "digest": record.digest, "tune": losses[one]._asdict(), "behind": behind[one]._asdict()}
        for one, record in done.made.items()
    ]
    cost = {
        "answers": choice.looked,
        "tokens": choice.tokens,
        "tested_tokens": tested.tokens_forwarded,
        "seconds": round(choice.seconds, 1),
    }
    return {"name": name, "digest": done.record.digest, "record": done.record.model_dump(mode="json"), "answers": answers,
            "test": test.model_dump(mode="json"), "cost": cost}  # fmt: skip
