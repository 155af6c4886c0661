"""Answers: combinations of merge rules and settings, each a checkpoint or an adapter to be made from the same experts."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, UnknownName
from elmwood.merge.adapters import LOW_RULES, merge_adapters
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.rules.table import RULES, Rules, settle
from elmwood.merge.states import Weights
from elmwood.records import Merged, Seed
from elmwood.store import Store


def combine(methods: Sequence[str], values: Mapping[str, Sequence[float]], rules: Rules = RULES) -> list[Answer]:
    """Every combination of methods and values of their settings. A setting that only some of the methods have is for those.

    Raises BadInput, UnknownName.
    """
    known = {method: settings_of(method, rules) for method in methods}
    if unknown := sorted(values.keys() - set().union(*known.values())):
        named = "; ".join(f"{method} has {', '.join(sorted(mine)) or 'none'}" for method, mine in known.items())
        raise BadInput(f"no setting {unknown[0]!r}: {named}")
    answers: list[Answer] = []
    for method, mine in known.items():
        names = [name for name in values if name in mine]
        answers += [Answer(method, dict(zip(names, row, strict=True))) for row in product(*(dict.fromkeys(values[name]) for name in names))]
    return answers


def settings_of(method: str, rules: Rules = RULES) -> set[str]:
    """The settings of a merge rule, of checkpoints or of adapters. Raises UnknownName."""
    if method in LOW_RULES:
        return set(LOW_RULES[method].settings)
    if method not in rules and ":" not in method:
        raise UnknownName(
            f"no merge rule {method!r}; have {', '.join(sorted(RULES))}; of adapters to one: {', '.join(sorted(LOW_RULES))}; "
            "or pass 'module:function'"
        )
    _, begins, ends = settle(method, {}, rules)
    return {*begins, *ends}


def title(answer: Answer) -> str:
    """'ties density=0.2': what an answer is called beside others."""
    return " ".join([answer.method, *(f"{name}={value:g}" for name, value in answer.settings.items())])


def make(
    seed: Seed, members: Mapping[str, Weights], answers: Sequence[Answer], store: Store, resize: bool = False,
    progress: Progress = silent, rules: Rules = RULES,
) -> list[Merged]:  # fmt: skip
    """A checkpoint for each answer, or an adapter, by its rule; the experts are read once for all answers of either kind.

    Raises what `merge` and `merge_adapters` do.
    """
    makers: dict[bool, Callable[[list[Answer]], list[Merged]]] = {
        True: lambda asked: merge_adapters(seed, members, asked, store, progress),
        False: lambda asked: merge(seed, members, asked, store, resize, progress, rules),
    }
    kinds = [answer.method in LOW_RULES for answer in answers]
    made = {low: iter(makers[low]([one for one, kind in zip(answers, kinds, strict=True) if kind == low])) for low in set(kinds)}
    return [next(made[low]) for low in kinds]
