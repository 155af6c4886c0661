"""mergekit's YAML as a merge of ours, for the methods and parameters both know. What is not supported is refused by name.

https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from elmwood.errors import BadInput
from elmwood.merge.checkpoint import Answer
from elmwood.merge.rules.table import RULES
from elmwood.records import Share

# theirs -> ours, and their defaults where they are not ours
METHODS: dict[str, tuple[str, dict[str, float]]] = {
    "linear": ("average", {"normalise": 1}),
    "task_arithmetic": ("task_arithmetic", {"normalise": 0}),
    "ties": ("ties", {"normalise": 1, "density": 1}),
    "dare_linear": ("dare", {"normalise": 0, "density": 1}),
    "dare_ties": ("dare_ties", {"normalise": 1, "density": 1}),
    "breadcrumbs": ("breadcrumbs", {"normalise": 0, "density": 1, "gamma": 0.01}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"normalise": 1, "density": 1, "gamma": 0.01}),
    "della": ("della_ties", {"normalise": 1, "density": 1, "epsilon": 0.15}),
    "della_linear": ("della", {"normalise": 0, "density": 1, "epsilon": 0.15}),
    "model_stock": ("model_stock", {}),
    "sce": ("sce", {}),
    "karcher": ("karcher", {"iterations": 10, "tolerance": 1e-5}),
    "slerp": ("slerp", {}),
    "nuslerp": ("nuslerp", {}),
    "multislerp": ("multislerp", {}),
}
SETTINGS = {"normalize": "normalise", "lambda": "scale", "density": "density", "gamma": "gamma", "epsilon": "epsilon"}
SETTINGS |= {"max_iter": "iterations", "tol": "tolerance", "select_topk": "density"}
IGNORED = {"int8_mask"}  # how it is calculated, not what
WORDS = {"merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source", "chat_template", "name"}


class Asked(NamedTuple):
    """A configuration: names of experts with their weights, the name of the seed where one is given, and what to make."""

    members: dict[str, tuple[Share, ...]]
    base: str | None
    answer: Answer
    layers: int | None  # that the seed must have, where layers are named


def read(text: str) -> Asked:
    """Raises BadInput."""
    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"no YAML: {error}") from error
    if not isinstance(said, dict):
        raise BadInput("a mergekit configuration is a mapping with merge_method and models")
    _known(said, WORDS, "")
    method = said.get("merge_method")
    if method not in METHODS or METHODS[method][0] not in RULES:
        have = ", ".join(theirs for theirs, (ours, _) in METHODS.items() if ours in RULES)
        raise BadInput(f"merge_method {method!r} is not supported; have {have}")
    for key, allowed in (("tokenizer_source", (None, "base")), ("chat_template", (None,))):
        if said.get(key) not in allowed:
            raise BadInput(f"{key}: {said[key]!r} is not supported: a merge keeps its seed's tokenizer")
    if said.get("out_dtype"):
        raise BadInput(f"out_dtype: {said['out_dtype']!r} is not supported: a merge keeps its seed's dtypes")
    slices = said["slices"] if "slices" in said else [{"sources": said.get("models") or []}]
    if "slices" in said and "models" in said:
        raise BadInput("models and slices: give one of them")
    base, common = said.get("base_model"), said.get("parameters") or {}
    if method == "slerp":  # its base is one of the two that are merged, no seed
        slices, base, common = [_between(one, base, common) for one in slices], None, {}
    members, settings, layers = _members(slices, base, common)
    return Asked(members, base, Answer(*_answer(method, settings, base is not None)), layers)


def _between(one: Mapping[str, Any], base: str | None, common: Mapping[str, Any]) -> dict[str, Any]:
    """A slice of slerp with weights in place of `t`: 1 - t for the base, t for the other. Raises BadInput."""
    said = {**common, **(one.get("parameters") or {})}
    _known(said, {"t"}, "parameters.")
    sources = list(one["sources"])
    if "t" not in said or len(sources) != 2 or base not in [source["model"] for source in sources]:
        raise BadInput("slerp takes a parameter t and two models, one of which is the base_model")

    def turned(t: Any) -> Any:
        if isinstance(t, list):
            return [{**row, "value": turned(row["value"])} if isinstance(row, dict) else turned(row) for row in t]
        return 1 - t

    weights = {True: turned(said["t"]), False: said["t"]}
    return {"sources": [{**source, "parameters": {"weight": weights[source["model"] == base]}} for source in sources]}


def _known(said: Mapping[str, Any], words: set[str], where: str) -> None:
    if strange := sorted(set(said) - words):
        raise BadInput(f"{where}{strange[0]} is not supported; have {', '.join(sorted(words))}")


def _answer(method: str, settings: Mapping[str, float], based: bool) -> tuple[str, dict[str, float]]:
    ours, defaults = METHODS[method]
    if method == "sce" and "density" in settings:
        ours = "sce_select" if settings["density"] < 1 else "sce"
        settings = {key: value for key, value in settings.items() if key != "density" or ours == "sce_select"}
    if "deltas" in RULES[ours].begins:
        defaults = {**defaults, "deltas": float(based)}
    rule = RULES[ours]
    known = {*rule.begins, *rule.ends}
    if strange := sorted(set(settings) - known):
        theirs = next((name for name, mine in SETTINGS.items() if mine == strange[0]), strange[0])
        raise BadInput(f"{method} has no parameter {theirs!r} here; it has {', '.join(sorted(known)) or 'none'}")
    return ours, {name: float(value) for name, value in {**defaults, **settings}.items() if name in known}


# ---- models and slices ------------------------------------------------------------------------------------------


def _members(
    slices: Sequence[Mapping[str, Any]], base: str | None, common: Mapping[str, Any]
) -> tuple[dict[str, tuple[Share, ...]], dict[str, float], int | None]:
    """Shares of each model, over all slices; the settings, which must be the same for all; and how many layers the slices make."""
    shares: dict[str, list[Share]] = {}
    settings, reached = _settings(common, "parameters"), 0
    for number, one in enumerate(slices):
        _known(one, {"sources", "parameters"}, f"slices[{number}].")
        ranges = {tuple(source.get("layer_range") or ()) for source in one["sources"]}
        if len(ranges) > 1 or (len(slices) > 1 and () in ranges):
            raise BadInput(
                f"slices[{number}]: its sources must have one layer_range: stacking layers of other depths is no merge of experts"
            )
        layers = next(iter(ranges), ()) or None
        if layers and layers[0] != reached:
            raise BadInput(f"slices[{number}] begins at layer {layers[0]}, not at {reached}: every layer stays where it is in the seed")
        reached = layers[1] if layers else reached
        for source in one["sources"]:
            _known(source, {"model", "layer_range", "parameters"}, f"slices[{number}].sources.")
            if source["model"] == base:  # it is what deltas are from
                continue
            own = {**common, **(one.get("parameters") or {}), **(source.get("parameters") or {})}
            _agree(settings, _settings(own, source["model"]), source["model"])
            edges = None if len(slices) == 1 else (number == 0, number == len(slices) - 1)
            shares.setdefault(source["model"], []).extend(_shares(own.get("weight", 1.0), layers, edges))
    members = {model: tuple(sorted(found, key=lambda share: share.layers is None)) for model, found in shares.items()}
    return members, settings, reached or None


def _settings(parameters: Mapping[str, Any], where: str) -> dict[str, float]:
    """All but weights. Raises BadInput."""
    _known(parameters, {"weight", "rescale", *SETTINGS, *IGNORED}, f"{where}.")
    if parameters.get("rescale") is False:
        raise BadInput(f"{where}.rescale: false is not supported: what is dropped is made up for")
    found = {}
    for name, ours in SETTINGS.items():
        if name in parameters:
            value = parameters[name]
            if not isinstance(value, int | float):
                raise BadInput(f"{where}.{name}: {value!r} is not supported: only weights may differ over tensors and depth")
            found[ours] = float(value)
    return found


def _agree(settings: dict[str, float], own: dict[str, float], model: str) -> None:
    for name, value in own.items():
        if settings.setdefault(name, value) != value:
            raise BadInput(f"{model}: {name} {value:g} here and {settings[name]:g} elsewhere: only weights may differ between models")


def _shares(weight: Any, layers: tuple[int, int] | None, edges: tuple[bool, bool] | None) -> list[Share]:
    """A weight as one value, a gradient, or a list of filters, over these layers; `edges`: whether tensors before all layers, and after
    them, belong to these."""
    rows = weight if isinstance(weight, list) and weight and isinstance(weight[0], dict) else [{"value": weight}]
    found: list[Share] = []
    for row in rows:
        _known(row, {"filter", "value"}, "weight.")
        value = row["value"]
        values = tuple(map(float, value if isinstance(value, list) else [value]))
        if edges is None:
            found.append(Share(tensors=row.get("filter") or "", values=values))
            continue
        if len(values) > 1:
            raise BadInput(f"weight {value}: a gradient within a slice is not supported: give it over all layers, or one value a slice")
        found.append(Share(tensors=row.get("filter") or "", layers=layers, values=values))
        if "filter" not in row:
            found += [Share(tensors=name, values=values) for name in itertools.compress(("embed", ""), edges)]
    return found
