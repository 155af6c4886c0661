"""How time and memory of `elmwood cluster` grow with the corpus. One JSON line per stage and size.

    python -m benches.speed.scale FOLDER [DOCUMENTS ...] [--workers N] [--engine ray]     default: 10000 100000 1000000

FOLDER holds JSON lines (text, source). A document is made of three passages of one source, drawn with a fixed seed, so sizes differ only
in the number of documents. Each size runs in a separate process, in a store that is deleted afterwards. `peak_mb` is the largest memory
that no file backs, of this process during a stage (workers have their own). `start_mb` is the memory of the libraries before the first
stage. `cpu_seconds` of this process are meaningful on a busy machine, `seconds` are not.
"""

import json
import multiprocessing
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple, TypeVar

import numpy as np

from benches.common import own_memory, parser, say
from elmwood.corpus.build import build
from elmwood.domains.grow import Means
from elmwood.domains.partition import fit_embedder, partition
from elmwood.records import Corpus, Partition
from elmwood.store import Store

T = TypeVar("T")
PASSAGE = 150  # characters, cut at a space
PASSAGES = 3
DOMAINS = 32


def make(folder: Path, count: int, path: Path) -> None:
    """Write documents to two files of JSON lines, as a corpus in several files."""
    rng = np.random.default_rng(0)
    pools = []
    for source in sorted(folder.glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in source.open()]
        found = [text[at : at + PASSAGE].partition(" ")[2] for text in texts[:2000] for at in range(0, len(text) - PASSAGE, PASSAGE)]
        pools.append([found[place] for place in rng.permutation(len(found))[:20_000]])
    for part in range(2):
        with (path / f"part-{part}.jsonl").open("w") as file:
            for _ in range(count // 2):
                pool = pools[int(rng.integers(len(pools)))]
                file.write(json.dumps({"text": " ".join(pool[int(place)] for place in rng.integers(len(pool), size=PASSAGES))}) + "\n")


class Cost(NamedTuple):
    """What a stage took."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


def watch_cost(task: Callable[[], T]) -> tuple[T, Cost]:
    """The result, and its cost; memory is looked at ten times a second."""
    over, peak = threading.Event(), [own_memory()]

    def watch() -> None:
        while not over.wait(0.1):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, worked = perf_counter(), process_time()
    try:
        return task(), Cost(perf_counter() - started, process_time() - worked, max(peak[0], own_memory()))
    finally:
        over.set()
        watcher.join()


def measure_size(folder: Path, count: int, means: Means) -> None:
    """Every stage for one size."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.mkdir()
        make(folder, count, text)
        store, start = Store(Path(scratch) / "store"), own_memory()
        corpus, built = watch_cost(lambda: build([str(text)], store))
        embedder, fitted = watch_cost(lambda: fit_embedder(corpus, store, "tfidf"))
        made, divided = watch_cost(lambda: partition(corpus, store, domains=DOMAINS, embedder=embedder, means=means))
        _, again = watch_cost(lambda: partition(corpus, store, domains=DOMAINS, embedder=embedder, means=means))
    stages = {"build": built, "fit embedder": fitted, "embed, cluster, part": divided, "again": again}
    for stage, cost in stages.items():
        say_stage(corpus, made, stage, cost, start, means)


def say_stage(corpus: Corpus, made: Partition, stage: str, cost: Cost, start: float, means: Means) -> None:
    measured = {
        "documents": corpus.documents, "mb": corpus.bytes / 1e6, "shards": len(corpus.train), "stage": stage,
        **cost._asdict(), "mb_per_second": corpus.bytes / 1e6 / cost.seconds, "documents_per_second": corpus.documents / cost.seconds,
        "start_mb": start, "workers": means.workers, "engine": means.engine,
        "sizes": [min(made.fit_sizes), max(made.fit_sizes)], "greedy_sizes": [min(made.greedy_sizes), max(made.greedy_sizes)],
    }  # fmt: skip
    say("scale", **measured)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("documents", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--engine", default="local")
    asked = options.parse_args()
    context = multiprocessing.get_context("spawn")  # so that each size has a memory of its own
    for count in asked.documents:
        process = context.Process(target=measure_size, args=(asked.folder, count, Means(asked.workers, asked.engine)))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
