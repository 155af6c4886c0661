"""Seeds: models made elsewhere, and models trained from scratch, on one process or on several that torchrun or Ray Train started."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from elmwood.engine import Progress, placed, silent
from elmwood.errors import BadInput
from elmwood.ranges import Between, checked
from elmwood.records import Corpus, Diloco, Expert, Merged, Recipe, Seed, Shape, fingerprint
from elmwood.store import AnyStore, Named, Store
from elmwood.store.disk import temporary_folder
from elmwood.study.tasks import SMALL, THREADS
from elmwood.study.text import build, keep_name, open_store
from elmwood.study.training import default_length, default_rate, make_recipe, make_record
from elmwood.study.trial import check_use, try_seed
from elmwood.train.seeds.shapes import find_shape, read_shape, with_vocabulary
from elmwood.units import parse_count

# fields that the seed of the next round has from the one before
KEPT = {"architecture", "parameters", "vocabulary", "context", "separator", "licence", "corpus", "mix", "limits"}


@placed
def import_seed(
    model: str, store: AnyStore = None, *, separator: str | None = None, name: str | None = None,
    device: str | None = None, progress: Progress = silent
) -> Seed:  # fmt: skip
    """Import a causal language model: a transformers folder, a GGUF file, or a hub id. Raises BadSeed, BadInput."""
    store = open_store(store, name)
    from elmwood.lm import load  # torch

    progress(f"import {Path(model).name}", 0, 0, "")
    seed = load.import_seed(model, store, name=name, separator=separator)
    progress(f"try {seed.name}", 0, 0, "")
    if limits := try_seed(seed, store):
        seed = seed.model_copy(update={"limits": limits})
        store.add(seed)
    return keep_name(seed, name, store)


def seed_from(model: Named, store: AnyStore = None, *, name: str | None = None, progress: Progress = silent) -> Seed:
    """Make a merge, or one expert, the seed of the next round: experts branch from it. An adapter is folded into its own seed.

    The record names what it grew from, and so all seeds and experts before it. Raises BadInput, BadSeed, Damaged.
    """
    store = open_store(store, name)
    grown = store.load(model)
    if not isinstance(grown, Expert | Merged):
        raise BadInput(
            f"{grown.digest[:8]} is a {grown.kind}: a seed grows from a merge or an expert; combine others first with `elmwood merge`"
        )
    before = store.load(grown.seed, Seed)
    check_use(before, "merge")
    from elmwood.merge.export.folder import check_checkpoint, checkpoint  # torch

    key = fingerprint("seed-from", grown.digest, name or before.name)
    with store.held(key, progress):
        if done := store.done(key):
            return keep_name(store.load(done, Seed), name, store)
        with temporary_folder(store.root / "work") as folder:
            checkpoint(grown, before, store, folder, progress)
            check_checkpoint(folder, progress)
            (folder / "README.md").unlink(missing_ok=True)  # the card of the merge
            words = json.loads((folder / "config.json").read_bytes()).get("vocab_size", before.vocabulary)
            files = store.put_folder(folder)
        if words != before.vocabulary:
            raise BadInput(f"{grown.kind} {grown.digest[:8]} has {words} tokens, its seed {before.vocabulary}: export it, and import that")
        made = Seed(**before.model_dump(include=KEPT), name=name or before.name, files=files, grown_from=grown.digest)
        store.finish(key, made)
    return keep_name(made, name, store)


@placed
@checked
def train_seed(
    corpus: Corpus | str | Sequence[str], store: AnyStore = None, *, like: str | None = None, config: str | Path | None = None,
    mix: Sequence[str] | Mapping[str, float] = (), tokens: int | str = "3M", layers: int = 3, width: int = 128,
    vocabulary: int | None = None, length: int | None = None, batch: int = 8, learning_rate: float | None = None,
    schedule: str = "cosine", accumulate: int = 1, checkpointing: bool = False, keep_every: Annotated[int | None, Between(1)] = None,
    sharded: bool = False, rng_seed: int = 0, threads: int | None = None, name: str | None = None,
    device: str | None = None, progress: Progress = silent,
) -> Seed:  # fmt: skip
    """Train a causal LM from scratch, with its own tokenizer: a small Llama, the shape of a published model (`like`), or any
    config of transformers (`config`). Interrupted runs resume. Raises BadInput, BadCorpus, BadSeed, DoesNotFit.

    `mix`: further corpora and the share of the rows that each gets, as "NAME=0.3" or a mapping. `keep_every`: store the model as a seed
    after every so many steps, NAME-step-500 and so on. Under torchrun or Ray Train all processes call this, and the first returns what
    it made; `sharded` divides the model among them. No tokens: random weights and a tokenizer, for forests without a trained seed.
    """
    store = open_store(store, name)
    untrained = parse_count(tokens) == 0
    shape, recipe = plan_seed(
        like=like, config=config, layers=layers, width=width, vocabulary=vocabulary, length=length, batch=batch,
        tokens=1 if untrained else tokens,
        learning_rate=learning_rate, schedule=schedule, accumulate=accumulate, checkpointing=checkpointing, rng_seed=rng_seed,
        threads=threads,
    )  # fmt: skip
    shares = read_mix(mix)
    from elmwood.train import tasks  # torch
    from elmwood.train.card.processes import join

    group = join(sharded)
    talk = progress if group.first else silent

    def make(sources: Corpus | str | Sequence[str]) -> Corpus:
        return store.load(group.once(lambda: find_corpus(sources, store, talk).digest), Corpus)

    sources = [tasks.Source(make(corpus), 1 - sum(shares.values())), *(tasks.Source(make(one), share) for one, share in shares.items())]

    def keep(kept: Seed) -> None:
        keep_name(kept, name and f"{name}-step-{kept.step}", store)

    called = name or "seed"
    if untrained:
        began = group.once(lambda: tasks.start_seed(sources, shape, rng_seed, store, name=called, progress=talk).digest)
        made = store.load(began, Seed)
    else:
        made = tasks.train_seed(sources, shape, recipe, store, name=called, keep_every=keep_every, kept=keep, group=group, progress=talk)
    if not group.first:
        return made
    if config and (limits := try_seed(made, store)):
        made = made.model_copy(update={"limits": limits})
        store.add(made)
    return keep_name(made, name, store)


@placed
@checked
def diloco(
    seed: Named, lighthouse: str, site: int, store: AnyStore = None, *, sites: Annotated[int, Between(2, 16)] = 4,
    corpus: Named | None = None, tokens: int | str = "10M", steps: Annotated[int, Between(1)] = 100, batch: int = 8,
    length: int | None = None, learning_rate: float | None = None, schedule: str = "wsd", fragments: Annotated[int, Between(1)] = 1,
    delay: Annotated[int, Between(0)] = 0, keep: float = 0.0, rate: float = 0.7, momentum: float = 0.9, accumulate: int = 1,
    checkpointing: bool = False, wait: Annotated[float, Between(1)] = 3600.0, rng_seed: int = 0, threads: int | None = None,
    name: str | None = None, device: str | None = None, progress: Progress = silent,
) -> Seed:  # fmt: skip
    """Go on from a seed, as one of several trusted sites that exchange weights every `steps` steps (DiLoCo, arXiv:2311.08105), or a part
    of them more often (`fragments`, arXiv:2501.18512). Every site calls this; all end with the same record. Interrupted sites resume.

    `lighthouse`: address of `torchft_lighthouse` in the VPN of the sites. `tokens`: of all sites together. `wait`: the longest that a
    site waits for others, in seconds. Raises BadInput, BadCorpus, MissingExtra, Damaged, Alone.
    """
    store = open_store(store, name)
    plan = plan_diloco(
        store.load(seed, Seed), store, sites=sites, corpus=corpus, tokens=tokens, steps=steps, batch=batch, length=length,
        learning_rate=learning_rate, threads=threads, fragments=fragments, delay=delay, keep=keep, rate=rate, momentum=momentum,
        schedule=schedule, accumulate=accumulate, checkpointing=checkpointing, rng_seed=rng_seed,
    )  # fmt: skip
    from elmwood.train.sites.task import train_at_site  # torch

    made = train_at_site(plan, site, lighthouse, store, name=name or "seed", wait_s=wait, progress=progress)
    return keep_name(made, name, store)


def plan_diloco(
    seed: Seed, store: Store, *, sites: int, corpus: Named | None, tokens: int | str, steps: int, batch: int, length: int | None,
    learning_rate: float | None, threads: int | None, fragments: int, delay: int, keep: float, rate: float, momentum: float,
    **options: Any,
) -> Diloco:  # fmt: skip
    """The plan that all sites must have in common: whole rounds, and at least one. Raises BadInput."""
    text = corpus or seed.corpus
    if not text:
        raise BadInput(f"seed {seed.name} does not say what it was trained on: name a corpus with --corpus")
    if steps % fragments:
        raise BadInput(f"--steps {steps} is no multiple of --fragments {fragments}: choose {-(-steps // fragments) * fragments}")
    if delay >= (apart := steps // fragments):
        raise BadInput(f"--delay {delay}: fragments are exchanged {apart} steps apart; choose less")
    recipe = make_recipe(
        tokens=tokens, batch=batch * sites, length=default_length(seed.context) if length is None else length,
        learning_rate=default_rate(seed, "full") if learning_rate is None else learning_rate,
        threads=(1 if seed.parameters < SMALL else THREADS) if threads is None else threads, verb="seed diloco", **options,
    )  # fmt: skip
    if recipe.steps < apart:
        raise BadInput(f"--tokens {tokens} are {recipe.steps} steps of {sites} sites, less than a round of {apart}: train more, or fewer")
    return make_record(
        Diloco, "seed diloco", seed=seed.digest, corpus=store.load(text, Corpus).digest, sites=sites, steps=steps, fragments=fragments,
        recipe=recipe.model_copy(update={"steps": recipe.steps // apart * apart}), delay=delay, keep=keep, rate=rate, momentum=momentum,
    )  # fmt: skip


def plan_seed(
    *, like: str | None = None, config: str | Path | None = None, layers: int = 3, width: int = 128, vocabulary: int | None = None,
    length: int | None = None, batch: int = 8, learning_rate: float | None = None, threads: int | None = None, **options: Any,
) -> tuple[Shape | dict[str, Any], Recipe]:  # fmt: skip
    """The shape and the recipe of a seed. Raises BadInput, BadSeed."""
    if like and config:
        raise BadInput("--like and --config both name a shape: leave one of them out")
    if not like and not config:
        length = 256 if length is None else length
        recipe = make_recipe(
            method="full", batch=batch, length=length, learning_rate=3e-3 if learning_rate is None else learning_rate,
            threads=1 if threads is None else threads, verb="seed train", **options,
        )  # fmt: skip
        return llama(layers, width, 2048 if vocabulary is None else vocabulary, length), recipe
    from elmwood.lm.importing.config import check_causal, context_of  # torch
    from elmwood.lm.pretrained import empty_model, make_config

    settings = find_shape(like) if like else read_shape(config or "")
    if vocabulary is not None:
        settings = with_vocabulary(settings, vocabulary)
    found = check_causal(make_config(settings, like or config), like or config)
    parameters = empty_model(found).num_parameters()
    recipe = make_recipe(
        method="full", batch=batch, length=default_length(context_of(found) or 1024) if length is None else length,
        learning_rate=seed_rate(parameters) if learning_rate is None else learning_rate,
        threads=(1 if parameters < SMALL else THREADS) if threads is None else threads, verb="seed train", **options,
    )  # fmt: skip
    return settings, recipe


def seed_rate(parameters: int) -> float:
    """Peak learning rate of a seed from scratch where the user chose none: what published models of this size took, about."""
    return 3e-3 if parameters < 20_000_000 else 1e-3 if parameters < 700_000_000 else 3e-4


def read_mix(mix: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """["code=0.3", …] -> {"code": 0.3, …}. Raises BadInput."""
    found: dict[str, float] = {}
    pairs = mix.items() if isinstance(mix, Mapping) else (one.rpartition("=")[::2] for one in ([mix] if isinstance(mix, str) else mix))
    for corpus, share in pairs:
        try:
            found[str(corpus)] = float(share)
        except ValueError as error:
            raise BadInput(
                f"--mix {corpus}={share}: write a corpus and the share of the text that it gets, as in code.jsonl=0.3"
            ) from error
    if any(not share > 0 for share in found.values()) or not sum(found.values()) < 1 or "" in found:
        raise BadInput(f"--mix {mix}: shares are above 0 and sum to less than 1; what they leave is the main corpus': reduce them")
    return found


def find_corpus(given: Corpus | str | Sequence[str], store: Store, progress: Progress) -> Corpus:
    """A corpus, by its name in the store or from its sources. Raises BadInput, BadCorpus."""
    if isinstance(given, Corpus):
        return given
    names = [given] if isinstance(given, str) else list(given)
    if len(names) == 1 and names[0] in store.names():
        return store.load(names[0], Corpus)
    return build(names, store=store, progress=progress)


def llama(layers: int, width: int, vocabulary: int, context: int) -> Shape:
    """The proportions of a Llama: heads of 32 (64 from width 512), feed-forward 8/3 of the width in steps of 32. Raises BadInput."""
    heads, feed_forward = max(1, width // (64 if width >= 512 else 32)), -(-width * 8 // 3 // 32) * 32
    return make_record(
        Shape, "seed train", layers=layers, width=width, heads=heads, feed_forward=feed_forward, vocabulary=vocabulary, context=context
    )
