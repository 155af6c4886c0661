"""What a model is made of: its seed, its partition, the ensemble that a forest stands for. And finished models: experts as a forest,
text from any model."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import ValidationError
from tokenizers import Tokenizer

from elmwood.domains.partition import serving
from elmwood.domains.route import Routing, open_router
from elmwood.engine import placed
from elmwood.errors import BadInput, ForeignExpert
from elmwood.lm.files import tokenizer
from elmwood.ranges import Between, Count, RngSeed, checked
from elmwood.records import Ensemble, Expert, Forest, Merged, Mixture, Partition, Record, Seed
from elmwood.report.notebook import show_sample
from elmwood.store import AnyStore, Named, Store
from elmwood.study.trial import check_use

if TYPE_CHECKING:
    from elmwood.lm.interface import LM

ALONE = ("weights", "activated")  # nothing is mixed beside them
MIXING = {word: {"mixing": word} for word in ("outputs", *ALONE)} | {
    word: {"mixing": "outputs", "aggregation": word} for word in ("arithmetic", "geometric", "median")
}
BOUNDED = "bounded"  # every expert on probation
SETTINGS = (*Routing.__dataclass_fields__, "block", "bound")  # of an ensemble, that a user may change by name
Settings = Mapping[str, Any]  # name -> value, or its text; "none" is None


def name_of(model: Named, store: Store) -> str:
    """What tables call a model: the name that the user gave, else the beginning of its digest."""
    return model if isinstance(model, str) and not store.has(model) else store.resolve(model)[:8]


def as_model(record: Record, store: Store) -> Record:
    """A forest stands for its ensemble with the default settings; other records for themselves."""
    if isinstance(record, Forest):
        record = Ensemble(forest=record.digest)
        store.add(record)
    return record


def with_mixing(record: Record, mixing: str | None, store: Store, settings: Settings | None = None) -> Record:
    """An ensemble (or a forest, for its default one) that mixes so: words of MIXING, by comma; and with other settings of its router.
    The record itself where nothing is asked. Raises BadInput, UnknownName."""
    if mixing is None and not settings:
        return record
    record = as_model(record, store)
    if not isinstance(record, Ensemble):
        raise BadInput(
            f"mixing and settings are of ensembles and forests, and {record.digest[:8]} is a {record.kind}: leave --mixing and --set out"
        )
    made = _with_settings(record.model_copy(update={} if mixing is None else _mixing(record, mixing, store)), settings or {})
    store.add(made)
    return made


def _with_settings(record: Ensemble, settings: Settings) -> Ensemble:
    """Raises BadInput, UnknownName."""
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise BadInput(f"an ensemble has no setting {unknown[0]!r} to choose: have {', '.join(SETTINGS)}")
    if "router" in settings:
        open_router(str(settings["router"]))
    changed = {name: None if value == "none" else value for name, value in settings.items()}
    try:
        made = Ensemble.model_validate(record.model_dump() | changed)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise BadInput(f"{first['loc'][0]}={first['input']}: {first['msg'][:200]}") from error
    Routing.of(made)  # what goes together
    return made


def _mixing(record: Ensemble, mixing: str, store: Store) -> dict[str, Any]:
    """The fields that words stand for. Raises BadInput."""
    changed: dict[str, Any] = {}
    words = [one.strip() for one in mixing.split(",")]
    for word in words:
        if word not in MIXING and word != BOUNDED:
            raise BadInput(f"mixing {word!r} is unknown: choose {', '.join(MIXING)} or {BOUNDED}")
        changed |= MIXING.get(word, {})
        changed |= {"bounded": store.load(record.forest, Forest).experts} if word == BOUNDED else {}
    if len(words) > 1 and (lone := next((word for word in words if word in ALONE), None)):
        raise BadInput(f"mixing {mixing!r}: {lone} goes with no other way: write it alone")
    return changed


def seed_of(record: Record, store: Store) -> Seed:
    """The seed a model grew from. Raises UnknownName."""
    if isinstance(record, Ensemble):
        record = store.load(record.forest, Forest)
    if isinstance(record, Expert | Forest | Merged | Mixture):
        return store.load(record.seed, Seed)
    return store.load(record.digest, Seed)


def common_seed(models: Sequence[Record], store: Store) -> Seed:
    """The one seed of some models, whose tokenizer cuts the holdout. Raises BadInput where they have several."""
    seeds = {seed_of(model, store).digest for model in models}
    if len(seeds) != 1:
        raise BadInput(f"models are compared token by token, so they need one seed; these have {len(seeds)}: compare those of one seed")
    return store.load(seeds.pop(), Seed)


def partition_of(models: Sequence[Record], named: Named | None, store: Store) -> Partition:
    """The partition whose holdout is scored: the named one, else that of the first model that has one. Raises BadInput."""
    if named:
        return store.load(named, Partition)
    for model in models:
        source = store.load(model.forest) if isinstance(model, Ensemble | Mixture) else model
        source = store.load(model.contributions[0].expert) if isinstance(model, Merged) else source
        if found := getattr(source, "partition", None):
            return store.load(found, Partition)
    raise BadInput("none of these models names a partition: name the one whose held-out text is scored with --partition")


def forest(partition: Named, experts: Named | Sequence[Named], store: AnyStore = None, *, name: str | None = None) -> Forest:
    """A seed, a partition and experts as one record. Raises BadInput, ForeignExpert.

    An expert is left out if every part of its domain has an expert of its own.
    """
    store = Store(store)
    division, members = store.load(partition, Partition), [store.load(one, Expert) for one in store.expand(experts)]
    if not members:
        raise BadInput("a forest needs at least one expert: train some, then name them here")
    for expert in members:
        if expert.seed != members[0].seed:
            raise ForeignExpert(
                f"expert {expert.digest[:8]} grew from seed {expert.seed[:8]}, {members[0].digest[:8]} from {members[0].seed[:8]}; "
                "a forest has one seed: leave one of them out, or retrain it"
            )
    served = serving(division, [(expert.partition, expert.domain) for expert in members], store)
    kept = [expert.digest for expert, places in zip(members, served, strict=True) if places]
    made = Forest(seed=members[0].seed, partition=division.digest, experts=tuple(kept))
    store.add(made)
    if name:
        store.name(name, made.digest)
    return made


# ---- text from a model ----------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A model that can be run, with the tokenizer of its seed."""

    record: Record
    lm: "LM"
    tokenizer: Tokenizer
    seed: Seed

    def _repr_html_(self) -> str | None:
        return self.record._repr_html_()


@placed
def open_model(
    model: Named, store: AnyStore = None, *, mixing: str | None = None, settings: Settings | None = None, device: str | None = None
) -> Opened:
    """A model by name or record; a forest opens as its default ensemble. `settings`: other values of an ensemble's fields.
    Raises UnknownName, BadInput, ForeignExpert."""
    from elmwood.ensemble import mixture  # torch

    store = Store(store)
    record = with_mixing(as_model(store.load(model), store), mixing, store, settings)
    seed = seed_of(record, store)
    return Opened(record, mixture.open_model(record, store), tokenizer(seed, store), seed)


class Sample(NamedTuple):
    """Generated text, and each expert's share of its prediction, largest first."""

    prompt: str
    text: str
    experts: dict[str, float]

    def __str__(self) -> str:
        return self.prompt + self.text

    def _repr_html_(self) -> str:
        return show_sample(self.prompt, self.text, self.experts)


Temperature = Annotated[float, Between(1e-3, 1e3, zero=True)]
TopP = Annotated[float, Between(1e-3, 1)]


@placed
@checked
def generate(
    model: Named | Opened, prompt: str, store: AnyStore = None, *, mixing: str | None = None, settings: Settings | None = None,
    max_tokens: Count = 128, temperature: Temperature = 0.8, top_p: TopP = 0.95, rng_seed: RngSeed = 0,
    device: str | None = None, on_text: Callable[[str], None] = lambda piece: None,
) -> Sample:  # fmt: skip
    """Continue a prompt. `on_text` gets the text piece by piece. Raises BadInput, BadSeed, UnknownName,
    ForeignExpert."""
    from elmwood.ensemble.generate import generate as steps  # torch

    opened = model if isinstance(model, Opened) else open_model(model, mixing=mixing, settings=settings, store=store)
    check_use(opened.seed, "generate")
    share: dict[str, float] = {}
    pieces: list[str] = []
    for step in steps(
        opened.lm, opened.tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, rng_seed=rng_seed
    ):  # fmt: skip
        for expert, weight in step.weights.items():
            share[expert] = share.get(expert, 0) + weight
        pieces.append(step.text)
        on_text(step.text)
    total = sum(share.values()) or 1
    shares = {expert: round(weight / total, 4) for expert, weight in sorted(share.items(), key=lambda item: -item[1])}
    return Sample(prompt, "".join(pieces), shares)
