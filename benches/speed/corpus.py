"""How fast a corpus is built and packed, and whether memory stays flat. One JSON line per measurement.

    python -m benches.speed.corpus [DOCUMENTS ...]      synthetic corpora of these sizes beside the sample; default 10000 40000 160000

Peers, in the same run: datasketch's own MinHashLSH on the same shingles, and `tokenizers` alone on texts in memory.
"""

import json
import multiprocessing
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH

from benches.common import own_memory, parser, say, timed
from elmwood.corpus.build import build, documents
from elmwood.corpus.dedup import SIMILAR, bands, near_duplicates, shared, sketch
from elmwood.corpus.read import read
from elmwood.corpus.tokens import pack, train_tokenizer
from elmwood.store import Store


def sample() -> None:
    store = Store(tempfile.mkdtemp())
    corpus, built = timed(lambda: build(["sample"], store))
    _, again = timed(lambda: build(["sample"], store))
    say("build", corpus="sample", documents=corpus.documents, seconds=built, again=again, mb_per_second=corpus.bytes / built / 1e6)
    texts = [document.text for document in documents(corpus.train, store)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer, trained = timed(lambda: train_tokenizer(texts, 2048))
    packed, ours = timed(lambda: pack(corpus.train, tokenizer, 0, store))
    _, peer = timed(lambda: tokenizer.encode_batch(texts, add_special_tokens=False))
    say(
        "tokens",
        train_seconds=trained,
        pack_seconds=ours,
        mb_per_second=size / ours,
        tokens=len(packed.tokens),
        peer_seconds=peer,
        ratio=peer / ours,
    )


def near() -> None:
    texts = [document.text for document in read("sample", Counter())]

    def ours():
        sketch_NH = sketch(texts)
        found = [shared(hash_N) for hash_N in bands(sketch_NH)]
        before_B = np.cumsum([0, *(len(group_E) for _, group_E in found)])
        number_E = np.concatenate([one for one, _ in found])
        return near_duplicates(sketch_NH, number_E, np.concatenate([one + more for (_, one), more in zip(found, before_B, strict=False)]))

    def peer():
        """The documented way: shingles as bytes, one MinHash a document, one insertion and query each."""
        index = MinHashLSH(threshold=SIMILAR, num_perm=128)
        for n, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())
            sketch = MinHash(num_perm=128)
            sketch.update_batch({" ".join(words[place : place + 5]).encode() for place in range(max(1, len(words) - 4))})
            index.query(sketch)
            index.insert(str(n), sketch)

    _, fast = timed(ours)
    _, slow = timed(peer)
    say("near-duplicates", documents=len(texts), seconds=fast, peer_seconds=slow, ratio=slow / fast)


def measure_size(count: int, answers) -> None:
    """Build a synthetic corpus of 1.5 kB documents: one in a hundred repeated, one in a hundred nearly so."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{n}" for n in range(30_000)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made-up.jsonl"
        with path.open("w") as file:
            for n in range(count):
                text = " ".join(words[(rng.random(180) ** 3 * len(words)).astype(int)])
                for variant in [text, *([text] if n % 100 == 0 else []), *([f"{text} more words"] if n % 100 == 1 else [])]:
                    file.write(json.dumps({"text": variant}) + "\n")
        peak = base = own_memory()

        def watch(*_) -> None:
            nonlocal peak
            peak = max(peak, own_memory())

        start = time.perf_counter()
        corpus = build([str(path)], Store(Path(folder) / "store"), progress=watch)
        seconds = time.perf_counter() - start
    answers.put((corpus.documents, corpus.bytes / 1e6, seconds, peak - base, corpus.rejected))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("documents", type=int, nargs="*", default=[10_000, 40_000, 160_000])
    counts = options.parse_args().documents
    sample()
    near()
    context = multiprocessing.get_context("spawn")  # so that each has a memory of its own
    for count in counts:
        answers = context.SimpleQueue()
        process = context.Process(target=measure_size, args=(count, answers))
        process.start()
        number, megabytes, seconds, peak, rejected = answers.get()
        process.join()
        say(
            "scale",
            documents=number,
            mb=megabytes,
            seconds=seconds,
            mb_per_second=megabytes / seconds,
            peak_mb=peak,
            rejected=rejected,
        )


if __name__ == "__main__":
    main()
