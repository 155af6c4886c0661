"""Merges: which experts with which weights, by which rules; and states, the sums that merges are made from."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from elmwood.engine import Progress, placed, silent
from elmwood.errors import BadInput, BadRecord, Damaged
from elmwood.merge import mergekit
from elmwood.merge.adapters import LOW_RULES
from elmwood.merge.answers import combine, make, title
from elmwood.merge.checkpoint import Answer, finalize
from elmwood.merge.layer_weights import depth_of
from elmwood.merge.parallel import StateJob, make_state, spread
from elmwood.merge.rules.table import RULES, Rules, open_rules
from elmwood.merge.states import add, check_layout, check_sums, remove
from elmwood.ranges import Between, Documents, checked
from elmwood.records import Expert, Forest, Merged, Record, Seed, Share, State, read_record
from elmwood.report.notebook import facts, show_ranking
from elmwood.store import AnyStore, Holder, Named, Store, hash_file, listed
from elmwood.study.quality.selection import ChosenMerge, choose_best
from elmwood.study.text import keep_name, open_store
from elmwood.study.trial import check_use
from elmwood.weights.experts import seed_places
from elmwood.weights.tensors import SIZES, places

Weight = float | Sequence[float]  # several: a gradient over depth, from the first layer to the last
Some = Annotated[int | None, Between(1)]
Values = float | Sequence[float]  # several: an answer for each
Members = dict[str, tuple[Share, ...]]  # expert's digest -> its weights


class Merges(NamedTuple):
    """What `merge` made: by answer, as in 'ties density=0.2', a checkpoint or an adapter; and how the best was chosen, if one was."""

    made: dict[str, Merged]
    choice: ChosenMerge | None = None

    @property
    def record(self) -> Merged:
        """The chosen one, or the only one. Raises BadInput."""
        if self.choice:
            return self.made[self.choice.best]
        if len(self.made) > 1:
            raise BadInput(f"these are {len(self.made)} merges, and none was chosen: take one of `made`, or merge with choose=True")
        return next(iter(self.made.values()))

    def _repr_html_(self) -> str | None:
        if self.choice:
            return show_ranking("Merges on the tune half of held-out text", self.choice.tuned.losses, self.choice.tuned.behind)
        if len(self.made) == 1:
            return self.record._repr_html_()
        return facts(f"{len(self.made)} merges", {one: record.digest[:12] for one, record in self.made.items()})


@placed
@checked
def merge(
    experts: Named | Sequence[Named], store: AnyStore = None, *, method: str | Sequence[str] | None = None,
    weights: Weight | Sequence[Weight] | None = None, scale: Values | None = None, density: Values | None = None,
    rank: Values | None = None, settings: Mapping[str, Values] | None = None, layers: range | None = None, tensors: str = "",
    resize: bool = False, choose: bool = False, per_layer: bool = False, run: Some = None, partition: str | None = None,
    documents: Documents = None, parts: Some = None, workers: Some = None, engine: str = "local", name: str | None = None,
    device: str | None = None, progress: Progress = silent,
) -> Merges:  # fmt: skip
    """Merge experts of one seed into one checkpoint, or adapters into one adapter. Several values of a setting give several merges.

    experts: experts, a forest for all it has, or the path of a mergekit YAML file, which then says everything about the merge.
    method: a merge rule or several (default: average). weights: one for all experts, or one for each in the order named.
    layers, tensors: merge only these layers, or tensors with this in their name; everything else stays the seed's.
    choose: name the best of several answers on the tune half of held-out text, and test it on fresh blocks. For the other options see
    `elmwood merge --help`. Raises BadInput, ForeignExpert, UnknownName, Damaged.
    """
    home, names = Store(store), listed(experts)
    given = {"scale": scale, "density": density, "rank": rank, **(settings or {})}
    if len(names) == 1 and isinstance(names[0], str) and names[0].endswith((".yaml", ".yml")):
        typed = [method, weights, layers, tensors or None, *given.values()]
        rules, (members, answers) = RULES, read_mergekit(Path(names[0]), home, any(value is not None for value in typed))
    else:
        members, methods = members_of(names, home, weights, layers, tensors), listed(method or "average")
        rules = open_rules(methods)
        answers = answers_of(methods, given, rules)
    if per_layer and (not choose or len(answers) < 2 or any(answer.method in LOW_RULES for answer in answers)):
        raise BadInput("--per-layer takes layers from several checkpoints: give --choose, several answers, and no rule that makes adapters")
    seed = seed_of(members, home)
    found = (
        spread(seed, members, answers, home, parts=parts, workers=workers or 1, engine=engine, progress=progress, rules=rules)
        if parts and _can_be_parted(answers, resize)
        else make(seed, members, answers, home, resize, progress, rules)
    )
    made = dict(zip(map(title, answers), found, strict=True))
    if not choose:
        return _name_all(made, name, home)
    where = partition or partition_of(members, home)
    choice, made = choose_best(made, seed, sorted(members), where, home, per_layer=per_layer, run=run, documents=documents, name=name,
                               progress=progress)  # fmt: skip
    return Merges(made, choice)


def _name_all(made: dict[str, Merged], name: str | None, store: Store) -> Merges:
    for called, record in zip(names_of(name, made), made.values(), strict=True):
        if called:
            store.name(called, record.digest)
    return Merges(made)


def names_of(name: str | None, made: Mapping[str, Merged]) -> list[str | None]:
    """What merges are called: a single one NAME, several NAME/method-setting."""
    if name is None or len(made) == 1:
        return [name] * len(made)
    return [f"{name}/{re.sub('[^A-Za-z0-9._-]', '-', one)}" for one in made]


# ---- what is merged -------------------------------------------------------------------------------------------------


def members_of(
    names: Named | Sequence[Named],
    store: Store,
    weights: Weight | Sequence[Weight] | None = None,
    layers: range | None = None,
    tensors: str = "",
) -> Members:
    """Experts with their weights; a forest stands for its experts. Raises BadInput."""
    found: list[str] = []
    for record in map(store.load, store.expand(names)):
        if not isinstance(record, Forest | Expert):
            raise BadInput(f"{record.digest[:8]} is a {record.kind}: a merge takes experts, or a forest for all it has")
        found += record.experts if isinstance(record, Forest) else [record.digest]
    if twice := next((digest for digest in found if found.count(digest) > 1), None):
        raise BadInput(f"expert {twice[:8]} is named twice: give it a larger weight instead, with --weights")
    each: list[Weight] = [1.0] if weights is None else list(weights) if isinstance(weights, Sequence) else [weights]
    if len(each) not in (1, len(found)):
        raise BadInput(f"{len(each)} weights for {len(found)} experts: give one for all, or one for each in the order named")
    span = (layers.start, layers.stop) if layers else None
    if found and (layers or tensors):
        _check_selection(seed_of(dict.fromkeys(found), store), layers, tensors, store)
    values = [tuple(map(float, one)) if isinstance(one, Sequence) else (float(one),) for one in each]
    shares = [(Share(tensors=tensors, layers=span, values=one),) for one in values]
    return dict(zip(found, shares * (len(found) if len(each) == 1 else 1), strict=True))


def _check_selection(seed: Seed, layers: range | None, tensors: str, store: Store) -> None:
    """Raises BadInput where a merge of these layers and tensors would change nothing."""
    names = seed_places(seed, store)
    if layers and layers.stop > (depth := depth_of(names)):
        raise BadInput(
            f"--layers {layers.start}-{layers.stop - 1}: seed {seed.name} has {depth} layers, 0 to {depth - 1}; choose among them"
        )
    if not any(tensors in name for name in names):
        raise BadInput(f"--tensors {tensors!r}: no tensor of the seed has this in its name; a name is {min(names)}")


def answers_of(methods: Sequence[str], given: Mapping[str, Values | None], rules: Rules = RULES) -> list[Answer]:
    """Every combination of what is given; None is the rule's own default. Raises BadInput, UnknownName."""
    values = {name: list(value) if isinstance(value, Sequence) else [value] for name, value in given.items() if value is not None}
    return combine(methods, values, rules)


def read_mergekit(path: Path, store: Store, typed: bool = False) -> tuple[Members, list[Answer]]:
    """The experts and the answer of a mergekit YAML file; `typed`: whether more was asked beside it. Raises BadInput, UnknownName."""
    if typed:
        raise BadInput(f"{path} says how to merge: change it there, or name the experts here instead of the file")
    with path.open("rb") as file:
        raw = file.read(4 * mergekit.LARGEST + 1)  # more is refused by its length
    try:
        asked = mergekit.read(raw.decode())
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    members = {store.resolve(one): shares for one, shares in asked.members.items()}
    if asked.base and store.resolve(asked.base) != seed_of(members, store).digest:
        raise BadInput(f"{asked.base} is not the seed of these experts: name that as base_model")
    tensors = seed_places(seed_of(members, store), store)
    depth = depth_of(tensors)
    if asked.layers and asked.layers != depth:
        raise BadInput(f"the slices make {asked.layers} layers, the seed has {depth}: a merge keeps its seed's architecture")
    if asked.dtype and (have := {place.dtype for place in tensors.values() if place.dtype in SIZES}) != {asked.dtype}:
        raise BadInput(f"dtype: a merge keeps its seed's dtype, {', '.join(sorted(have))}, and the file says {asked.dtype}: leave it out")
    members = {digest: mergekit.gradients_over(shares, depth) for digest, shares in members.items()}
    return members, [asked.answer]


def seed_of(members: Mapping[str, Any], store: Store) -> Seed:
    """The seed of the first expert, which must allow merges; experts of another one are refused where they are read. Raises BadInput,
    BadSeed."""
    if not members:
        raise BadInput("a merge takes two experts or more: none are named")
    seed = store.load(store.load(next(iter(members)), Expert).seed, Seed)
    check_use(seed, "merge")
    return seed


def partition_of(members: Mapping[str, Any], store: Store) -> str:
    """The partition of the first expert that has one: its held-out text decides between merges. Raises BadInput."""
    where = next((one for digest in members if (one := store.load(digest, Expert).partition)), None)
    if not where:
        raise BadInput("none of these experts names a partition: say whose held-out text to choose on with --partition")
    return where


def _can_be_parted(answers: Sequence[Answer], resize: bool) -> bool:
    """Raises BadInput for what cannot be summed in parts."""
    if resize:
        raise BadInput("--resize and --parts do not go together: states are of experts with the seed's own vocabulary")
    if low := next((answer.method for answer in answers if answer.method in LOW_RULES), None):
        raise BadInput(f"--parts and {low} do not go together: adapters are small; leave --parts out")
    return True


# ---- states ---------------------------------------------------------------------------------------------------------


def state_make(
    experts: Named | Sequence[Named], store: AnyStore = None, *, method: str = "average", weights: Weight | Sequence[Weight] | None = None,
    density: float | None = None, settings: Mapping[str, Values] | None = None, layers: range | None = None, tensors: str = "",
    part: tuple[int, int] = (0, 1), name: str | None = None, progress: Progress = silent,
) -> State:  # fmt: skip
    """Sum one or more experts under a merge rule. `part`: the (i, n)-th share of every tensor alone. Raises BadInput, ForeignExpert."""
    rules = open_rules([method])
    answers = answers_of([method], {"density": density, **(settings or {})}, rules)
    if len(answers) != 1:
        raise BadInput("a state has one method and one value of each setting: make the others one by one")
    if not 0 <= part[0] < part[1]:
        raise BadInput(f"--part {part[0]}/{part[1]}: parts are numbered from 0; write 0/4 for the first of four")
    home = open_store(store, name)
    members = members_of(experts, home, weights, layers, tensors)
    job = StateJob(store=home.root, seed=seed_of(members, home).digest, members=members, method=answers[0].method,
                   settings=dict(answers[0].settings), part=part, typed=tuple(rules.keys() - RULES.keys()))  # fmt: skip
    return keep_name(home.load(make_state(job, progress), State), name, home)


def state_add(states: Sequence[Named | Path], store: AnyStore = None, *, method: str | None = None, name: str | None = None) -> State:
    """The sum of states: names, records, or folders written by `export`. An expert that is in several counts once. Raises BadInput."""
    home, rules = open_store(store, name), _own_rules(method)
    total, *others = [open_state(one, home, rules) for one in states]
    for other in others:
        total = add(total, other, home, rules)
    return keep_name(total, name, home)


def state_remove(
    state: Named | Path, experts: Named | Sequence[Named], store: AnyStore = None, *, method: str | None = None, name: str | None = None,
    progress: Progress = silent,
) -> State:  # fmt: skip
    """The state without some experts, exactly as if they had never been in it. Their files are read. Raises BadInput."""
    home, rules = open_store(store, name), _own_rules(method)
    rest = open_state(state, home, rules)
    for expert in home.expand(experts):
        rest = remove(rest, home.resolve(expert), home, progress, rules)
    return keep_name(rest, name, home)


def state_finalize(
    states: Named | Path | Sequence[Named | Path], store: AnyStore = None, *, method: str | None = None, scale: Values | None = None,
    settings: Mapping[str, Values] | None = None, name: str | None = None, progress: Progress = silent,
) -> Merges:  # fmt: skip
    """The checkpoint of a state, or of all parts of one; several values give several checkpoints. No expert is read. Raises BadInput."""
    home, rules = Store(store), _own_rules(method)
    held = [open_state(one, home, rules) for one in listed(states)]
    answers = answers_of([held[0].method], {"scale": scale, **(settings or {})}, rules)
    made = {title(answer): finalize(held, answer.settings, home, progress, rules) for answer in answers}
    return _name_all(made, name, home)


def _own_rules(method: str | None) -> Rules:
    """The rules that states are added or finished by: the table and, where it is typed, a rule of the user's own."""
    return open_rules([method] if method else [])


def open_state(name: Named | Path, store: Store, rules: Rules = RULES) -> State:
    """A state by name or digest, or from a folder that `elmwood export` wrote, perhaps elsewhere. Raises BadInput, Damaged."""
    if isinstance(name, Record | Holder):
        return store.load(name, State)
    folder = Path(name)
    if not (folder / "elmwood.json").is_file():
        return store.load(str(name), State)
    record = read_record(folder / "elmwood.json")
    if not isinstance(record, State):
        raise BadInput(f"{folder} holds a {record.kind}, not a state: name the folder that a state was exported to")
    _receive_files(record, folder, store, rules)
    store.add(record)
    return record


def _receive_files(record: State, folder: Path, store: Store, rules: Rules) -> None:
    """Put the files of a state from elsewhere into the store, after everything about them was checked where they are. The header says how
    large a file is and the seed how large it may be, so no more than that is read. Raises BadInput, ForeignExpert, Damaged."""
    for file in record.files:
        if file in ("", ".", "..") or Path(file).name != file:
            raise BadRecord(f"the record names the file {file!r}; the files of a state lie in its own folder: do not use this state")
        if (folder / file).is_symlink() or not (folder / file).is_file():
            raise Damaged(f"{folder / file} is missing or no regular file: fetch it again")
    held = places([folder / file for file in record.files])
    check_layout(record, held, store, rules)
    for file, digest in record.files.items():
        if f"sha256:{hash_file(folder / file)}" != digest:
            raise Damaged(f"{folder / file} is not what its record says: fetch it again")
    check_sums(record, held, store, rules)
    for file, digest in record.files.items():
        if store.put(folder / file) != digest:
            raise Damaged(f"{folder / file} changed while it was read: fetch it again")
