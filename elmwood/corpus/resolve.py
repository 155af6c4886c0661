"""Merge runs: one copy of each text, no near-duplicates, each document on its side. Memory is bounded by passes over parts of the runs.

Documents are numbered through all runs. N of them in all, M in one pass, C candidates for near-duplicates, E memberships in groups.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elmwood.corpus.dedup import BANDS, HASHES, near_duplicates, shared
from elmwood.corpus.stage import Run
from elmwood.engine import Progress, cores

PER_DOCUMENT = 80  # bytes of memory for each document of a pass, about
PER_THREAD = 40  # of each thread that looks for near-duplicates


class Side(NamedTuple):
    """The documents of one side of the split: their numbers in the order of their ids, in a file."""

    order: Path  # int64
    documents: int
    bytes: int


def resolve(
    runs: Sequence[Run], share: float, memory: int, work: Path, rejected: Counter[str], progress: Progress, threads: int = 1
) -> tuple[Side, Side]:
    """The documents to train on and to hold out. What is left out is counted."""
    start_R = np.cumsum([0, *(run.documents for run in runs)])
    threads = max(1, min(threads, BANDS, cores()))
    passes = int(-(-int(start_R[-1]) * max(PER_DOCUMENT, PER_THREAD * threads) // memory))
    keep_N = _unique(runs, start_R, passes, rejected, progress)
    _drop_near(runs, start_R, passes, keep_N, work, threads, rejected, progress)
    return _split(runs, start_R, passes, keep_N, share, work)


def run_of(number_M: np.ndarray, start_R: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Documents by run: its number, where they are in `number_M`, and their rows in the run."""
    run_M = np.searchsorted(start_R, number_M, side="right") - 1
    for r in np.unique(run_M).tolist():
        place = np.flatnonzero(run_M == r)
        yield r, place, number_M[place] - start_R[r]


def _slices(runs: Sequence[Run], start_R: np.ndarray, passes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each pass: the index entries of documents whose ids are in one part of all ids, and their numbers."""
    width = 2**64 // passes + 1
    for part in range(passes):
        entries, numbers = [], []
        for r, run in enumerate(runs):
            index_N = run.entries()
            ends = [int(np.searchsorted(index_N["high"], np.uint64(min(edge * width, 2**64 - 1)))) for edge in (part, part + 1)]
            first, last = ends[0], len(index_N) if part == passes - 1 else ends[1]
            entries.append(index_N[first:last])
            numbers.append(np.arange(first, last) + start_R[r])
        yield np.concatenate(entries), np.concatenate(numbers)


def _unique(runs: Sequence[Run], start_R: np.ndarray, passes: int, rejected: Counter[str], progress: Progress) -> np.ndarray:
    """One copy of each text: bool [N]. Copies with different meta are ordered by its crc, not as they were read."""
    keep_N = np.zeros(start_R[-1], bool)
    for part, (index_M, number_M) in enumerate(_slices(runs, start_R, passes)):
        order = np.lexsort((index_M["crc"], index_M["low"], index_M["high"]))
        high_M, low_M = index_M["high"][order], index_M["low"][order]
        first = np.ones(len(order), bool)
        first[1:] = (high_M[1:] != high_M[:-1]) | (low_M[1:] != low_M[:-1])
        keep_N[number_M[order[first]]] = True
        progress("find duplicates", part + 1, passes, "passes")
    if dropped := int((~keep_N).sum()):
        rejected["exact duplicate"] += dropped
    return keep_N


def _drop_near(
    runs: Sequence[Run], start_R: np.ndarray, passes: int, keep_N: np.ndarray, work: Path, threads: int, rejected: Counter[str],
    progress: Progress,
) -> None:  # fmt: skip
    """Without near-duplicates: the one with the smaller id is kept."""

    def alike(place: int) -> tuple[np.ndarray, np.ndarray]:
        number_M, hash_M = _hashes(runs, start_R, keep_N, *divmod(place, passes), passes)
        place_E, group_E = shared(hash_M)
        return number_M[place_E], group_E

    members, groups, count = [], [], 0
    with ThreadPoolExecutor(threads) as pool:  # sorting leaves the interpreter free
        for done, (number_E, group_E) in enumerate(pool.map(alike, range(BANDS * passes)), 1):
            members.append(number_E)
            groups.append(group_E + count)
            count += int(group_E[-1]) + 1 if len(group_E) else 0
            progress("find near-duplicates", done / passes, BANDS, "bands")
    number_E, group_E = np.concatenate(members), np.concatenate(groups)
    number_C = np.unique(number_E)
    if not len(number_C):
        return
    high_C, low_C = np.empty(len(number_C), np.uint64), np.empty(len(number_C), np.uint64)
    for r, place, row in run_of(number_C, start_R):
        found = runs[r].entries()[row]
        high_C[place], low_C[place] = found["high"], found["low"]
    number_C = number_C[np.lexsort((low_C, high_C))]
    sketch_CH: Any = np.memmap(work / "candidates", np.uint32, "w+", shape=(len(number_C), HASHES))
    for r, place, row in run_of(number_C, start_R):
        sketch_CH[place] = runs[r].sketches()[row]
    by_number = np.argsort(number_C)
    candidate_E = by_number[np.searchsorted(number_C, number_E, sorter=by_number)]
    drop_C = near_duplicates(sketch_CH, candidate_E, group_E)
    keep_N[number_C[drop_C]] = False
    if drop_C.any():
        rejected["near-duplicate"] += int(drop_C.sum())


def _hashes(
    runs: Sequence[Run], start_R: np.ndarray, keep_N: np.ndarray, band: int, part: int, passes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of one band in one part of all hashes, and the numbers of their documents."""
    numbers, hashes = [], []
    for r, run in enumerate(runs):
        hash_N = run.bands()[band]
        wanted = keep_N[start_R[r] : start_R[r + 1]]
        if passes > 1:
            wanted = wanted & (hash_N // np.uint64(2**64 // passes + 1) == part)
        row = np.flatnonzero(wanted)
        numbers.append(row + start_R[r])
        hashes.append(hash_N[row])
    return np.concatenate(numbers), np.concatenate(hashes)


def _split(runs: Sequence[Run], start_R: np.ndarray, passes: int, keep_N: np.ndarray, share: float, work: Path) -> tuple[Side, Side]:
    """Write the order of both sides. If one would be empty, the document nearest to the threshold moves there."""
    total = int(keep_N.sum())
    lowest, highest, held = np.inf, -np.inf, 0
    for r, run in enumerate(runs):
        side_M = run.entries()["side"][keep_N[start_R[r] : start_R[r + 1]]] / 2**64
        held += int((side_M < share).sum())
        lowest, highest = min(lowest, side_M.min(initial=np.inf)), max(highest, side_M.max(initial=-np.inf))
    paths, documents, size = (work / "train", work / "holdout"), [0, 0], [0, 0]
    with paths[0].open("wb") as train, paths[1].open("wb") as holdout:
        for index_M, number_M in _slices(runs, start_R, passes):
            kept = np.flatnonzero(keep_N[number_M])
            kept = kept[np.lexsort((index_M["low"][kept], index_M["high"][kept]))]
            side_M = index_M["side"][kept] / 2**64
            held_M = side_M <= lowest if not held else side_M < highest if held == total else side_M < share
            for place, (file, chosen) in enumerate(((train, kept[~held_M]), (holdout, kept[held_M]))):
                number_M[chosen].astype("<i8").tofile(file)
                documents[place] += len(chosen)
                size[place] += int(index_M["bytes"][chosen].sum(dtype=np.int64))
    return Side(paths[0], documents[0], size[0]), Side(paths[1], documents[1], size[1])
