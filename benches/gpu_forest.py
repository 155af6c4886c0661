"""A forest on one device beside its controls: a part of `python -m benches.gpu`, and a command of its own.

    python -m benches.gpu_forest [--device cuda] [--small] [--text FOLDER_OR_FILE ...] [--seed-tokens 30M] [--tokens 8M]

A seed of 30M parameters is trained on the text (by default the bundled sample) and nothing else; then eight experts, as many on random
parts of the text, and three dense controls, each side on --tokens. All are scored on held-out documents. One line for each phase, with its
seconds, and one for each row of the comparison, with its standard error. The learning rates are not tuned for this size.
"""

import lzma
import os
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from benches.common import parser, say
from elmwood.corpus.build import build
from elmwood.engine import DEVICE
from elmwood.lm.devices import best_device
from elmwood.store import Store
from elmwood.study.demo import SAMPLE, Study, grow, scratch
from elmwood.units import parse_count

FOREST = Study(
    domains=8, vocabulary=8192, layers=8, width=512, length=1024, batch=8, documents=1500, seed_rate=1e-3, expert_rate=3e-4,
    random_rate=3e-4, dense_rate=3e-4, middle_rate=4e-4, large_rate=6e-4,
)  # fmt: skip
SMALL: dict[str, Any] = {"domains": 2, "vocabulary": 512, "layers": 1, "width": 32, "length": 64, "documents": 20}


def measure_forest(device: str, small: bool, texts: list[str], seed_tokens: int, tokens: int) -> None:
    """Grow it in a new folder."""
    counts = {"seed_tokens": 20_000, "tokens": 20_000} if small else {"seed_tokens": seed_tokens, "tokens": tokens}
    study = FOREST.model_copy(update=counts | (SMALL if small else {}))
    before = os.environ.get(DEVICE)
    os.environ[DEVICE] = device  # workers are processes
    try:
        with tempfile.TemporaryDirectory() as folder:
            if small:
                texts = [_some(Path(folder) / "some.jsonl")]
            _grow(study, device, small, texts, Store(folder))
    finally:
        os.environ.pop(DEVICE) if before is None else os.environ.update({DEVICE: before})


def _some(path: Path) -> str:
    """A file of few documents of the sample."""
    with lzma.open(str(files("elmwood.corpus.sample") / "sample-corpus.jsonl.xz"), "rt") as sample:
        path.write_text("".join(line for number, line in enumerate(sample) if number % 20 == 0))
    return str(path)


def _grow(study: Study, device: str, small: bool, texts: list[str], store: Store) -> None:
    marks = [("", time.perf_counter())]

    def mark(phase: str, **facts: Any) -> None:
        marks.append((phase, time.perf_counter()))
        say("forest", measured="forest", phase=phase, device=device, seconds=marks[-1][1] - marks[-2][1], **facts)

    corpus = build(texts, store)
    mark("text", documents=corpus.documents, MB=corpus.bytes / 1e6)
    seed = scratch(study, corpus, store)
    mark("seed", parameters=seed.parameters, tokens=study.seed_tokens)
    made = grow(study, corpus, seed, store, workers=1 if small else None)
    mark("experts, controls, scores", models=len(made.models), tokens=study.tokens)
    for row in made.comparison.rows:
        say("forest", measured="forest", **row.model_dump(exclude={"domains"}))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default=str(best_device()))
    options.add_argument("--small", action="store_true", help="a tiny seed and few tokens: that it runs")
    options.add_argument("--text", nargs="+", default=[SAMPLE])
    options.add_argument("--seed-tokens", default="30M")
    options.add_argument("--tokens", default="8M")
    asked = options.parse_args()
    measure_forest(asked.device, asked.small, asked.text, parse_count(asked.seed_tokens), parse_count(asked.tokens))


if __name__ == "__main__":
    main()
