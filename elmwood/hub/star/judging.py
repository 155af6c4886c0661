"""Who judges the proposals of a star: losses on text, computed in this process where there is torch."""

from elmwood.hub.star.home import JudgeOf
from elmwood.outer.settle import Base, Judge
from elmwood.records import Corpus, Seed, Star
from elmwood.store import Store


def judge_with_losses(star: Star, store: Store) -> JudgeOf:
    """A judge for each version, on held-out rows that follow from the store's secret. Model and text are opened once, at the first."""
    opened: list = []

    def judge(base: Base) -> Judge:
        from elmwood.train.inner.judge import LossJudge

        if not opened:
            opened.extend(_open(star, store))
        model, train, holdout = opened
        return LossJudge(model, train, holdout, star, base.version.number, store.secret(), base.weights)

    return judge


def _open(star: Star, store: Store) -> tuple:
    import torch

    from elmwood.corpus.tokens import pack
    from elmwood.lm.files import tokenizer
    from elmwood.lm.load import load_model

    seed, corpus = store.load(star.seed, Seed), store.load(star.corpus, Corpus)
    words = tokenizer(seed, store)
    train, holdout = (pack(shards, words, seed.separator, store) for shards in (corpus.train, corpus.holdout))
    return load_model(seed, store, dtype=torch.float32), train, holdout
