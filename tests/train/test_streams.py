"""Corpora as a stream: shard by shard, mixed in their shares, and the same from any step on."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from tiny_models import tiny_tokenizer

from elmwood.corpus import build as building
from elmwood.corpus.tokens import pack
from elmwood.errors import BadCorpus
from elmwood.records import Corpus, Recipe
from elmwood.store import Store
from elmwood.train.data import batches
from elmwood.train.seeds.stream import Source, Stream

RECIPE = Recipe(steps=30, batch=4, length=16, rng_seed=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store with a corpus of several shards in small letters, one of one shard in capitals, and a tokenizer."""
    folder = tmp_path_factory.mktemp("streams")
    store, made = Store(folder / "store"), {}
    for name, size, letters in (("many", 1500, "abcdefgh"), ("one", 64_000_000, "ABCDEFGH")):
        rng = np.random.default_rng(len(made))
        texts = ["".join(rng.choice([*letters], rng.integers(20, 200))) for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "SHARD", size)
            made[name] = building.build([str(folder / f"{name}.jsonl")], store)
    assert (len(made["many"].train) > 3, len(made["one"].train)) == (True, 1)
    return store, made["many"], made["one"]


def stream(world, *sources: Source, recipe: Recipe = RECIPE) -> Stream:
    return Stream(sources, tiny_tokenizer(), 0, recipe, world[0])


def taken(text: Stream, start: int, count: int) -> list[list]:
    return [[part.tolist() for part in batch] for batch in islice(text(start), count)]


def test_one_shard_gives_the_batches_it_always_gave(world):
    store, _, one = world
    plain = batches(pack(one.train, tiny_tokenizer(), 0, store), RECIPE, 5)
    assert taken(stream(world, Source(one)), 5, 40) == [[part.tolist() for part in batch] for batch in islice(plain, 40)]


@pytest.mark.parametrize("mixed", [False, True])
def test_from_any_step_on_the_batches_are_the_same(world, mixed):
    _, many, one = world
    sources = [Source(many, 0.7), Source(one, 0.3)] if mixed else [Source(many)]
    whole = taken(stream(world, *sources), 0, 90)  # several epochs
    for start in (1, 17, 60):
        assert taken(stream(world, *sources), start, 30) == whole[start : start + 30]


def test_an_epoch_reads_every_shard_once_and_opens_one_at_a_time(world):
    _, many, _ = world
    text = stream(world, Source(many))
    rows = sum(text._count(0, shard) for shard in many.train)
    seen = Counter(tuple(row) for batch in islice(text(0), rows // 4) for row in batch.tokens_BL.tolist())
    assert max(seen.values()) == 1
    assert len(text.open) == 1
    per_step = RECIPE.batch * RECIPE.length
    (read,) = text.reads()
    assert read.exact
    assert read.epochs == pytest.approx(RECIPE.steps * per_step / sum(text.counts.values()))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_any_stretch_has_the_shares_of_all(world, share):
    _, many, one = world
    text = stream(world, Source(many, 1 - share), Source(one, share))
    owner_N = text._owner_N(0, 20_000)
    for first, last in ((0, 500), (777, 1777), (0, 20_000)):
        assert abs(owner_N[first:last].sum() - share * (last - first)) < 5
    assert text._before(1234).tolist() == np.bincount(owner_N[:1234], minlength=2).tolist()
    capitals = [number for token, number in tiny_tokenizer().get_vocab().items() if token in [*"ABCDEFGH"]]
    rows = np.concatenate([batch.tokens_BL for batch in islice(text(0), 100)])
    assert abs(np.isin(rows, capitals).any(1).mean() - share) < 0.02


def test_a_corpus_without_text_is_refused(world):
    _, many, _ = world
    empty = Corpus(train=(), holdout=many.holdout, documents=0, bytes=0, holdout_share=0.1)
    with pytest.raises(BadCorpus, match="no tokens to train on"):
        next(stream(world, Source(empty))(0))
