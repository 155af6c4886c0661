"""Options that several verbs have, and records of options: a verb takes a record, the command line has an option for each field."""

import inspect
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import typer
from typer import Argument, Option
from typer.models import OptionInfo

from elmwood.engine import DEVICE
from elmwood.errors import BadInput
from elmwood.ranges import NewFile
from elmwood.store import Store

BELOW = "what is named depends on the method"  # a mark on an option --name, which the verb checks before its work
CorpusArgument = Annotated[list[str], Argument(help="JSON, CSV, Parquet, Arrow, text, folders of these, datasets:NAME, or 'sample'.")]
ExpertsArgument = Annotated[list[str], Argument(help="A forest, or experts; NAME/ means all experts with names below it.")]
StatesArgument = Annotated[list[str], Argument(help="Names, digests, or folders written by export.")]
DeviceOption = Annotated[
    str | None, Option(envvar="ELMWOOD_DEVICE", help="Where to compute: cpu, cuda, cuda:1, mps, xpu; default: the best there is.")
]
DocumentsOption = Annotated[int | None, Option(help="At most this many held-out documents.")]
EngineOption = Annotated[str, Option(help="Where tasks run: local, or ray.")]
LayersOption = Annotated[str | None, Option(help="Merge only these layers, e.g. 4-11; everything else stays the seed's.")]
MixingOption = Annotated[str | None, Option(help="Of an ensemble: outputs, weights, activated, geometric, median, bounded.")]
NameOption = Annotated[str | None, Option("--name", help="Name of the result.")]
PlotOption = Annotated[Path | None, Option(help="Draw the result into this SVG file."), NewFile()]
RngSeedOption = Annotated[int, Option(help="Seed of the random number generators.")]
RoutingOption = Annotated[list[str] | None, Option("--set", help="Of an ensemble: any of its settings, as top_k=4 (repeatable).")]
SettingOption = Annotated[list[str] | None, Option("--set", help="Any other setting of the rule: NAME=VALUE (repeatable).")]
TensorsOption = Annotated[str, Option(help="Merge only tensors with this in their name.")]
WeightsOption = Annotated[str | None, Option(help="Of the experts, in order: 1,0.5; one for all; 0:1 is a gradient over depth.")]
WindowOption = Annotated[int | None, Option(help="Tokens per window; default: the seed's context, at most 1024.")]
WorkersOption = Annotated[int | None, Option(help="Parallel processes; default: one per core for small models, else 1.")]


class Output(NamedTuple):
    """Where a verb finds its inputs and keeps its result, and how it prints it."""

    store: Annotated[Path, Option("--store", envvar="ELMWOOD_STORE", help="Folder of blobs, records and refs.")] = Path(".elmwood")
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of text.")] = False


class RecipeOptions(NamedTuple):
    """How a model is trained, as far as it decides the memory and time that training takes."""

    method: Annotated[str, Option(help="full, lora, qlora (the seed in four bits) or dora; of a mixture: router.")] = "lora"
    batch: Annotated[int, Option(help="Sequences per step.")] = 8
    length: Annotated[int | None, Option(help="Tokens per sequence; default: the seed's context, at most 1024.")] = None
    rank: Annotated[int, Option(help="Rank of the adapters.")] = 16
    late: Annotated[float, Option(help="Adapters only in the last share of the layers, e.g. 0.33.")] = 1.0
    accumulate: Annotated[int, Option(help="Passes the sequences of a step are spread over: less memory.")] = 1
    checkpointing: Annotated[bool, Option("--checkpointing", help="Recompute activations instead of keeping them: less memory.")] = False
    checkpointed: Annotated[float, Option(help="With --checkpointing: the share of the layers that recompute, e.g. 0.2.")] = 1.0
    optimiser: Annotated[str, Option(help="adamw, or adamw8bit: optimiser states in a quarter of the memory.")] = "adamw"
    together: Annotated[int, Option(help="Train this many LoRA experts at once, over one copy of the seed.")] = 1
    tuned: Annotated[str, Option(help="Of a mixture: routers, norms, shared or everything, each with those before it.")] = "routers"


class ScheduleOptions(NamedTuple):
    """The rest of what decides how experts and mixtures are trained."""

    tokens: Annotated[str, Option(help="Training tokens per expert, e.g. 2M.")] = "1M"
    learning_rate: Annotated[float | None, Option(help="Peak; default: by method and size of the seed.")] = None
    schedule: Annotated[str, Option(help="cosine, linear, constant or wsd.")] = "cosine"
    alpha: Annotated[float | None, Option(help="Adapters are scaled by alpha / rank; default: rank-stabilised.")] = None
    targets: Annotated[str, Option(help="Modules that get adapters, e.g. q_proj,v_proj.")] = "all-linear"
    patience: Annotated[int | None, Option(help="Stop after so many looks at a validation loss without a better one.")] = None
    balance: Annotated[float, Option(help="Of a mixture: weight of the load-balancing loss.")] = 0.01
    rng_seed: RngSeedOption = 0
    threads: Annotated[int | None, Option(help="CPU threads of each: part of its recipe. Default: 1 for a small seed, else 4.")] = None


class ReadingOptions(NamedTuple):
    """How a corpus is read and divided into domains."""

    holdout: Annotated[float, Option(help="Share of documents nobody trains on.")] = 0.1
    field: Annotated[str, Option(help="What holds the text: a name, a dotted path, or several with commas; chats are joined.")] = "text"
    encoding: Annotated[str, Option(help="Of text without a byte order mark, e.g. latin-1.")] = "utf-8"
    follow_links: Annotated[bool, Option("--follow-links", help="Read symbolic links in folders; else they are counted.")] = False
    largest_document: Annotated[str, Option(help="Bytes of a document, line or row; what is longer is left out.")] = "64M"
    filters: Annotated[str, Option(help="Leave out by quality and language: gopher, c4, fineweb, language=en; with commas.")] = ""
    memory: Annotated[str, Option(help="Bytes of memory for reading, about; the result does not depend on it.")] = "2G"
    rng_seed: RngSeedOption = 0
    workers: Annotated[int, Option("--workers", help="Shards of text processed in parallel; the result does not depend on it.")] = 1
    engine: EngineOption = "local"


def command(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as typer reads it: a parameter that is a record of options (a NamedTuple) becomes one option for each field."""
    records: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        if not (isinstance(parameter.annotation, type) and hasattr(parameter.annotation, "_field_defaults")):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
            continue
        record: Any = parameter.annotation
        records[parameter.name] = record
        for field, hint in get_type_hints(record, include_extras=True).items():
            default = record._field_defaults.get(field, parameter.empty)
            parameters.append(inspect.Parameter(field, parameter.KEYWORD_ONLY, annotation=hint, default=default))

    hints = {parameter.name: get_args(parameter.annotation)[1:] for parameter in parameters}

    @wraps(verb)
    def call(**given: Any) -> None:
        for name, value in given.items():
            check_output(name, value, hints[name], given.get("store"))
        for name, record in records.items():
            given[name] = record(**{field: given.pop(field) for field in record._fields})
        verb(**given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def computing(call: Callable[..., None]) -> Callable[..., None]:
    """A command with the option --device: for this process and its workers (elmwood/lm/devices.py)."""

    @wraps(call)
    def run(device: str | None, **given: Any) -> None:
        if device:
            os.environ[DEVICE] = device
        call(**given)

    where = inspect.Parameter("device", inspect.Parameter.KEYWORD_ONLY, annotation=DeviceOption, default=None)
    run.__signature__ = inspect.Signature([*inspect.signature(call).parameters.values(), where])  # type: ignore[attr-defined]
    run.__annotations__ = call.__annotations__ | {"device": DeviceOption}
    return run


def pairs_of(texts: Sequence[str] | None) -> dict[str, str]:
    """['every=64'] -> {'every': '64'}. Raises BadInput."""
    pairs = [text.partition("=") for text in texts or []]
    if wrong := next((name for name, equals, _ in pairs if not equals), None):
        raise BadInput(f"--set {wrong!r}: write NAME=VALUE")
    return {name: value for name, _, value in pairs}


def flags(option: OptionInfo) -> list[str]:
    """How an option is written, where it says so itself; typer keeps the first of them as the default."""
    return [one for one in (option.default, *(option.param_decls or ())) if isinstance(one, str) and one.startswith("-")]


def check_output(option: str, value: Any, hints: Sequence[Any], store: Path | None) -> None:
    """Names and files of results are looked at before any work. Raises BadInput."""
    for one in hints:
        if isinstance(one, NewFile):
            one.check(option, value)
        elif isinstance(one, OptionInfo) and "--name" in flags(one) and value and store and BELOW not in hints:
            Store(store).check_name(value)


def typed_options(context: typer.Context) -> set[str]:
    """The options the user typed."""
    return {option for option in context.params if getattr(context.get_parameter_source(option), "name", "") == "COMMANDLINE"}
