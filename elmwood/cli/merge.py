"""Verbs of merging: experts into one checkpoint, and the sums they are made from."""

from typing import Annotated

from typer import Argument, Option

from elmwood.cli import old_merge
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
)


def merge(
    experts: Annotated[list[str], Argument(help="A forest, experts (NAME/ stands for all so named), or a mergekit YAML file.")],
    method: Annotated[str | None, Option(help="A merge rule, default average; several: ties,dare.")] = None,
    weights: WeightsOption = None,
    scale: Annotated[str | None, Option(help="What is added to the seed is multiplied by this; several: 0.3,0.5,1.")] = None,
    density: Annotated[str | None, Option(help="Share of numbers that trimming keeps; several: 0.2,0.5.")] = None,
    rank: Annotated[str | None, Option(help="Of an adapter that is made of adapters; several: 8,16.")] = None,
    settings: SettingOption = None,
    layers: LayersOption = None,
    tensors: TensorsOption = "",
    resize: Annotated[bool, Option("--resize", help="Experts of another vocabulary: merge the rows they share.")] = False,
    choose: Annotated[bool, Option("--choose", help="Of several answers name the best on the tune half of held-out text.")] = False,
    per_layer: Annotated[bool, Option("--per-layer", help="With --choose: go on from the best, layer by layer.")] = False,
    run: Annotated[int | None, Option(help="With --choose: score only so many answers, the best by estimates.")] = None,
    partition: Annotated[str | None, Option(help="Whose held-out text; default: the first expert's.")] = None,
    documents: DocumentsOption = None,
    parts: Annotated[int | None, Option(help="Sum in so many tasks, each a share of every tensor.")] = None,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Merge experts into one checkpoint, or adapters into one adapter. Several settings give several merges."""
    old_merge.merge_verb(experts=experts, method=method, weights=weights, scale=scale, density=density, rank=rank,
          settings=settings or [], layers=layers, tensors=tensors, resize=resize, choose=choose, per_layer=per_layer, run=run,
          partition=partition, documents=documents, parts=parts, workers=workers, engine=engine, name=name, store=output.store,
          as_json=output.as_json)  # fmt: skip


def state_make(
    experts: ExpertsArgument,
    method: Annotated[str, Option(help="A merge rule.")] = "average",
    weights: WeightsOption = None,
    density: Annotated[str | None, Option(help="Share of numbers that trimming keeps.")] = None,
    settings: SettingOption = None,
    layers: LayersOption = None,
    tensors: TensorsOption = "",
    part: Annotated[str, Option(help="Sum this share of every tensor alone: 0/4 to 3/4.")] = "0/1",
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Sum one or more experts under a merge rule: what another machine can add to its own sum."""
    old_merge.state_make(experts=experts, method=method, weights=weights or "1", density=density, settings=settings or [],
          layers=layers, tensors=tensors, part=part, name=name, store=output.store, as_json=output.as_json)  # fmt: skip


def state_add(
    states: Annotated[list[str], Argument(help="Names, digests, or folders written by export.")],
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Add states. An expert that is in several counts once."""
    old_merge.state_add(states=states, name=name, store=output.store, as_json=output.as_json)


def state_remove(
    state: Annotated[str, Argument(help="Name, digest, or a folder written by export.")],
    experts: Annotated[list[str], Argument(help="Names or digests; NAME/ stands for all experts so named.")],
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Subtract experts from a state, exactly."""
    old_merge.state_remove(state=state, experts=experts, name=name, store=output.store, as_json=output.as_json)


def state_finalize(
    states: Annotated[list[str], Argument(help="A state, or all parts of one: names, digests, or folders written by export.")],
    scale: Annotated[str | None, Option(help="What is added to the seed is multiplied by this; several: 0.3,0.5,1.")] = None,
    settings: SettingOption = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Turn states into a checkpoint. No expert is read."""
    old_merge.state_finalize(states=states, scale=scale, settings=settings or [], name=name, store=output.store, as_json=output.as_json)
