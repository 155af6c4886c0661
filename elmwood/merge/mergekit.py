"""mergekit's YAML (0.1.5) as a merge of ours, for the methods and parameters both know. What is not supported is refused by name.

A parameter is looked up as mergekit does: at the model, then at the slice, then at the top; a list of filters that does not fit a tensor
leaves it to the next of these. https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from elmwood.errors import BadInput
from elmwood.merge.checkpoint import Answer
from elmwood.merge.rules.table import RULES
from elmwood.records import Share


class MergeMethod(NamedTuple):
    """A merge method of mergekit."""

    ours: str
    defaults: Mapping[str, float]  # of our settings, as mergekit has them
    base: Literal["needed", "optional", "none"] = "needed"  # none: mergekit would take a base as one more input
    weights: bool = True  # whether inputs have weights, which then have no default
    rescale: bool = False


DROP = {"normalise": 0, "density": 1}
METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod("average", {"normalise": 1}, "none"),
    "task_arithmetic": MergeMethod("task_arithmetic", {"normalise": 0}),
    "ties": MergeMethod("ties", {"normalise": 1, "density": 1}),
    "dare_linear": MergeMethod("dare", DROP, rescale=True),
    "dare_ties": MergeMethod("dare_ties", DROP, rescale=True),
    "breadcrumbs": MergeMethod("breadcrumbs", {**DROP, "gamma": 0.01}),
    "breadcrumbs_ties": MergeMethod("breadcrumbs_ties", {**DROP, "gamma": 0.01}),
    "della": MergeMethod("della_ties", {"normalise": 1, "density": 1, "epsilon": 0.15}, rescale=True),
    "della_linear": MergeMethod("della", {**DROP, "epsilon": 0.15}, rescale=True),
    "model_stock": MergeMethod("model_stock", {}, weights=False),
    "sce": MergeMethod("sce", {}, weights=False),
    "karcher": MergeMethod("karcher", {"iterations": 10, "tolerance": 1e-5, "deltas": 0}, "none", weights=False),
    "slerp": MergeMethod("slerp", {"deltas": 0}),
    "nuslerp": MergeMethod("nuslerp", {}, "optional"),
    "multislerp": MergeMethod("multislerp", {}, "optional"),
}
SHARED = {"normalize": "normalise", "lambda": "scale", "max_iter": "iterations", "tol": "tolerance", "select_topk": "density"}
EACH = {"density": "density", "gamma": "gamma", "epsilon": "epsilon"}  # of every input but the base; here the same for all
IGNORED = {"int8_mask"}  # how it is calculated, not what
LARGEST = 1 << 16  # characters of a file
DEEPEST = 32  # brackets within brackets, whose number PyYAML's time is quadratic in
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


# ---- the file -------------------------------------------------------------------------------------------------------


class _Known(BaseModel):
    model_config = ConfigDict(extra="forbid")


Value = StrictBool | StrictInt | StrictFloat | StrictStr


class FilteredValue(_Known):
    value: Value | list[Value]
    filter: StrictStr | None = None


Setting = Value | list[Value] | FilteredValue | list[FilteredValue] | None
Parameters = dict[str, Setting] | None


Layer = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


class MergeInput(_Known):
    model: StrictStr
    layer_range: tuple[Layer, Layer] | None = None
    parameters: Parameters = None


class MergeSlice(_Known):
    sources: list[MergeInput]
    parameters: Parameters = None


class MergeFile(_Known):
    merge_method: StrictStr
    base_model: StrictStr | None = None
    models: list[MergeInput] | None = None
    slices: list[MergeSlice] | None = None
    parameters: Parameters = None
    dtype: StrictStr | None = None
    out_dtype: StrictStr | None = None
    tokenizer_source: StrictStr | None = None
    chat_template: StrictStr | None = None
    name: StrictStr | None = None


class MergekitFile(NamedTuple):
    """A configuration: names of experts with their weights, the name of the seed where one is given, and what to make."""

    members: dict[str, tuple[Share, ...]]
    base: str | None
    answer: Answer
    layers: int | None  # that the seed must have, where layers are named
    dtype: str | None = None  # that the seed must have, where one is named; as safetensors spells it


def read(text: str) -> MergekitFile:
    """Raises BadInput."""
    try:
        given = MergeFile.model_validate(_parse(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BadInput(f"{where}: {first['msg'].lower()}: this is not supported, or no mergekit configuration") from error
    method = METHODS.get(given.merge_method)
    if method is None:
        raise BadInput(f"merge_method {given.merge_method!r} is not supported; have {', '.join(METHODS)}")
    if given.tokenizer_source not in (None, "base") or given.chat_template:
        raise BadInput("tokenizer_source and chat_template are not supported: a merge keeps its seed's tokenizer")
    if (given.models is None) == (given.slices is None):
        raise BadInput("models and slices: give one of them")
    _check_base(given, method)
    if given.slices and given.base_model and any(given.base_model not in [one.model for one in part.sources] for part in given.slices):
        raise BadInput(f"slices: {given.base_model}, the base_model, must be among the sources of each")
    slices = given.slices if given.slices is not None else [MergeSlice(sources=given.models or [])]
    if not slices or not all(one.sources for one in slices):
        raise BadInput("models: none are named")
    layers = _layers(slices, given.base_model)
    members = _arc(slices, given) if given.merge_method == "slerp" else _members(slices, given, method)
    base = None if given.merge_method == "slerp" else given.base_model  # of slerp it is one of the two, and no seed
    return MergekitFile(members, base, Answer(*_answer(slices, given, method)), layers, _dtype(given))


def _parse(text: str) -> Any:
    """Raises BadInput."""
    if len(text) > LARGEST:
        raise BadInput(f"this has {len(text)} characters, and {LARGEST} of YAML are read at most: name fewer models or weights")
    steps = itertools.accumulate((letter in "[{") - (letter in "]}") for letter in text)
    if max(steps, default=0) > DEEPEST:
        raise BadInput(f"this is no mergekit configuration: it has brackets within {DEEPEST} others")
    try:
        return yaml.safe_load(text)
    except Exception as error:  # dates, numbers and tags that are none raise errors of Python's own, and deep nesting does
        raise BadInput(f"this is not YAML of one document: {' '.join(str(error).split())}") from error


def _check_base(given: MergeFile, method: MergeMethod) -> None:
    name = given.merge_method
    if method.base == "needed" and not given.base_model:
        raise BadInput(f"{name} needs a base_model: name the seed")
    if method.base == "none" and given.base_model:
        raise BadInput(f"base_model is not supported with {name}: mergekit merges it as one more model; leave it out")


def _dtype(given: MergeFile) -> str | None:
    names = {name for name in (given.dtype, given.out_dtype) if name}
    if len(names) > 1 or (names and not names & DTYPES.keys()):
        raise BadInput(f"dtype {', '.join(sorted(names))} is not supported: a merge keeps its seed's dtype, one of {', '.join(DTYPES)}")
    return DTYPES[names.pop()] if names else None


def _layers(slices: Sequence[MergeSlice], base: str | None) -> int | None:
    """How many layers the slices make; none where none are named. Raises BadInput where a layer would move."""
    reached = 0
    for number, one in enumerate(slices):
        ranges = {source.layer_range for source in one.sources}
        if len(ranges) > 1 or (len(slices) > 1 and None in ranges):
            raise BadInput(f"slices[{number}]: its sources must have one layer_range: moving layers to another depth is not supported")
        span = next(iter(ranges))
        if span and not (span[0] == reached < span[1]):
            raise BadInput(f"slices[{number}] is layers {span[0]} to {span[1]}, and {reached} comes next: moving layers is not supported")
        reached = span[1] if span else reached
    return reached or None


# ---- parameters -----------------------------------------------------------------------------------------------------


def _number(value: Value, where: str) -> float:
    if isinstance(value, bool) and where.rpartition(".")[2] != "normalize":
        raise BadInput(f"{where}: {value} is not supported: give a number")
    try:
        number = float(value)
    except ValueError as error:
        raise BadInput(f"{where}: {value!r} is not supported: give a number") from error
    except OverflowError as error:
        raise BadInput(f"{where}: a number too large for a float is not supported: give a smaller one") from error
    if not math.isfinite(number):
        raise BadInput(f"{where}: {value} is not supported: give a finite number")
    return number


Rows = list[tuple[str, tuple[float, ...]]]  # part of a tensor's name (empty: all), and a value or a gradient


def _rows(name: str, scopes: Sequence[Parameters], where: str) -> Rows:
    """What a parameter is for which tensors, the first that fits; empty where it is given nowhere. Raises BadInput."""
    rows: Rows = []
    for scope in scopes:
        setting = (scope or {}).get(name)
        given = setting if isinstance(setting, list) else [setting] if setting is not None else []
        if given and not isinstance(given[0], FilteredValue):
            return [*rows, ("", tuple(_number(value, f"{where}.{name}") for value in given if not isinstance(value, FilteredValue)))]
        for row in given:
            assert isinstance(row, FilteredValue)
            values = row.value if isinstance(row.value, list) else [row.value]
            if not values:
                raise BadInput(f"{where}.{name}: an empty list is not supported: give a number")
            rows.append(("" if row.filter in (None, "*") else row.filter or "", tuple(_number(one, f"{where}.{name}") for one in values)))
            if not rows[-1][0]:
                return rows
    if rows:
        raise BadInput(f"{where}.{name}: tensors that no filter fits have no value: add a row without a filter, or {name} at the top")
    return rows


def _value(name: str, scopes: Sequence[Parameters], where: str) -> float | None:
    rows = _rows(name, scopes, where)
    if rows and (len(rows) > 1 or rows[0][0] or len(rows[0][1]) > 1):
        raise BadInput(f"{where}.{name}: filters and gradients are not supported here: only weights may differ over tensors and depth")
    return rows[0][1][0] if rows else None


def _answer(slices: Sequence[MergeSlice], given: MergeFile, method: MergeMethod) -> tuple[str, dict[str, float]]:
    """Our rule and its settings. Raises BadInput where they differ between slices or models, or the rule has no such setting."""
    found: list[dict[str, float]] = []
    known = {"t"} if given.merge_method == "slerp" else {"weight", "rescale", *SHARED, *EACH, *IGNORED}
    for number, one in enumerate(slices):
        where, scopes = f"slices[{number}]" if given.slices else "parameters", [one.parameters, given.parameters]
        _check_names(scopes, known, where)
        shared = {ours: value for theirs, ours in SHARED.items() if (value := _value(theirs, scopes, where)) is not None}
        _check_rescale(scopes, method, given.merge_method)
        for source in one.sources:
            _check_names([source.parameters], known & {"weight", *EACH}, source.model)
            if source.model == given.base_model and given.merge_method != "slerp":
                continue
            each = {ours: value for theirs, ours in EACH.items() if (value := _value(theirs, [source.parameters, *scopes], source.model))
                    is not None}  # fmt: skip
            found.append({**method.defaults, **each, **shared})
    if any(one != found[0] for one in found[1:]):
        raise BadInput("models or slices with different settings are not supported: only weights may differ")
    return _our_rule(given, method, found[0] if found else dict(method.defaults))


def _our_rule(given: MergeFile, method: MergeMethod, settings: dict[str, float]) -> tuple[str, dict[str, float]]:
    ours, name = method.ours, given.merge_method
    if name == "sce" and settings.get("density", 1) < 1:
        ours = "sce_select"
    elif name == "sce":
        settings.pop("density", None)
    if name == "linear" and not settings["normalise"]:
        raise BadInput("linear with normalize: false is not supported: it scales whole models; take task_arithmetic with a base_model")
    if "deltas" in RULES[ours].begins and "deltas" not in settings:
        settings["deltas"] = float(given.base_model is not None)
    if strange := sorted(settings.keys() - {*RULES[ours].begins, *RULES[ours].ends}):
        theirs = next((theirs for theirs, mine in (SHARED | EACH).items() if mine == strange[0]), strange[0])
        raise BadInput(f"{name} has no parameter {theirs!r} here; it has {', '.join(sorted({*RULES[ours].begins, *RULES[ours].ends}))}")
    return ours, {key: float(value) for key, value in settings.items()}


def _check_names(scopes: Sequence[Parameters], known: set[str], where: str) -> None:
    for scope in scopes:
        if strange := sorted((scope or {}).keys() - known):
            raise BadInput(f"{where}.{strange[0]} is not supported here; have {', '.join(sorted(known))}")


def _check_rescale(scopes: Sequence[Parameters], method: MergeMethod, name: str) -> None:
    for scope in scopes:
        if (value := (scope or {}).get("rescale")) is not None and value is not method.rescale:
            raise BadInput(
                f"rescale: {value} is not supported with {name}: what is dropped {'is' if method.rescale else 'is not'} made up for"
            )


# ---- weights --------------------------------------------------------------------------------------------------------


def _members(slices: Sequence[MergeSlice], given: MergeFile, method: MergeMethod) -> dict[str, tuple[Share, ...]]:
    """Shares of each model, over all slices. Raises BadInput."""
    shares: dict[str, list[Share]] = {}
    for number, one in enumerate(slices):
        names = [source.model for source in one.sources]
        for source in one.sources:
            if names.count(source.model) > 1:
                raise BadInput(f"{source.model} is named twice: give it a larger weight instead")
            if source.model == given.base_model:  # it is what deltas are from
                continue
            rows: Rows = [("", (1.0,))]  # mergekit leaves out weights that a method does not have
            if method.weights:
                rows = _rows("weight", [source.parameters, one.parameters, given.parameters], source.model)
            if not rows:
                raise BadInput(f"{source.model} has no weight, and {given.merge_method} needs one of each model: add parameters.weight")
            shares.setdefault(source.model, []).extend(_shares(rows, source.layer_range, number, len(slices)))
    return {model: tuple(sorted(found, key=lambda share: share.layers is None)) for model, found in shares.items()}


def _arc(slices: Sequence[MergeSlice], given: MergeFile) -> dict[str, tuple[Share, ...]]:
    """Shares of the two models of slerp: 1 - t for the base, t for the other. Raises BadInput."""
    shares: dict[str, list[Share]] = {}
    for number, one in enumerate(slices):
        names = [source.model for source in one.sources]
        rows = _rows("t", [one.parameters, given.parameters], "slerp")
        if not rows or len(names) != 2 or names.count(given.base_model or "") != 1:
            raise BadInput("slerp takes a parameter t and two models, one of which is the base_model")
        for source in one.sources:
            own = source.model == given.base_model
            turned: Rows = [(part, tuple(1 - t for t in values) if own else values) for part, values in rows]
            shares.setdefault(source.model, []).extend(_shares(turned, source.layer_range, number, len(slices)))
    return {model: tuple(sorted(found, key=lambda share: share.layers is None)) for model, found in shares.items()}


def _shares(rows: Rows, layers: tuple[int, int] | None, number: int, of: int) -> list[Share]:
    """Weights over the layers of one slice of so many. Embeddings belong to the first slice, the last norm and the head to the last."""
    if of == 1:
        return [Share(tensors=part, values=values) for part, values in rows]
    edges = (number == 0, number == of - 1)
    found: list[Share] = []
    for part, values in rows:
        if len(values) > 1:
            raise BadInput(
                f"weight {list(values)}: a gradient within a slice is not supported: give it over all layers, or one value a slice"
            )
        if part and any(edges):
            raise BadInput(f"filter {part!r} in the first or the last of several slices is not supported: name the models without slices")
        found.append(Share(tensors=part, layers=layers, values=values))
        if not part:
            found += [Share(tensors=name, values=values) for name in itertools.compress(("embed", ""), edges)]
    return found


def gradients_over(shares: Sequence[Share], depth: int) -> tuple[Share, ...]:
    """The same weights of a model with so many layers: mergekit's gradients go over the layers alone, and all that stands outside of them,
    the last norm and the head too, has their first value. Raises BadInput."""
    found: list[Share] = []
    for share in shares:
        if len(share.values) == 1:
            found.append(share)
            continue
        if depth < 2:
            raise BadInput(f"weight {list(share.values)}: a gradient needs two layers or more: give one value")
        found += [share.model_copy(update={"layers": (0, depth)}), share.model_copy(update={"values": share.values[:1]})]
    return tuple(found)
