"""What the benches share: a measurement as one JSON line, arguments, progress, a forest opened, time and memory."""

import json
import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from elmwood.evaluate import HoldoutSpec
from elmwood.evaluate.holdout import Holdout
from elmwood.evaluate.losses import bits_per_byte, difference
from elmwood.records import Ensemble, Forest, Partition, Seed
from elmwood.store import Store

T = TypeVar("T")
DIGITS = 6  # significant digits of what is printed
EVERY = 5.0  # seconds between two lines of progress

# ---- output


def say(bench: str, **facts: Any) -> None:
    """Print one measurement as a JSON line with the key `bench`; floats have six significant digits."""
    print(json.dumps({"bench": bench, **shorten(facts)}), flush=True)


def shorten(value: Any) -> Any:
    """Floats to DIGITS significant digits, at any depth of dicts and lists."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: shorten(one) for key, one in value.items()}
    return [shorten(one) for one in value] if isinstance(value, list | tuple) else value


class Lines:
    """Progress as lines on stderr, at most one every few seconds: what a bench hands to functions of elmwood."""

    def __init__(self) -> None:
        self.last = perf_counter()

    def __call__(self, what: str, done: float, total: float, unit: str) -> None:
        if perf_counter() - self.last > EVERY:
            self.last = perf_counter()
            sys.stderr.write(f"{what}: {done:.6g}{f' of {total:.6g}' if total else ''} {unit}\n")


# ---- arguments


def parser(doc: str | None) -> ArgumentParser:
    """A parser whose --help is the docstring of the bench."""
    return ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)


def numbers(text: str) -> list[float]:
    """'0.2,0.5,1' -> [0.2, 0.5, 1.0]."""
    return [float(one) for one in text.split(",") if one]


def integers(text: str) -> list[int]:
    """'4,8,16' -> [4, 8, 16]."""
    return [int(one) for one in text.split(",") if one]


def words(text: str) -> list[str]:
    """'average,ties' -> ["average", "ties"]."""
    return [one for one in text.split(",") if one]


# ---- a forest


class Opened(NamedTuple):
    """A forest of a store and what it was made from; `ensemble` is set where an ensemble was named."""

    store: Store
    forest: Forest
    seed: Seed
    division: Partition
    ensemble: Ensemble | None

    def holdout(self, documents: int | None, longest: int = 1024) -> HoldoutSpec:
        """Held-out documents in windows of the seed's context, of at most `longest` tokens."""
        length = min(self.seed.context, longest)
        return HoldoutSpec(partition=self.division.digest, seed=self.seed.digest, length=length, documents=documents)


def open_forest(store: Store, name: str) -> Opened:
    """A forest, or the forest of an ensemble."""
    named = store.load(name)
    ensemble = named if isinstance(named, Ensemble) else None
    forest = store.load(ensemble.forest if ensemble else named.digest, Forest)
    return Opened(store, forest, store.load(forest.seed, Seed), store.load(forest.partition, Partition), ensemble)


def names_below(store: Store, names: Sequence[str]) -> list[str]:
    """Names, with those that end in '/' replaced by all names below them. Raises UnknownName."""
    return [name for name in store.expand(names) if isinstance(name, str)]


# ---- time and memory


def timed(task: Callable[[], T]) -> tuple[T, float]:
    """The result of a task, and the seconds it took."""
    started = perf_counter()
    made = task()
    return made, perf_counter() - started


def own_memory(process: int | str = "self") -> float:
    """MB of a process's memory that no file backs."""
    return int(re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())[0]) / 1e3


def cpu_seconds(process: int) -> float:
    """Of CPU time that a process took so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(column_N: np.ndarray, dense_N: np.ndarray, held: Holdout, test_D: np.ndarray) -> dict[str, float]:
    """Bits per byte of a column of log-likelihoods, and its gain over dense training with the standard error, paired."""
    loss, gain = bits_per_byte(column_N, held, test_D), difference(dense_N, column_N, held, test_D)
    return {"bits_per_byte": loss.value, "gain": gain.value, "gain_error": gain.standard_error}
