"""Worlds to attack: a seed, domains with held-out text, honest experts, and the hub's judge.

`made_up` has a seed of its own and made-up text, and costs little; `sample` is the packaged seed and the bundled text, as in the demo.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from benches.hub.forgeries import Tensors
from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.engine import Progress
from elmwood.evaluate import holdout
from elmwood.evaluate.holdout import Holdout, HoldoutSpec, open_holdout
from elmwood.evaluate.sequential.error_budget import budget_share, slices_key
from elmwood.hub import messages
from elmwood.hub.client.gate import CONFIG, WEIGHTS, Refused, adapter_config, check_adapter, expected_tensors
from elmwood.hub.client.judge import Case, Judged, judge
from elmwood.hub.demo.stage import Setting, draft_community, prepare
from elmwood.hub.messages import Gate
from elmwood.records import Ensemble, Expert, Forest, Partition, Recipe, Seed, Shard
from elmwood.store import Store
from elmwood.study.quality import contest, scoring
from elmwood.study.seeds import llama
from elmwood.train.tasks import train, train_seed

DOMAINS = 4
SETTINGS: dict[str, Any] = {"router": "centroid", "top_k": 2, "temperature": 0.1, "seed_distance": 0.8}
# of each domain: a sentence, and the letters of its made-up words
TOPICS = (
    ("the {0} sailed over the sea with captain {1}", "abcdef"), ("def {0}(path): return open({1}).read()", "ghijkl"),
    ("le {0} mange une pomme verte, {1} aussi", "mnopqr"), ("proof of {0}: let {1} be prime and odd", "stuvwx"),
)  # fmt: skip
DOCUMENTS, SENTENCES = 70, 12


def made_up(topic: int, documents: int, rng: np.random.Generator) -> list[str]:
    """Texts of a topic."""
    sentence, letters = TOPICS[topic]

    def word() -> str:
        return "".join(rng.choice(list(letters), 4))

    return [". ".join(sentence.format(word(), word()) for _ in range(SENTENCES)) for _ in range(documents)]


class Ground(NamedTuple):
    """What a world is made of."""

    about: str  # a sentence
    seed: Seed
    partition: Partition
    recipe: Recipe  # of a lease
    gate: Gate  # else the thresholds that a hub has by default; fixed before any run of this bench


def made_up_ground(store: Store, progress: Progress) -> Ground:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        texts = [text for topic in range(DOMAINS) for text in made_up(topic, DOCUMENTS, rng)]
        for n, text in enumerate(texts):
            (Path(folder) / f"{n}.txt").write_text(text, encoding="utf-8")
        corpus = build([folder], store, holdout=0.5, progress=progress)
    recipe = Recipe(steps=120, batch=8, length=48, learning_rate=5e-3)
    seed = train_seed(corpus, llama(2, 32, 400, 64), recipe, store, name="world", progress=progress)
    partition = divide(corpus, store, domains=DOMAINS, progress=progress)
    about = "A Llama of 2 layers and width 32 trained on made-up text of 4 domains, adapters of rank 4 in 30 steps"
    lease = Recipe(method="lora", steps=30, batch=4, length=48, learning_rate=1e-2, rank=4)
    return Ground(about, seed, partition, lease, Gate(length=48))


def sample_ground(store: Store, progress: Progress) -> Ground:
    """Seed, domains and recipe of `elmwood hub demo`."""
    setting = Setting(domains=DOMAINS)
    seed, partition = prepare(setting, store, progress)
    recipe = draft_community(seed, partition, setting, store).tiers["cpu"].recipe
    about = (
        f"The demo's seed of {seed.parameters:,} parameters and bundled text in 4 domains, adapters of rank {recipe.rank} in "
        f"{recipe.steps} steps"
    )
    return Ground(about, seed, partition, recipe, Gate())


GROUNDS: dict[str, Callable[[Store, Progress], Ground]] = {"made-up": made_up_ground, "sample": sample_ground}


@cache
def _holdout(spec: HoldoutSpec, root: Path) -> Holdout:
    return open_holdout(spec, Store(root))


_near: dict[tuple[object, ...], Any] = {}


def _distances(held: Holdout, division: Partition, store: Store, *given: Any, signal: str = "dense", **named: Any) -> Any:
    key = held.name, len(held.windows.rows_WL), int(held.windows.document_W.sum()), division.digest, signal
    if key not in _near:
        _near[key] = holdout.distances(held, division, store, *given, signal=signal, **named)
    return _near[key]


def share_work(ground: str) -> None:
    """In this process, what is the same for each submission is computed once, where a verifier computes it anew."""
    scoring.open_holdout = lambda spec, store, *_: _holdout(spec, store.root)
    contest.distances = _distances
    if ground == "made-up":
        holdout.BLOCK = 128  # of 2,048: the text is small, and as many blocks of it cost less


class World:
    """A store with a seed, a partition and its experts. Whatever was made before is found again."""

    def __init__(self, store: Store, progress: Progress, ground: str = "made-up"):
        self.store, self.progress, self.number, self.accepted, self.leases = store, progress, 0, 0, 0
        self.about, self.seed, self.partition, self.recipe, self.gate = GROUNDS[ground](store, progress)
        self.expected = expected_tensors(self.seed, self.recipe, store)
        self.config = store.put(adapter_config(self.recipe, self.seed, self.expected))

    def honest(self, domain: int, rng_seed: int, data: Iterable[Shard] | None = None, **changed: Any) -> Expert:
        """What a volunteer trains, as the hub records it."""
        recipe = self.recipe.model_copy(update={"rng_seed": rng_seed, **changed})
        shards = self.partition.domains[domain].train if data is None else tuple(data)
        made = train(self.seed, shards, recipe, self.store, partition=self.partition.digest, domain=domain, progress=self.progress)
        return self.keep(domain, made.files[WEIGHTS])

    def keep(self, domain: int, weights: str | Tensors) -> Expert:
        """The hub's record of an uploaded file or of these tensors."""
        blob = weights if isinstance(weights, str) else self.store.put(safetensors.numpy.save(weights, {"format": "pt"}))
        shards = tuple(shard.blob for shard in self.partition.domains[domain].train)
        self.leases += 1  # as each lease has an rng_seed of its own
        expert = Expert(
            seed=self.seed.digest, partition=self.partition.digest, domain=domain, data=shards,
            recipe=self.recipe.model_copy(update={"rng_seed": self.leases}),
            files={CONFIG: self.config, WEIGHTS: blob},
        )  # fmt: skip
        self.store.add(expert)
        return expert

    def tensors(self, expert: Expert) -> Tensors:
        return safetensors.numpy.load_file(self.store.get(expert.files[WEIGHTS]))

    def ensemble(self, experts: Iterable[Expert], **fields: Any) -> Ensemble:
        forest = Forest(seed=self.seed.digest, partition=self.partition.digest, experts=tuple(one.digest for one in experts))
        self.store.add(forest)
        made = Ensemble(forest=forest.digest, **SETTINGS | fields)
        self.store.add(made)
        return made

    def text(self, documents: Iterable[str]) -> tuple[Shard, ...]:
        """Shards of some documents."""
        with tempfile.TemporaryDirectory() as folder:
            for n, text in enumerate(documents):
                (Path(folder) / f"{n}.txt").write_text(text, encoding="utf-8")
            corpus = build([folder], self.store, holdout=0.1)
        return (*corpus.train, *corpus.holdout)

    def submit(self, expert: Expert, others: Iterable[Expert]) -> tuple[str | None, Judged | None]:
        """Through the gate, and before the judge if it passes; the code of what refused it, and what was found. As on a hub, a submission
        whose weights pass takes the next entry of the error budget."""
        try:
            check_adapter(self.store.get(expert.files[WEIGHTS]), self.expected)
        except Refused as error:
            return error.code, None
        base = self.ensemble([*others] or [expert])
        case = Case(store=self.store.root, expert=expert.digest, base=base.digest, gate=self.gate)
        found = judge(case)
        if found.code is not None:
            return found.code, found
        level = self.gate.budget * budget_share(self.number + 1) * (1 + self.accepted)
        key = hashlib.sha256(f"{self.number} {expert.digest}".encode()).hexdigest()
        trial = messages.Trial(number=self.number, level=level, key=key, slices_key=slices_key(b"attacks").hex(), earlier=0)
        found = judge(case.model_copy(update={"trial": trial}))
        self.number, self.accepted = self.number + 1, self.accepted + found.verdict.accepted
        return found.code, found
