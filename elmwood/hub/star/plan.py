"""The plan of a new star."""

from typing import Any

from elmwood.errors import BadInput
from elmwood.hub.star.home import first_version
from elmwood.outer.step import OUTER
from elmwood.records import Corpus, Seed, Star
from elmwood.store import Named, Store
from elmwood.units import parse_count


def make_star(
    name: str, seed: Named, store: Store, *, corpus: Named | None = None, tokens: int | str = "10M", steps: int = 100, batch: int = 8,
    length: int | None = None, machines: int = 4, learning_rate: float | None = None, schedule: str = "wsd", threads: int = 1,
    rng_seed: int = 0, parts: int = 64, form: str = "int8", rate: float = OUTER.rate, momentum: float = OUTER.momentum,
    apart: bool = OUTER.apart, **fields: Any,
) -> Star:  # fmt: skip
    """Plan a star that goes on from a seed: `tokens` over all machines, of which `machines` are expected. Raises BadInput, UnknownName.

    `steps`: of one proposal. Stored as NAME/star.
    """
    from elmwood.study.training import default_length, default_rate, make_recipe, make_record

    start = store.load(seed, Seed)
    text = corpus or start.corpus
    if not text:
        raise BadInput(f"seed {start.name} does not say what it was trained on: name a corpus with --corpus")
    store.check_name(f"{name}/star")
    each = max(parse_count(tokens) // max(1, machines), 1)
    recipe = make_recipe(
        tokens=each, batch=batch, length=default_length(start.context) if length is None else length,
        learning_rate=default_rate(start, "full") if learning_rate is None else learning_rate, schedule=schedule, threads=threads,
        rng_seed=rng_seed, verb="star plan", **fields,
    )  # fmt: skip
    versions = recipe.steps // steps
    if versions < 1:
        raise BadInput(
            f"--tokens {tokens} are {recipe.steps} steps of each of {machines} machines, less than one proposal (--steps {steps})"
        )
    step = OUTER.model_dump() | {"rate": rate, "momentum": momentum, "apart": apart}
    outer = make_record(type(OUTER), "star plan", **step)
    star = make_record(
        Star, "star plan", name=name, seed=start.digest, corpus=store.load(text, Corpus).digest,
        recipe=recipe.model_copy(update={"steps": versions * steps}), steps=steps, parts=parts, form=form, outer=outer,
    )  # fmt: skip
    first_version(star, store)
    store.name(f"{name}/star", store.add(star))
    return star
