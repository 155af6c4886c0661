"""Decoding and scoring on one device: the parts of `python -m benches.gpu` that measure them, and a command of their own.

    python -m benches.gpu_decode [--device cuda] [--small] [--limit 120] [--only decode,scoring]

Models of known shapes with random weights, and LoRA experts of rank 16 over them. "decode": milliseconds per token of text after a prompt
of 64 tokens, at batch 1, without the prompt and without what is prepared once; `of_one` is the ratio to one expert, in the same run.
Everything a user waits for is included: routing, mixing, sampling, the text of each token. "agreement": the largest difference in nats
between log-probabilities of generated tokens there and those of the same tokens scored on the CPU. "scoring": tokens per second, and the
share that their floating-point operations have of what one large product of matrices reaches in the same run.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from benches.common import parser, say, words
from benches.models import SHAPES, experts, model
from elmwood.corpus.build import build
from elmwood.domains.partition import partition
from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model
from elmwood.lm.load import save_seed
from elmwood.records import Ensemble, Expert, Forest, Partition, Record, Seed
from elmwood.store import Store
from elmwood.study.demo_seed import PACKAGED

K, RANK, PROMPT, ROUNDS = 4, 16, 64, 5
TOPICS = ("sea ship sail harbour", "def return import class", "jardin pomme maison", "proof lemma theorem")


class World(NamedTuple):
    """A seed, K experts of it and their domains."""

    store: Store
    seed: Seed
    experts: list[Expert]
    parted: Partition
    tokenizer: Tokenizer

    def models(self) -> dict[str, Record]:
        """What is measured: the name of each row, and its record."""
        made = Forest(seed=self.seed.digest, partition=self.parted.digest, experts=tuple(one.digest for one in self.experts))
        self.store.add(made)
        return {
            "seed": self.seed,
            "one expert": self.experts[0],
            f"top-{K}, uniform": Ensemble(forest=made.digest, router="uniform", top_k=K),
            f"{K - 1} nearest and the seed, live": Ensemble(forest=made.digest, router="live", top_k=K - 1, seed_distance=0.6),
        }


@contextmanager
def worlds(shapes: list[str]) -> Iterator[Iterator[tuple[str, World]]]:
    """A world for each shape, in a temporary store."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        (text := Path(folder) / "text").mkdir()
        for number in range(40 * K):
            topic = TOPICS[number % K].split()
            (text / f"{number}.txt").write_text(" ".join(f"{topic[(number // 7 + n) % len(topic)]} {'abcdefghij'[n % 10] * 3}{n}"
                                                          for n in range(number + 20)))  # fmt: skip
        parted = partition(build([str(text)], store), store, domains=K)
        tokenizer = Tokenizer.from_str(PACKAGED.joinpath("tokenizer.json").read_text())
        yield ((shape, _world(shape, parted, tokenizer, store)) for shape in shapes)


def _world(shape: str, parted: Partition, tokenizer: Tokenizer, store: Store) -> World:
    base = model(shape)
    seed = save_seed(base, tokenizer, store, name=shape, separator=0)
    return World(store, seed, experts(seed, base, K, RANK, store, partition=parted.digest), parted, tokenizer)


# ---- decoding --------------------------------------------------------------------------------------------------------


def measure_decode(device: str, small: bool = False, limit: float = 120.0) -> None:
    """Print the lines of decoding; after `limit` seconds no more rounds begin."""
    until, count = time.monotonic() + limit, 8 if small else 96
    with worlds(["17M"] if small else ["17M", "135M"]) as made:
        for shape, world in made:
            prompt = [0, *world.tokenizer.encode("the captain sailed from the harbour, and the proof of the lemma " * 8).ids][:PROMPT]
            lms = {name: open_model(record, world.store, device) for name, record in world.models().items()}
            ways = {(name, kind): (lm, kind) for name, lm in lms.items() for kind in ("greedy", "sampled")}
            seconds: dict[Any, list[float]] = {way: [] for way in ways}
            for number in range(1 + (1 if small else ROUNDS)):  # the first prepares
                if number > 1 and time.monotonic() > until:
                    break
                for way, (lm, kind) in ways.items():
                    seconds[way] += [one] if (one := _per_token(lm, world.tokenizer, prompt, count, kind)) and number else []
            for (name, kind), values in seconds.items():
                one = median(values)
                say("gpu", measured="decode", device=device, shape=shape, way=name, choice=kind, rounds=len(values), tokens=count,
                    ms_per_token=1e3 * one, of_one=one / median(seconds["one expert", kind]))  # fmt: skip
            _agree(device, shape, world, lms, prompt, 12 if small else 48)


def _per_token(lm: Any, tokenizer: Tokenizer, prompt: list[int], count: int, kind: str) -> float:
    """Seconds per token after the first."""
    temperature, top_p = (0.0, 1.0) if kind == "greedy" else (0.8, 0.95)
    steps = generate(lm, tokenizer, prompt, max_tokens=count + 1, temperature=temperature, top_p=top_p, stops=frozenset())
    next(steps)
    started = time.perf_counter()
    made = sum(1 for _ in steps)
    return (time.perf_counter() - started) / made


def _agree(device: str, shape: str, world: World, lms: dict[str, Any], prompt: list[int], count: int) -> None:
    for name, record in world.models().items():
        made = list(generate(lms[name], world.tokenizer, prompt, max_tokens=count, stops=frozenset()))
        loglik_T = open_model(record, world.store, "cpu").score([[*prompt, *(step.token for step in made)]])[0, len(prompt) :]
        say("gpu", measured="agreement", device=device, shape=shape, way=name, tokens=len(made),
            nats=float(np.abs(np.array([step.logprob for step in made]) - loglik_T.numpy()).max()))  # fmt: skip


# ---- scoring ---------------------------------------------------------------------------------------------------------


def measure_scoring(device: str, small: bool = False, limit: float = 60.0) -> None:
    """Print the lines of scoring."""
    until = time.monotonic() + limit
    flops = _gemm_rate(device, small)
    say("gpu", measured="gemm", device=device, dtype="float32", tflops=flops / 1e12)
    with worlds(["17M"] if small else ["17M", "135M"]) as made:
        for shape, world in made:
            length, rows = (128, 2) if small else (1024, 32)
            tokens_BT = torch.randint(world.seed.vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
            for name, record in (("seed", world.seed), ("one expert", world.experts[0])):
                lm = open_model(record, world.store, device)
                seconds = []
                for number in range(4):  # the first prepares
                    started = time.perf_counter()
                    lm.score(tokens_BT)
                    seconds += [time.perf_counter() - started] if number else []
                    if number and time.monotonic() > until:
                        break
                rate = tokens_BT.numel() / median(seconds)
                say("gpu", measured="scoring", device=device, shape=shape, way=name, tokens_per_second=rate,
                    share_of_gemm=rate * flops_per_token(shape, length) / flops)  # fmt: skip


def flops_per_token(shape: str, length: int) -> float:
    """Of a forward pass of the seed: two for each weight of a product, and causal attention."""
    width, feed_forward, layers, heads, groups, vocabulary = SHAPES[shape]
    attention = 2 * width * width * (1 + groups / heads) + width * length / 2 * 2
    return 2 * (layers * (attention + 3 * width * feed_forward) + width * vocabulary)


def _gemm_rate(device: str, small: bool) -> float:
    """Floating-point operations per second of one large float32 product."""
    size, times = (512, 3) if small else (8192, 5)
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    (a @ b)[0, 0].item()
    started = time.perf_counter()
    for _ in range(times):
        c = a @ b
    c[0, 0].item()
    return times * 2 * size**3 / (time.perf_counter() - started)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--small", action="store_true")
    options.add_argument("--limit", type=float, default=120.0)
    options.add_argument("--only", type=words, default=["decode", "scoring"])
    asked = options.parse_args()
    for name, measure in (("decode", measure_decode), ("scoring", measure_scoring)):
        if name in asked.only:
            measure(asked.device, asked.small, asked.limit)


if __name__ == "__main__":
    main()
