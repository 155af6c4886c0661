"""A star small enough for a test: a seed of 30,000 parameters, 300 documents, and machines with stores of their own."""

import json
import threading
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
from tiny_models import tiny_seed

from elmwood.hub import signing
from elmwood.hub.star.app import create_app
from elmwood.hub.star.home import Home
from elmwood.hub.star.worker import opened, take_part
from elmwood.outer.round import Terms
from elmwood.outer.step import OUTER
from elmwood.records import Corpus, Recipe, Star
from elmwood.store import Store
from elmwood.study.text import build
from tests.hub.served import serve_app

WORDS = ("the cat sat on the mat and sailed over the sea", "with a captain and his naive crew")
STEPS, VERSIONS = 3, 3


class Machine(NamedTuple):
    store: Store
    key: object

    @property
    def name(self):
        return f"ed25519:{signing.public(self.key)}"


class World(NamedTuple):
    store: Store
    star: Star
    machines: list[Machine]

    def home(self, judge_of=lambda base: None, terms=None, **options):
        terms = terms or Terms(least=2, grace_s=30, beat_s=0.5, progress_s=100)
        workers = {one.name: f"m{n}" for n, one in enumerate(self.machines)}
        return Home(self.star, self.store, terms, workers, judge_of, **options)


def text(folder):
    rng = np.random.default_rng(0)
    path = folder / "text.jsonl"
    rows = [{"text": " ".join(rng.choice(" ".join(WORDS).split(), 30)) + f" {n}"} for n in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def new_world(folder, machines=2, versions=VERSIONS, **fields):
    store = Store(folder / "coordinator")
    seed = tiny_seed(store)
    corpus: Corpus = build([text(folder)], store=store, holdout=0.2)
    recipe = Recipe(steps=STEPS * versions, batch=4, length=32, learning_rate=3e-3)
    plan = {"parts": 8, "form": "int8", "outer": OUTER} | fields
    star = Star(name="tiny", seed=seed.digest, corpus=corpus.digest, recipe=recipe, steps=STEPS, **plan)
    keys = [signing.new_key() for _ in range(machines)]
    return World(store, star, [Machine(Store(folder / f"m{n}"), key) for n, key in enumerate(keys)])


@contextmanager
def serving(home):
    """A star that answers and decides, at an address."""
    home.start()
    try:
        with serve_app(create_app(home)) as url:
            yield url
    finally:
        home.close()


def all_take_part(url, machines, **options):
    """Each machine in a thread, to the end; what each has done. Models are opened one after another: transformers opens one at a time."""
    ended, failed = {}, []
    with ExitStack() as stack:
        ready = [stack.enter_context(opened(url, one.store, one.key)) for one in machines]

        def run(n):
            try:
                ended[n] = take_part(ready[n], **options)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(len(ready))]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    if failed:
        raise failed[0]
    return [ended[n] for n in range(len(machines))]
