"""Tokens scored per CPU second on one core, and how far that is from the products of matrices alone.

    python -m benches.speed.scoring [--shape demo] [--documents 40] [--rounds 7] [--experts 3]

Held-out windows as the demo has them (256 tokens, a quarter of them context that is read again) of documents of random tokens, under the
seed and under LoRA experts of rank 16: as they are scored, with their products apart instead of added to the weights, and all
in one pass over the seed. "read" counts every token that a model reads, "scored" those that get a log-likelihood. "limit" is
what the products alone would take: the floating-point operations of a token, at the rate that the largest product of the model's own
layers reaches here. All of a round is measured in turn, and medians are over the rounds, for other processes slow every part.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benches.common import parser, say
from benches.models import SHAPES, adapter_folders, rounds, spent
from benches.models import model as make_model
from elmwood.corpus.tokens import Packed, Windows, train_tokenizer, windows
from elmwood.ensemble.mixture import open_model
from elmwood.evaluate.columns import run
from elmwood.lm.adapters.lora import Adapted
from elmwood.lm.experts import BASE, TOKENS, Experts, _loglik
from elmwood.lm.load import save_seed
from elmwood.lm.products import linear
from elmwood.records import Expert, Recipe
from elmwood.store import Store

SHAPES["demo"] = (128, 352, 3, 4, 4, 2048)
LENGTH, CARRY, RANK = 256, 64, 16
ROWS = 1024  # of a product


def apart(work: Callable[[], object]) -> None:
    """With the products of adapters apart."""
    folds, Adapted.folds = Adapted.folds, lambda *_: False
    try:
        work()
    finally:
        Adapted.folds = folds


def in_one_pass(experts: Experts, cut: Windows) -> None:
    """Every adapter on each window, as rows of one batch."""
    body, count = experts.body(BASE), len(experts) - 1
    assert body.bank
    body.bank.select(range(count))
    for batch in cut.batches(np.arange(len(cut.length_W)), max(LENGTH, TOKENS["cpu"] // count)):
        longest, since = int(cut.length_W[batch].max()), int(cut.score_from_W[batch[0]])
        tokens_BT = torch.as_tensor(cut.rows_WL[batch, :longest], dtype=torch.long)
        _loglik(body, tokens_BT.repeat(count, 1), longest - max(1, since))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", default="demo", choices=SHAPES)
    for name, value in (("documents", 40), ("rounds", 7), ("experts", 3)):
        options.add_argument(f"--{name}", type=int, default=value)
    asked = options.parse_args()
    torch.set_num_threads(1)
    width, feed_forward, layers, heads, groups, vocabulary = SHAPES[asked.shape]
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *rng.integers(200, 2600, asked.documents - 1)])
    cut = windows(Packed(rng.integers(1, vocabulary, starts[-1] + 1400), starts, 0), LENGTH, CARRY)
    read, scored = int(cut.length_W.sum()), int(cut.count_W.sum())
    weights = 2 * layers * (width * width * (1 + groups / heads) + 1.5 * width * feed_forward)  # attention, feed-forward
    each = 2 * weights + layers * 4 * width * LENGTH / 2  # floating-point operations of a token, and of attention to half a window
    flops = read * each + scored * 2 * width * vocabulary
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        store, base = Store(Path(folder) / "store"), make_model(asked.shape)
        seed = save_seed(base, train_tokenizer(["the cat sat on the mat"], 300), store, name=asked.shape, separator=0)
        records: list[Any] = [seed]
        for path in adapter_folders(base, asked.experts, RANK, Path(folder) / "adapters"):
            recipe = Recipe(method="lora", steps=1, rank=RANK)
            records.append(Expert(seed=seed.digest, data=(), recipe=recipe, files=store.put_folder(path)))
            store.add(records[-1])
        lms, bank = [open_model(one, store, "cpu") for one in records], Experts(seed, records[1:], store, "cpu")
        x_ND, weight_FD = torch.randn(ROWS, width), torch.randn(feed_forward, width)
        held: Any = SimpleNamespace(windows=cut)
        found = rounds({
            "product": lambda: spent(lambda: [linear(x_ND, weight_FD) for _ in range(50)], 50),
            "seed": lambda: spent(lambda: run(lms[0], held)),
            "adapters": lambda: spent(lambda: [run(one, held) for one in lms[1:]], asked.experts),
            "adapters, products apart": lambda: spent(lambda: apart(lambda: [run(one, held) for one in lms[1:]]), asked.experts),
            "adapters, one pass": lambda: spent(lambda: in_one_pass(bank, cut), asked.experts),
        }, asked.rounds)  # fmt: skip
    rate = 2 * ROWS * width * feed_forward / median(one.cpu for one in found.pop("product"))
    for name, values in found.items():
        cpu, least = median(one.cpu for one in values), flops / rate
        say("scoring", shape=asked.shape, way=name, read=read, scored=scored, rounds=len(values), read_per_cpu_second=read / cpu,
            scored_per_cpu_second=scored / cpu, gflops_of_a_product=rate / 1e9, limit=read / least, of_limit=least / cpu)  # fmt: skip


if __name__ == "__main__":
    main()
