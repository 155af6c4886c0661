"""A star in one process, for benches: the same phases, gates and steps as over HTTP, one machine after another."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from elmwood.corpus.build import documents
from elmwood.corpus.tokens import Packed, pack, train_tokenizer
from elmwood.lm.load import load_model, new_model, save_seed
from elmwood.outer import round
from elmwood.outer.compress import open_delta, write_delta
from elmwood.outer.gates import MEMORY
from elmwood.outer.round import State, Terms, Worker
from elmwood.outer.settle import Base, Settled, blobs_of, settle
from elmwood.outer.step import OUTER, shapes_of
from elmwood.records import Recipe, Seed, Shape, Star, Version
from elmwood.store import Store
from elmwood.study.text import build
from elmwood.train.inner.judge import LossJudge, draw
from elmwood.train.inner.phase import Slice, open_local, run_phase, settle_phase

TERMS = Terms(grace_s=0)
WARM = 3e-3  # learning rate of the warm start
Change = Callable[[dict[str, np.ndarray], dict[str, Any]], dict[str, np.ndarray]]
Each = Callable[[int, Path, int, int], None]  # versions made, weights of the newest, bytes that a machine sent and received


class Place(NamedTuple):
    """What all runs of a bench share."""

    store: Store
    seed: Seed
    train: Packed
    holdout: Packed
    corpus: str


def open_place(folder: Path, sources: list[str], width: int, vocabulary: int, length: int) -> Place:
    """A seed of two layers with random weights and a tokenizer of its own."""
    store = Store(folder)
    corpus = build(sources, store=store)
    words = train_tokenizer((one.text for one in documents(corpus.train[:1], store)), vocabulary)
    shape = Shape(layers=2, width=width, heads=max(1, width // 32), feed_forward=2 * width, vocabulary=vocabulary, context=length)
    seed = save_seed(new_model(shape, 0), words, store, name="tiny", separator=0, corpus=corpus.digest)
    train, holdout = (pack(shards, words, 0, store) for shards in (corpus.train, corpus.holdout))
    return Place(store, seed, train, holdout, corpus.digest)


def make_star(place: Place, recipe: Recipe, steps: int, form: str = "int8", parts: int = 64, **outer: Any) -> Star:
    """A plan: `recipe` has the steps of one machine over all versions, `steps` those of one version."""
    return Star(
        name="bench", seed=place.seed.digest, corpus=place.corpus, recipe=recipe, steps=steps, parts=parts, form=form,  # type: ignore[arg-type]
        outer=OUTER.model_copy(update=outer),
    )  # fmt: skip


class Ran(NamedTuple):
    """What a run came to."""

    loss: float  # nats a token on held-out rows
    fates: list[list[Any]]
    sent: int  # bytes of deltas


def run_star(
    place: Place, folder: Path, star: Star, machines: int, start: str | None = None, *, gates: bool = True,
    hostile: Mapping[int, Change] = {}, each: Each = lambda number, weights, sent, received: None,
) -> Ran:  # fmt: skip
    """Train by a star. `start`: blob of the weights, where not the seed's. `hostile`: what a machine sends instead of its delta. `each` is
    told of every version."""
    store, weights = place.store, start or place.seed.files["model.safetensors"]
    names = [f"ed25519:{n:064x}" for n in range(machines)]
    mine = {key: open_local(load_model(place.seed, store, device="cpu"), place.train, star, folder / key[-4:]) for key in names}
    judged = load_model(place.seed, store, device="cpu")
    version = Version(star=star.digest, number=0, weights=weights, how="start")
    state = State(head=version.digest, workers={key: Worker(name=key[-4:]) for key in names})
    base, sent, received, told, memory = Base(version, store.get(weights)), 0, 0, list[list[Any]](), dict[int, dict[str, Any]]()
    earlier: deque[list[Any]] = deque(maxlen=MEMORY)
    for number in range(round.last_version(star)):
        files: dict[str, Path] = {}
        for n, key in enumerate(names):
            state, held = round.grant(state, star, TERMS, key, 0.0)
            assert isinstance(held, round.Grant)
            path = run_phase(mine[key], Slice(held.id, held.base, held.part, held.first), base.weights)
            if n in hostile:
                known = memory.setdefault(n, {})
                known |= {"base": base, "others": dict(files), "shapes": shapes_of(base.weights), "form": star.form, "number": number}
                path = send_instead(hostile[n], path, known)
            files[held.id], size, blob = path, path.stat().st_size, store.put(path)
            state = round.keep_part(round.begin_upload(state, key, held.id, size, size), key, held.id, 0, size, blob)
            state, sent = round.propose(state, star, key, held.id, held.base, blob), sent + size
        state = round.close(state, star, TERMS, 0.0)
        judge = LossJudge(judged, place.train, place.holdout, star, number, b"secret" * 4, base.weights) if gates else None
        out = folder / f"version-{number}"
        out.mkdir()
        made: Settled = settle(star, base, state, files, judge, out, [one for some in earlier for one in some])
        earlier.append([made.sketches[fate.proposal] for fate in made.fates if fate.fate == "applied"])
        version = Version(
            star=star.digest, number=number + 1, parent=version.digest, how=made.how, fates=tuple(made.fates),
            **blobs_of(version, made.written, made.keeps_velocity),
        )  # fmt: skip
        state = round.decide(state, version, made.norm, made.guilty)
        for fate in made.fates:
            settle_phase(mine[fate.worker], fate.proposal, fate)
        if made.written:
            base = Base(version, *(file.path for file in made.written[:3]))
            received += made.written.step.path.stat().st_size
        told.append([(fate.worker[-4:], fate.code) for fate in made.fates])
        each(number + 1, base.weights, sent // machines, received)
    return Ran(held_out(place, judged, base.weights, star.recipe.length), told, sent)


def send_instead(change: Change, path: Path, known: dict[str, Any]) -> Path:
    """What a hostile machine sends: its delta, changed."""
    honest = open_delta(path, known["shapes"], known["form"])
    changed = change({name: honest.values(name) for name in known["shapes"]}, known)
    made = path.with_name(f"hostile-{path.name}")
    write_any(made, changed, known["shapes"], known["form"])
    return made


def warm_start(place: Place, folder: Path, steps: int, batch: int, length: int, rng_seed: int) -> str:
    """Train in one process before anything is spread, the same for every bench whose curves are compared; the blob of the weights."""
    recipe = Recipe(steps=steps, batch=batch, length=length, learning_rate=WARM, rng_seed=1000 + rng_seed, schedule="constant")
    return run_alone(place, folder, recipe, steps)


def run_alone(
    place: Place, folder: Path, recipe: Recipe, steps: int, start: str | None = None, each: Callable[[int, Path], None] = lambda *_: None
) -> str:
    """Train in one process, in phases of `steps` steps that go on where the last one ended; the blob of the weights. `each` is told of
    every phase."""
    local = open_local(load_model(place.seed, place.store, device="cpu"), place.train, make_star(place, recipe, steps, parts=1), folder)
    blob = start or place.seed.files["model.safetensors"]
    for number in range(recipe.steps // steps):
        run_phase(local, Slice(f"{number:08d}", number, 0, number * steps), place.store.get(blob))
        for file in folder.glob("*-*.safetensors"):  # nobody applies a delta here
            file.unlink()
        tensors = {name: weight.detach().float().numpy() for name, weight in local.weights.items()}
        blob = place.store.put(safetensors.numpy.save(tensors, {"format": "pt"}))
        each(number + 1, place.store.get(blob))
    return blob


def write_any(path: Path, delta: dict[str, np.ndarray], shapes: Any, form: str) -> None:
    """As a hostile machine writes it: NaN goes into the scales."""
    broken = any(not np.isfinite(value).all() for value in delta.values())
    write_delta(path, {name: np.nan_to_num(value) for name, value in delta.items()}, shapes, form)
    if broken:
        raw = bytearray(path.read_bytes())
        raw[-4:] = np.float32(math.nan).tobytes()
        path.write_bytes(bytes(raw))


def held_out(place: Place, model: Any, weights: Path, length: int, rows: int = 200) -> float:
    """The loss of held-out rows that are the same for every run."""
    star = make_star(place, Recipe(steps=1, batch=20, length=length), 1)
    judge = LossJudge(model, place.train, place.holdout, star, 0, b"other", weights)
    judge.secret = draw(place.holdout, star.recipe, rows, np.random.default_rng(7))
    return float(judge.losses(weights).mean())
