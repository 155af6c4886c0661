"""What studies of seeds and rounds share: one run from scratch that leaves seeds on its way, experts that branch from any of them, and
the columns of all on held-out text.

N scored tokens, K experts, D documents
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benches.common import Lines, parser, words
from elmwood.corpus.build import build
from elmwood.errors import BadInput
from elmwood.evaluate.comparison import Compared, Control, Side, compare
from elmwood.evaluate.holdout import Holdout, HoldoutSpec
from elmwood.evaluate.losses import bits_per_byte, row
from elmwood.records import Corpus, Expert, Partition, Row, Seed
from elmwood.store import Store
from elmwood.study.merging import merge
from elmwood.study.quality.evaluation import measure_distances
from elmwood.study.quality.scoring import Columns, Floats, ensure
from elmwood.study.seeds import train_seed
from elmwood.study.training import train
from elmwood.units import parse_count

PARTS = 100  # seeds that a run leaves on its way
Cells = dict[str, tuple[float, float, float, float]]  # row -> nats per token, bits per byte, gain, its standard error
READ = 256  # tokens of a document that choose its expert, in SmallTalk (arXiv:2410.03529)


class World(NamedTuple):
    """A corpus, the shape of all models, and how they are trained."""

    store: Store
    corpus: Corpus
    total: int  # tokens of one side: of a seed and the experts that branch from it, or of a dense model
    domains: int
    batch: int
    shape: dict[str, Any]  # layers and width, or a config; vocabulary, length
    documents: int | None  # held-out documents that are scored
    workers: int
    progress: Lines

    @property
    def step(self) -> int:
        """Tokens of one step."""
        return self.batch * self.shape["length"]

    @property
    def keep_every(self) -> int:
        return max(1, self.total // self.step // PARTS)

    def steps(self, share: float) -> int:
        """Of the run from scratch, after which it has had this share of the tokens: a step that it keeps."""
        return round(share * self.total / self.step / self.keep_every) * self.keep_every

    def dense(self, rng_seed: int, rate: float, batch: int | None = None) -> Seed:
        """One model from scratch on all tokens. With the experts' batch it leaves seeds on its way."""
        name = f"dense-{rng_seed}-{rate:g}-{batch or self.batch}"
        return train_seed(
            self.corpus, self.store, tokens=self.total, batch=batch or self.batch, learning_rate=rate, schedule="wsd", **self.shape,
            keep_every=None if batch else self.keep_every, rng_seed=rng_seed, name=name, progress=self.progress,
        )  # fmt: skip

    def seed(self, share: float, rng_seed: int, rate: float) -> Seed:
        """That run after a share of the tokens; at no share its first weights. Raises BadInput where the folder has another run's."""
        if steps := self.steps(share):
            found, run = self.store.load(f"dense-{rng_seed}-{rate:g}-{self.batch}-step-{steps}", Seed), self.dense(rng_seed, rate).run
            if found.run != run:
                raise BadInput(f"{self.store.root} holds seeds of run {found.run}, and these options make {run}: name a new folder")
            return found
        return train_seed(self.corpus, self.store, tokens=0, **self.shape, rng_seed=rng_seed, progress=self.progress)

    def experts(
        self, partition: Partition, seed: Seed, tokens: int, rate: float, rng_seed: int, schedule: str = "wsd", domains: str = "all"
    ) -> list[Expert]:
        """Experts that have so many tokens together, or one on all domains (`pooled`), with a schedule of their own."""
        models = 1 if domains == "pooled" else len(partition.domains)
        return train(
            partition, seed, self.store, method="full", domains=domains, tokens=max(self.step, tokens // models), batch=self.batch,
            length=self.shape["length"], learning_rate=rate, schedule=schedule, rng_seed=rng_seed, workers=self.workers,
            progress=self.progress,
        )  # fmt: skip

    def columns(self, partition: Partition, seed: Seed, models: Mapping[str, Seed | Expert | str]) -> tuple[Holdout, dict[str, Floats]]:
        """Log-likelihoods of models by name on the held-out documents; models of one tokenizer, whatever their seeds are."""
        spec = HoldoutSpec(partition=partition.digest, seed=seed.digest, length=self.shape["length"], documents=self.documents)
        digests = {name: self.store.resolve(model) for name, model in models.items()}
        found = ensure(list(digests.items()), Columns(spec, self.store), workers=self.workers, progress=self.progress)
        return found.holdout, {name: found.columns[digest] for name, digest in digests.items()}


class Branched(NamedTuple):
    """Experts and everything to be held against them, in columns."""

    held: Holdout
    side: Side
    seed_N: Floats
    merged_N: Floats  # of the mean of the experts

    def compare(self, dense: Sequence[Control], random: Side | None = None) -> Compared:
        return compare(self.held, self.seed_N, self.side, dense, random)

    def rows(self, dense: Sequence[Control], random: Side | None = None) -> Cells:
        """Every row of the comparison, and of those that are no part of it: the chosen one as `forest`, one expert for a whole document by
        its beginning, and the mean of the experts."""
        compared, test_D = self.compare(dense, random), ~self.held.tune_D
        best = min(dense, key=lambda one: bits_per_byte(one.loglik_N, self.held, test_D).value)
        more = {"sequence": self.by_sequence(), "merged": self.merged_N}
        found = {one.name: cell(one) for one in compared.rows}
        found |= {name: cell(row(name, column_N, self.held, domains=len(self.side.owner_K), against_N=best.loglik_N))
                  for name, column_N in more.items()}  # fmt: skip
        if random:
            found["random clusters"] = min((row for name, row in found.items() if name.startswith("random")), key=lambda row: row[1])
        return found | {"forest": found[compared.chosen]}

    def by_sequence(self) -> Floats:
        """Each document has one expert, the nearest by its first READ tokens, of which those are a part that it predicts."""
        begins_N = np.diff(self.held.document_N, prepend=-1) != 0
        first_D = np.flatnonzero(begins_N)
        last_D = np.append(first_D[1:], len(begins_N))
        chosen_D = self.side.dist2_NK[np.minimum(first_D + READ, last_D - 1)].argmin(1)
        return self.side.loglik_NK[np.arange(len(begins_N)), np.repeat(chosen_D, last_D - first_D)]


def branched(world: World, partition: Partition, seed: Seed, experts: Sequence[Expert]) -> Branched:
    """Experts of a seed scored, alone and averaged."""
    merged = merge(experts, world.store, progress=world.progress).record
    models = {str(place): expert for place, expert in enumerate(experts)}
    held, columns = world.columns(partition, seed, {**models, "seed": seed, "merged": merged.digest})
    dist2_NK, sparse2_NK = measure_distances(held, partition, world.store, world.progress)
    side = Side(np.column_stack([columns[name] for name in models]), dist2_NK, sparse2_NK=sparse2_NK)
    return Branched(held, side, columns["seed"], columns["merged"])


def cell(one: Row) -> tuple[float, float, float, float]:
    """Nats per token, bits per byte, gain over the strongest dense model (0 of itself), its standard error over documents."""
    return log(one.perplexity), one.bits_per_byte, one.gain or 0.0, one.gain_error or 0.0


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error over rng seeds; no error of one."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


# ---- arguments


def world_parser(doc: str | None) -> ArgumentParser:
    """Options that make a world."""
    options = parser(doc)
    options.add_argument("folder", type=Path)
    options.add_argument("--corpus", default="sample")
    options.add_argument("--total", default="1024k")
    options.add_argument("--domains", type=int, default=4)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--feed-forward", type=int, help="of a layer; by default 8/3 of the width in steps of 32; 128 as in benches.star")
    options.add_argument("--vocabulary", type=int, default=1024)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--documents", type=int, default=None)
    options.add_argument("--rng-seeds", default="0,1,2")
    options.add_argument("--workers", type=int, default=1)
    return options


def open_world(asked: Namespace) -> World:
    """The world that was asked for; the corpus is read once."""
    store, progress = Store(asked.folder), Lines()
    shape = {name: getattr(asked, name) for name in ("vocabulary", "length")}
    shape |= {"config": write_config(asked)} if asked.feed_forward else {"layers": asked.layers, "width": asked.width}
    corpus = build(words(asked.corpus), store, progress=progress)
    return World(store, corpus, parse_count(asked.total), asked.domains, asked.batch, shape, asked.documents, asked.workers, progress)


def write_config(asked: Namespace) -> Path:
    """A config of transformers for a small Llama, as seeds of a width and layers are, with a feed-forward width of its own."""
    heads = max(1, asked.width // 32)
    config = {
        "model_type": "llama", "num_hidden_layers": asked.layers, "hidden_size": asked.width, "intermediate_size": asked.feed_forward,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": asked.length, "tie_word_embeddings": True,
    }  # fmt: skip
    asked.folder.mkdir(parents=True, exist_ok=True)
    path: Path = asked.folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path
