"""What both benches of domains use: one thread, texts with their sources, vectors around topics, the k-means objective."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from collections import Counter
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
import torch

from elmwood.corpus.read import read

torch.set_num_threads(1)


def median_seconds(task: Callable[[], object], rounds: int = 3, clock: Callable[[], float] = perf_counter) -> float:
    """Median seconds of a clock."""
    took = []
    for _ in range(rounds):
        started = clock()
        task()
        took.append(clock() - started)
    return median(took)


def topics(n: int, rng: np.random.Generator, d: int = 100, count: int = 64) -> np.ndarray:
    """Unit vectors around topics whose sizes follow Zipf's law [N, D]."""
    share = 1 / np.arange(1, count + 1)
    x_ND = rng.normal(size=(count, d))[rng.choice(count, n, p=share / share.sum())] + 1.5 * rng.normal(size=(n, d))
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)


def labelled(sources: list[str]) -> tuple[list[str], list[str]]:
    """Texts and their sources."""
    rejected: Counter[str] = Counter()
    found = [document for source in sources or ["sample"] for document in read(source, rejected)]
    return [document.text for document in found], [document.meta["source"] for document in found]


def objective(x_ND: np.ndarray, label_N: np.ndarray) -> float:
    """Mean squared distance to the mean of the own domain."""
    return float(sum(np.square(x_ND[label_N == label] - x_ND[label_N == label].mean(0)).sum() for label in np.unique(label_N)) / len(x_ND))
