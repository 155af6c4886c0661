"""What `merge` and the verbs of states do. Nothing here needs torch but `--choose`."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from elmwood.cli.screen import bars, duration, emit, expand, keep, out, short, table, talk
from elmwood.engine import Progress
from elmwood.errors import BadInput, Damaged, UnknownName
from elmwood.merge import mergekit
from elmwood.merge.adapters import LOW_RULES, merge_adapters
from elmwood.merge.checkpoint import Answer, assemble, finalize, merge
from elmwood.merge.estimate import estimates
from elmwood.merge.layer_weights import depth_of
from elmwood.merge.parallel import StateJob, make_state, spread
from elmwood.merge.rules.table import RULES, settle
from elmwood.merge.states import add, check, remove, seed_places
from elmwood.merge.statistics import found as statistics
from elmwood.records import Expert, Forest, Merged, Seed, Share, State, parse
from elmwood.report.contest import headline
from elmwood.report.contest import lines as told
from elmwood.store import Store

Members = dict[str, tuple[Share, ...]]
Estimated = dict[str, dict[str, float]]  # answer -> layer -> estimate; none where some expert left no statistics


# ---- what is asked ------------------------------------------------------------------------------------------------


def members_of(store: Store, names: Sequence[str], weights: str, layers: str | None, tensors: str) -> Members:
    """Experts with their weights; a forest stands for its experts. Raises BadInput."""
    found: list[str] = []
    for record in map(store.load, expand(store, names)):
        if not isinstance(record, Forest | Expert):
            raise BadInput(f"{record.digest[:8]} is a {record.kind}: a merge takes experts, or a forest for all it has")
        found += record.experts if isinstance(record, Forest) else [record.digest]
    if twice := next((digest for digest in found if found.count(digest) > 1), None):
        raise BadInput(f"expert {twice[:8]} is named twice: give it a larger weight instead, with --weights")
    each = weights.split(",")
    if len(each) not in (1, len(found)):
        raise BadInput(f"{len(each)} weights for {len(found)} experts: give one for all, or one for each in the order named")
    between = span(layers) if layers else None
    shares = [(Share(tensors=tensors, layers=between, values=gradient(text)),) for text in each]
    return dict(zip(found, shares * (len(found) if len(each) == 1 else 1), strict=True))


def gradient(text: str) -> tuple[float, ...]:
    """'0.5' -> one weight; '0:1' -> a gradient from the first layer to the last. Raises BadInput."""
    return tuple(_number("weight", one) for one in text.split(":"))


def span(layers: str) -> tuple[int, int]:
    """'4-11' -> (4, 12); '3' -> (3, 4). Raises BadInput."""
    first, _, last = layers.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise BadInput(f"--layers {layers!r} is no range of layers: write 4-11, both included, or one number")
    return int(first), int(last or first) + 1


def answers_of(methods: str, others: Sequence[str], **usual: str | None) -> list[Answer]:
    """Every combination of what was asked; a setting that only some of the rules have is for those. Raises BadInput, UnknownName."""
    given = {name: value for name, value in usual.items() if value is not None}
    for text in others:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--set {text!r}: write NAME=VALUE, or NAME=VALUE,VALUE for several answers")
        given[name] = value
    values = {name: [_number(name, one) for one in text.split(",")] for name, text in given.items()}
    known = {method: settings_of(method) for method in methods.split(",")}
    if unknown := sorted(values.keys() - set().union(*known.values())):
        named = "; ".join(f"{method} has {', '.join(sorted(mine)) or 'none'}" for method, mine in known.items())
        raise BadInput(f"no setting {unknown[0]!r}: {named}")
    found: list[Answer] = []
    for method, mine in known.items():
        names = [name for name in values if name in mine]
        found += [Answer(method, dict(zip(names, row, strict=True))) for row in product(*(values[name] for name in names))]
    return found


def settings_of(method: str) -> set[str]:
    """The settings that a rule has, of checkpoints or of adapters. Raises UnknownName."""
    if method in LOW_RULES:
        return set(LOW_RULES[method].settings)
    if method not in RULES:
        raise UnknownName(f"no merge rule {method!r}; have {', '.join(sorted(RULES))}; of adapters to one: {', '.join(sorted(LOW_RULES))}")
    _, begins, ends = settle(method, {})
    return {*begins, *ends}


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BadInput(f"{name} {text!r} is not a number") from error


def title(answer: Answer) -> str:
    return " ".join([answer.method, *(f"{name}={value:g}" for name, value in answer.settings.items())])


# ---- merge --------------------------------------------------------------------------------------------------------


def merge_verb(
    *, experts, method, weights, scale, density, rank, settings, layers, tensors, resize, choose, per_layer, run, partition, documents,
    parts, workers, engine, name, store, as_json,
) -> None:  # fmt: skip
    home = Store(store)
    if len(experts) == 1 and experts[0].endswith((".yaml", ".yml")):
        if method or weights or scale or density or rank or settings or layers or tensors:
            raise BadInput(f"{experts[0]} says how to merge: change it there, or name the experts here instead of the file")
        asked = mergekit.read(Path(experts[0]).read_text())
        members = {home.resolve(one): shares for one, shares in asked.members.items()}
        if asked.base and home.resolve(asked.base) != seed_of(members, home).digest:
            raise BadInput(f"{asked.base} is not the seed of these experts: name that as base_model")
        if asked.layers and asked.layers != (depth := depth_of(seed_places(seed_of(members, home), home))):
            raise BadInput(f"the slices make {asked.layers} layers, the seed has {depth}: a merge keeps its seed's architecture")
        answers: list[Answer] = [asked.answer]
    else:
        members = members_of(home, experts, weights or "1", layers, tensors or "")
        answers = answers_of(method or "average", settings, scale=scale, density=density, rank=rank)
    if per_layer and (not choose or len(answers) < 2 or any(answer.method in LOW_RULES for answer in answers)):
        raise BadInput("--per-layer takes layers from several checkpoints: give --choose, several answers, and no rule that makes adapters")
    seed = seed_of(members, home)
    with bars() as progress:
        if parts:
            if resize:
                raise BadInput("--resize and --parts do not go together: states are of experts with the seed's own vocabulary")
            if low := next((answer.method for answer in answers if answer.method in LOW_RULES), None):
                raise BadInput(f"--parts and {low} do not go together: adapters are small; leave --parts out")
            made = spread(seed, members, answers, home, parts=parts, workers=workers or 1, engine=engine, progress=progress)
        else:
            made = both(seed, members, answers, home, resize, progress)
    if choose:
        where = place_of(members, home, partition)
        estimated = None
        if run:
            made, answers, estimated = promising(made, answers, seed, members, home, run, where, documents)
        chosen(made, answers, seed, members, home, where=where, documents=documents, per_layer=per_layer, estimated=estimated, name=name,
               as_json=as_json)  # fmt: skip
    elif len(made) == 1:
        keep(home, made[0], name, as_json)
    else:
        listed(made, answers, home, name, as_json)


def both(
    seed: Seed, members: Members, answers: Sequence[Answer], store: Store, resize: bool, progress: Progress
) -> list[Merged]:  # fmt: skip
    """A checkpoint for each answer, or an adapter, by its rule; one reading for all of a kind."""
    makers: dict[bool, Callable[[list[Answer]], list[Merged]]] = {
        True: lambda asked: merge_adapters(seed, members, asked, store, progress),
        False: lambda asked: merge(seed, members, asked, store, resize, progress),
    }
    kinds = [answer.method in LOW_RULES for answer in answers]
    found = {low: iter(makers[low]([one for one, kind in zip(answers, kinds, strict=True) if kind == low])) for low in set(kinds)}
    return [next(found[low]) for low in kinds]


def seed_of(members: Mapping[str, Any], store: Store) -> Seed:
    """The seed of the first expert; others of another one are refused where they are read. Raises BadInput."""
    if not members:
        raise BadInput("a merge takes two experts or more: none are named")
    return store.load(store.load(next(iter(members)), Expert).seed, Seed)


def listed(made: Sequence[Merged], answers: Sequence[Answer], store: Store, name: str | None, as_json: bool) -> None:
    """Several answers: each called NAME/method-setting."""
    names = [f"{name}/{title(answer).replace(' ', '-')}" if name else None for answer in answers]
    for called, record in zip(names, made, strict=True):
        if called:
            store.name(called, record.digest)
    if as_json:
        emit([
            {"name": called, "digest": record.digest, "record": record.model_dump(mode="json")}
            for called, record in zip(names, made, strict=True)
        ])  # fmt: skip
        return
    for called, answer, record in zip(names, answers, made, strict=True):
        out.print(f"{record.digest}  {called or title(answer)}", soft_wrap=True)


def place_of(members: Members, store: Store, partition: str | None) -> str:
    """The partition whose held-out text decides. Raises BadInput."""
    where = partition or next((one for digest in members if (one := store.load(digest, Expert).partition)), None)
    if not where:
        raise BadInput("none of these experts names a partition: say whose held-out text to choose on with --partition")
    return where


def promising(
    made: list[Merged], answers: Sequence[Answer], seed: Seed, members: Members, store: Store, run: int, where: str, documents: int | None
) -> tuple[list[Merged], list[Answer], Estimated]:  # fmt: skip
    """The `run` answers with the least estimate: by what the experts left of their text, or, where some left nothing, by their columns.
    And the estimates by statistics."""
    from elmwood.cli.old_choose import by_columns  # scipy and pyarrow

    started = time.perf_counter()
    titles = [title(answer) for answer in answers]
    named = dict(zip(titles, made, strict=True))
    with bars() as progress:
        if found := by_statistics(named, seed, members, store, progress):
            totals = {name: sum(layers.values()) for name, layers in found.items()}
            by = "estimates from statistics alone, no model run (in {}): distance from all experts by their Fisher matrices"
        else:
            totals = by_columns(named, seed, where, documents, store, progress)
            by = "some expert left no statistics, so estimates are from columns, no merge run (in {}): log-linear pools, bits per byte"
    order = sorted(range(len(made)), key=lambda place: totals[titles[place]])
    spent = duration(time.perf_counter() - started)
    lines = [[titles[place], f"{totals[titles[place]]:.4g}"] for place in order]
    table(by.format(spent), ["", "estimate"], lines, to=talk)
    return [made[place] for place in order[:run]], [answers[place] for place in order[:run]], found


def by_statistics(models: Mapping[str, Merged], seed: Seed, members: Members, store: Store, progress: Progress) -> Estimated:
    """Estimates by layer; none where some expert left no statistics."""
    try:
        for digest in members:
            statistics(digest, store)
    except BadInput:
        return {}
    return estimates(seed, sorted(members), models, store, "fisher", progress)


def chosen(
    made: Sequence[Merged], answers: Sequence[Answer], seed: Seed, members: Members, store: Store, *, where, documents, per_layer,
    estimated, name, as_json,
) -> None:  # fmt: skip
    """Score the answers on the tune half, once each, name the best, and test it on blocks that nobody chose on; say what it all cost."""
    from elmwood.cli.old_choose import layered, tested, tuned  # scipy and pyarrow

    started = time.perf_counter()
    models = dict(zip(map(title, answers), made, strict=True))
    with bars() as progress:
        found = tuned(models, seed, where, documents, store, progress)
        looked, read = len(models), found.tokens
        if per_layer and len(models) > 1:  # --run may have left one
            if estimated is None:
                estimated = by_statistics(models, seed, members, store, progress)
            search = layered(models, found.losses, estimated, seed, where, documents, store, progress)
            looked, read = looked + search.losses, read + search.tokens
            if len(set(search.choice.values())) > 1:
                models["by_layer"] = assemble({layer: models[answer] for layer, answer in search.choice.items()}, store)
                found = tuned(models, seed, where, documents, store, progress)
                read += found.tokens
    best = min(models, key=lambda one: found.losses[one].value)
    winner = models[best]
    if name:
        store.name(name, winner.digest)
    with bars() as progress:
        test, tokens = tested(winner, name or best, seed, where, documents, store, progress)
    spent = time.perf_counter() - started
    if as_json:
        rows = [
            {"answer": one, "digest": record.digest, "tune": found.losses[one]._asdict(), "behind": found.behind[one]._asdict()}
            for one, record in models.items()
        ]
        cost = {"answers": looked, "tokens": read, "tested_tokens": tokens, "seconds": round(spent, 1)}
        emit({"name": name, "digest": winner.digest, "record": winner.model_dump(mode="json"), "answers": rows,
              "test": test.model_dump(mode="json"), "cost": cost})  # fmt: skip
        return
    lines = [[one, *(f"{number:.4f}" for number in (*found.losses[one], *found.behind[one]))] for one in models]
    table("bits per byte on the tune half, and behind the best (paired)", ["", "bits/byte", "±", "behind", "±"], lines, to=talk)
    if "by_layer" in models:
        names = {record.digest: one for one, record in models.items()}
        talk.print("by layer: " + ", ".join(f"{layer} {names[digest]}" for layer, digest in models["by_layer"].layers.items()))
    talk.print(f"the search looked at {looked} models and read {short(read)} tokens, the test {short(tokens)}, in {duration(spent)}")
    talk.print(f"on fresh blocks {headline(test)}: {dict(told(test))['effect']}; {test.drawn:,} of {test.touched:,} blocks")
    out.print(f"{winner.digest}  {name or best}", soft_wrap=True)


# ---- states -------------------------------------------------------------------------------------------------------


def state_make(*, experts, method, weights, density, settings, layers, tensors, part, name, store, as_json) -> None:
    home = Store(store)
    answers = answers_of(method, settings, density=density)
    if len(answers) != 1:
        raise BadInput("a state has one method and one value of each setting: make the others one by one")
    members = members_of(home, experts, weights, layers, tensors)
    index, _, count = part.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise BadInput(f"--part {part!r}: write 0/4 for the first of four parts")
    with bars() as progress:
        rule, begins = answers[0].method, dict(answers[0].settings)
        job = StateJob(store=home.root, seed=seed_of(members, home).digest, members=members, method=rule, settings=begins,
                       part=(int(index), int(count)))  # fmt: skip
        made = make_state(job, progress)
    keep(home, home.load(made), name, as_json)


def state_add(*, states, name, store, as_json) -> None:
    home = Store(store)
    total, *others = [opened(home, one) for one in states]
    for other in others:
        total = add(total, other, home)
    keep(home, total, name, as_json)


def state_remove(*, state, experts, name, store, as_json) -> None:
    home = Store(store)
    rest = opened(home, state)
    with bars() as progress:
        for expert in expand(home, experts):
            rest = remove(rest, home.resolve(expert), home, progress)
    keep(home, rest, name, as_json)


def state_finalize(*, states, scale, settings, name, store, as_json) -> None:
    home = Store(store)
    held = [opened(home, one) for one in states]
    answers = answers_of(held[0].method, settings, scale=scale)
    with bars() as progress:
        made = [finalize(held, answer.settings, home, progress) for answer in answers]
    if len(made) == 1:
        keep(home, made[0], name, as_json)
    else:
        listed(made, answers, home, name, as_json)


def opened(store: Store, name: str) -> State:
    """A state by name or digest, or from a folder that `elmwood export` wrote, perhaps elsewhere. Raises BadInput, Damaged."""
    folder = Path(name)
    if not (folder / "elmwood.json").is_file():
        return store.load(name, State)
    record = parse((folder / "elmwood.json").read_bytes())
    if not isinstance(record, State):
        raise BadInput(f"{folder} holds a {record.kind}, no state")
    for file, digest in record.files.items():
        if store.put(folder / file) != digest:
            raise Damaged(f"{folder / file} is not what its record says: fetch it again")
    check(record, store)
    store.add(record)
    return record
