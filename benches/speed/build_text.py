"""How fast text becomes a corpus: read, deduplicate, split and write together. One JSON line per measurement.

    python -m benches.speed.build_text [--documents 40000] [--workers 1 2] [--before 4000]

Documents of about 1.3 kB are made of words of the bundled corpus by Zipf's law, one in a hundred repeated and one in a hundred nearly so.
Each build runs in a process of its own. CPU seconds include its workers, and the start of their interpreters; `mb_per_cpu_second` is
the speed of one core. Peer: the build before, which sketched one document after the other by `datasketch`, on the first `--before`
documents, and this build on the same ones.
"""

import json
import multiprocessing
import re
import resource
import tempfile
import time
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benches.common import parser, say
from elmwood.corpus.build import SCHEMA, Means, build
from elmwood.corpus.dedup import BANDS, HASHES, ROWS, SIMILAR
from elmwood.corpus.read import read
from elmwood.store import Store

FILES = 8
WORD = re.compile(r"\w+")


def write_text(folder: Path, count: int) -> None:
    """Make documents, in FILES files of JSON lines."""
    words = sorted({word for document in read("sample", Counter()) for word in document.text.split() if len(word) < 14})
    share = np.cumsum(1 / np.arange(1, len(words) + 1))
    rng = np.random.default_rng(0)
    drawn = [words[n] for n in np.searchsorted(share, rng.random(1 << 18) * share[-1])]  # a table: a draw is then one look
    for number in range(FILES):
        with (folder / f"{number}.jsonl").open("w") as file:
            for n in range(count // FILES):
                text = " ".join([drawn[place] for place in rng.integers(0, len(drawn), int(rng.lognormal(5, 0.7)) + 5).tolist()])
                for variant in [text, *([text] if n % 100 == 0 else []), *([f"{text} more words"] if n % 100 == 1 else [])]:
                    file.write(json.dumps({"text": variant, "source": "made"}) + "\n")


def before(sources: list[str], folder: Path) -> int:
    """The build before, in one process; the documents it keeps."""
    from datasketch import MinHash

    texts = {document.id: document.text for source in sources for document in read(source, Counter())}
    ids = sorted(texts)

    def shingles(text: str) -> list[int]:
        word = np.fromiter(map(crc32, "\0".join(WORD.findall(text.lower())).encode().split(b"\0")), np.uint64)
        runs = max(1, len(word) - 4)
        mixed = np.zeros(runs, np.uint64)
        for place in range(min(5, len(word))):
            mixed = (mixed + word[place : place + runs]) * np.uint64(0x9E3779B97F4A7C15)
        return np.unique((mixed >> np.uint64(32)).astype(np.uint32)).tolist()

    hashed = (shingles(texts[id]) for id in ids)
    signature_NH = np.stack([one.hashvalues for one in MinHash.generator(hashed, num_perm=HASHES, seed=1, hashfunc=int, scheme="affine32")])
    kept: dict[tuple[int, bytes], list[int]] = {}
    chosen = []
    for n, signature_H in enumerate(signature_NH):
        keys = [(band, signature_H[band * ROWS : (band + 1) * ROWS].tobytes()) for band in range(BANDS)]
        others = sorted({other for key in keys for other in kept.get(key, ())})
        if not others or (signature_NH[others] == signature_H).mean(1).max() < SIMILAR:
            chosen.append(ids[n])
            for key in keys:
                kept.setdefault(key, []).append(n)
    rows = {"id": chosen, "text": [texts[id] for id in chosen], "meta": ['{"source": "made"}'] * len(chosen)}
    pq.write_table(pa.table(rows, schema=SCHEMA), folder / "shard.parquet", compression="zstd")
    return len(chosen)


def measure(folder: str, workers: int, answers: Any) -> None:
    """Build what is in a folder; `workers` 0: by the build before."""
    build(["sample"], Store(tempfile.mkdtemp()))  # imports and compiles
    start, cpu = time.perf_counter(), cpu_seconds()
    with tempfile.TemporaryDirectory() as store:
        if workers:
            corpus = build([folder], Store(store), means=Means(workers=workers))
            found = {"documents": corpus.documents, "mb": corpus.bytes / 1e6, "rejected": corpus.rejected, "corpus": corpus.digest[:12]}
        else:
            found = {"documents": before([folder], Path(store))}
    seconds = time.perf_counter() - start
    forkserver._forkserver._stop()  # workers are its children: what they took counts once it has ended
    found |= {"seconds": seconds, "cpu_seconds": cpu_seconds() - cpu}
    peak = [resource.getrusage(who).ru_maxrss / 1000 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    answers.put(found | {"peak_mb": peak[0], "peak_mb_of_a_worker": peak[1]})


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def apart(folder: Path, workers: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=measure, args=(str(folder), workers, answers))
    process.start()
    found = answers.get()
    process.join()
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--documents", type=int, default=40_000)
    options.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    options.add_argument("--before", type=int, default=4000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if given.before:
            write_text(Path(made), given.before)
            old, new = apart(Path(made), 0), apart(Path(made), 1)
            ratio = old["cpu_seconds"] / new["cpu_seconds"]
            say(
                "build before",
                **old,
                mb=new["mb"],
                mb_per_cpu_second=new["mb"] / old["cpu_seconds"],
                now_cpu_seconds=new["cpu_seconds"],
                ratio=ratio,
            )
            for path in Path(made).iterdir():
                path.unlink()
        write_text(Path(made), given.documents)
        first: dict[str, Any] = {}
        for workers in given.workers:
            found = apart(Path(made), workers)
            first = first or found
            speed = {"mb_per_second": found["mb"] / found["seconds"], "mb_per_cpu_second": found["mb"] / found["cpu_seconds"]}
            say(
                "build",
                workers=workers,
                **found,
                **speed,
                faster=first["seconds"] / found["seconds"],
                same=first["corpus"] == found["corpus"],
            )


if __name__ == "__main__":
    main()
