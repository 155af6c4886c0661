"""Tokens per second of training: our loop against transformers' Trainer (with PEFT for LoRA), same model, tokens and threads.

    python -m benches.peers.train [--steps 40] [--rounds 5] [--batch 8] [--length 256] [--threads 1]
                                  [--only full,lora] [--shape 17M] [--trl] [--together]

One JSON line per measurement: medians over interleaved rounds, wall and CPU seconds (CPU seconds depend less on other processes), ratios.

full, lora   both sides on the same packed rows
padding      the Trainer gets one document per row, as by default: paragraphs, and documents of the sample in rows of up to 1,024 tokens;
             with --trl (extra dev) also TRL's SFTTrainer, which packs too
memory       peak of a separate process, whole and without what it held before training
saving       share of the time spent on checkpoints, saved as often as the loop ever does
mask         the cost of keeping packed documents apart
processes    two experts side by side with one thread each, against one with two threads

The last line has the ratios and their goals. --together runs another study alone: 2, 4, 8 and 16 LoRA experts at once over one seed
against one alone (separate runs in turn have its speed), for several rows per expert and step, on models of 0.9 and 17 million parameters.
"pays up to" is the largest number of rows up to which every ratio is above 1.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from tokenizers import Tokenizer

from benches.common import parser, say, words
from benches.trainers import Clock, Times, blocks, packers, padded, trainers
from elmwood.corpus.build import build, documents
from elmwood.corpus.tokens import Packed, pack, train_tokenizer
from elmwood.lm.devices import best_device
from elmwood.lm.load import new_model
from elmwood.records import Recipe, Shape
from elmwood.store import Store
from elmwood.train import loop, together
from elmwood.train.adapter import add_adapter

warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT 0.21 with transformers 5.23
SHAPE = Shape(layers=3, width=128, heads=4, feed_forward=352, vocabulary=2048, context=1024)
SHAPES = {
    "0.9M": SHAPE,
    "4M": Shape(layers=6, width=224, heads=7, feed_forward=608, vocabulary=4096, context=1024),
    "17M": Shape(layers=8, width=384, heads=6, feed_forward=1024, vocabulary=8192, context=1024),
    "135M": Shape(layers=30, width=576, heads=9, feed_forward=1536, vocabulary=49152, context=1024),  # SmolLM2's, with plain heads
}
TOGETHER = ("0.9M", "17M")
LONG = {"batch": 4, "length": 1024}  # whole documents are of mixed length in rows that most of them fit into
COUNTS, ROWS = (2, 4, 8, 16), (1, 2, 4, 8)
GOALS: dict[tuple[str, str], tuple[str, float]] = {  # line and its field -> what must be reached
    ("lora", "ours / Trainer (wall)"): ("at least", 1.0),
    ("padding, documents, lora", "ours, packed / Trainer, padded (wall)"): ("at least", 1.5),
    ("padding, paragraphs, lora", "ours, packed / Trainer, padded (wall)"): ("at least", 1.5),
    ("memory, lora", "ours / Trainer (peak)"): ("at most", 0.8),
    ("memory, lora", "ours / Trainer (peak of training)"): ("at most", 0.8),
    ("saving, lora", "share"): ("at most", 0.02),
    ("saving, full", "share"): ("at most", 0.02),
}
LINES: list[dict] = []  # all that was printed


def say_line(**line: object) -> None:
    LINES.append(line)
    say("train", **line)


def ours(packed: Packed, recipe: Recipe, shape: Shape) -> Times:
    model, clock = new_model(shape).to(best_device()), Clock(recipe.steps)
    if recipe.method == "lora":
        model = add_adapter(model, recipe, "bench")
    with tempfile.TemporaryDirectory() as work:
        loop.run(model, packed, recipe, Path(work), lambda **_: None, lambda *event: clock.tick() if event[3] == "tokens" else None)
    return clock.per_token(recipe.batch * recipe.length)


def at_once(packed: list[Packed], recipe: Recipe, shape: Shape) -> Times:
    """Experts together over one model; times of one token of any of them."""
    model, clock = add_adapter(new_model(shape), recipe, "bench"), Clock(recipe.steps)
    with tempfile.TemporaryDirectory() as work:
        together.run(model, packed, recipe, Path(work), lambda *_, **__: None, lambda *_: clock.tick())
    return clock.per_token(len(packed) * recipe.batch * recipe.length)


def texts(folder: Path, vocabulary: int) -> tuple[Packed, Packed, Tokenizer]:
    """The sample corpus packed, and the same cut into paragraphs, which are of very mixed length."""
    store = Store(folder / "store")
    corpus = build(["sample"], store)
    words = train_tokenizer((document.text for document in documents(corpus.train, store)), vocabulary)
    whole = pack(corpus.train, words, 0, store)
    lines = (line for document in documents(corpus.train, store) for line in document.text.split("\n\n") if len(line) > 20)
    encoded = [np.array([0, *one.ids], np.uint16) for one in words.encode_batch_fast(list(lines), add_special_tokens=False)]
    starts = np.cumsum([0, *(len(one) for one in encoded[:-1])])
    return whole, Packed(np.concatenate(encoded), starts, 0), words


def compare(what: str, ways: dict[str, Callable[[], Times]], rounds: int, **facts: object) -> None:
    """Run the ways in turn, `rounds` times; print a line. Ratios are of speed, the first way over each other one, in the same round."""
    times: dict[str, list[Times]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
    first, line = next(iter(ways)), {"what": what, **facts}
    for name in ways:
        line[f"{name}: tokens/s"] = round(1 / median(wall for wall, _ in times[name]))
        line[f"{name}: tokens/CPU s"] = round(1 / median(cpu for _, cpu in times[name]))
    for name in list(ways)[1:]:
        for place, clock in enumerate(("wall", "CPU")):
            ratios = [theirs[place] / own[place] for own, theirs in zip(times[first], times[name], strict=True)]
            line[f"{first} / {name} ({clock})"] = round(median(ratios), 3)
    say_line(**line)


def side_by_side(recipe: Recipe, rounds: int) -> None:
    """Experts together against separate runs in turn."""
    rng = np.random.default_rng(0)
    for name in TOGETHER:
        shape = SHAPES[name]
        parts = [
            Packed(rng.integers(1, shape.vocabulary, 100_000).astype(np.uint16), np.arange(0, 100_000, 1200), 0) for _ in range(max(COUNTS))
        ]
        for batch in ROWS:
            alone = recipe.model_copy(update={"method": "lora", "batch": batch})
            ways = {
                f"{count} together": partial(at_once, parts[:count], alone.model_copy(update={"together": count}), shape)
                for count in COUNTS
            }
            apart = partial(ours, parts[0], alone, shape)
            for way, run in ways.items():
                compare(
                    "together", {way: run, "in turn": apart}, rounds, model=name, batch=batch, length=recipe.length, threads=recipe.threads
                )
        for count in COUNTS:
            field = f"{count} together / in turn (wall)"
            ratio_of = {int(line["batch"]): line[field] for line in LINES if line.get("model") == name and field in line}
            paying = [batch for batch in ROWS if all(ratio_of[rows] > 1 for rows in ROWS if rows <= batch)]
            more = {"goal": "at least 1.5, for few rows", "reached": ratio_of[ROWS[0]] >= 1.5} if count == 8 else {}
            say_line(
                what="together, ratios by rows",
                model=name,
                experts=count,
                ratios=ratio_of,
                **{"pays up to": max(paying, default=0)},
                **more,
            )


def goals() -> None:
    """One line with each ratio that has a goal and was measured, its goal, and whether it is reached."""
    rows = []
    for (what, field), (side, goal) in GOALS.items():
        for line in LINES:
            if line["what"] == what and field in line:
                value = line[field]
                reached = value >= goal if side == "at least" else value <= goal
                rows.append({"ratio": f"{what}: {field}", "measured": value, "goal": f"{side} {goal}", "reached": bool(reached)})
    if rows:
        say_line(what="goals", rows=rows)


def processes(recipe: Recipe) -> None:
    """Two experts with one thread each at once, and one after the other with two threads: aggregate tokens per second."""

    def run(count: int, threads: int) -> float:
        command = [sys.executable, "-m", __spec__.name, "--worker", recipe.model_copy(update={"threads": threads}).model_dump_json()]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        return sum(1 / float(worker.communicate()[0]) for worker in workers)

    pairs = [(run(2, 1), run(1, 2), run(1, 1)) for _ in range(3)]
    apart, together, alone = (median(column) for column in zip(*pairs, strict=True))
    facts = {"2 processes x 1 thread": apart, "1 process x 2 threads": together, "1 process x 1 thread": alone}
    ratio = round(median(one / two for one, two, _ in pairs), 3)
    say_line(what="processes", **{k: round(v) for k, v in facts.items()}, ratio=ratio)


def saving(packed: Packed, recipe: Recipe, shape: Shape, **facts: object) -> None:
    """Share of a run's time that goes into its states, where the first is saved at once and the others as soon as SHARE allows."""
    model, before = new_model(shape), loop.EVERY
    loop.EVERY = 0.0
    with tempfile.TemporaryDirectory() as work:
        done = loop.run(
            add_adapter(model, recipe, "bench") if recipe.method == "lora" else model, packed, recipe, Path(work), lambda **_: None
        )
    loop.EVERY = before
    line = {"seconds": round(done.seconds, 2), "saving": round(done.saving, 4), "share": round(done.saving / done.seconds, 5)}
    say_line(what=f"saving, {recipe.method}", **facts | {"steps": recipe.steps, "method": recipe.method}, **line)


def memory(recipe: Recipe, **facts: object) -> None:
    """Peak bytes of two processes, one with our loop and one with the Trainer; where the vocabulary is 16,384, as small seeds have it."""
    peaks = []
    for way in ("ours", "Trainer"):
        command = [sys.executable, "-m", __spec__.name, "--memory", way, "--worker", recipe.model_dump_json()]
        peaks.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]))
    line = {f"{way}: {what}": peak[what] for way, peak in zip(("ours", "Trainer"), peaks, strict=True) for what in peak}
    line |= {f"ours / Trainer ({what})": round(peaks[0][what] / peaks[1][what], 3) for what in peaks[0]}
    say_line(what=f"memory, {recipe.method}", **facts | {"steps": recipe.steps, "method": recipe.method}, **line)


def peak(way: str, recipe: Recipe) -> None:
    """Train in this process; print its peak, and how much of it came with training."""
    shape = SHAPE.model_copy(update={"vocabulary": 16_384, "width": 256, "feed_forward": 704, "layers": 4})
    tokens = np.random.default_rng(0).integers(1, shape.vocabulary, 200_000).astype(np.uint16)
    packed = Packed(tokens, np.arange(0, len(tokens), 1200), 0)
    rows = blocks(packed, recipe)
    before = resident("VmRSS")
    ours(packed, recipe, shape) if way == "ours" else trainers(rows, recipe.batch * recipe.length, recipe, shape)
    print(json.dumps({"peak": resident("VmHWM"), "peak of training": resident("VmHWM") - before}))


def resident(what: str) -> int:
    """Bytes: VmRSS, what this process holds; VmHWM, the most it held."""
    return 1024 * next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))


def worker(recipe: Recipe) -> None:
    rng = np.random.default_rng(0)
    packed = Packed(rng.integers(1, SHAPE.vocabulary, 400_000).astype(np.uint16), np.arange(0, 400_000, 1200), 0)
    print(ours(packed, recipe, SHAPE)[0])


def compare_rows(whole: Packed, recipe: Recipe, shape: Shape, methods: Sequence[str], rounds: int, **facts: object) -> None:
    """The same packed rows on both sides."""
    for method in methods:
        given = recipe.model_copy(update={"method": method})
        peer = partial(trainers, blocks(whole, given), given.batch * given.length, given, shape)
        compare(method, {"ours": partial(ours, whole, given, shape), "Trainer": peer}, rounds, **facts)


def compare_masks(name: str, packed: Packed, recipe: Recipe, shape: Shape, rounds: int, **facts: object) -> None:
    """What keeping packed documents apart costs: the same tokens as one document need no mask."""
    joined = packed._replace(starts=packed.starts[:1])
    ways = {"apart": partial(ours, packed, recipe, shape), "one document": partial(ours, joined, recipe, shape)}
    compare(f"mask, {name}", ways, rounds, **facts)


def compare_padding(name: str, packed: Packed, words: Tokenizer, recipe: Recipe, shape: Shape, asked: Namespace, **facts: object) -> None:
    """Our packed rows against one document per row, padded."""
    for method in ("full", "lora"):
        given = recipe.model_copy(update={"method": method} | (LONG if name == "documents" else {}))
        rows, real, share = padded(packed, given)
        ways = {"ours, packed": partial(ours, packed, given, shape), "Trainer, padded": partial(trainers, rows, real, given, shape)}
        if asked.trl:
            ways["TRL, packed"] = partial(packers, packed, words, given, shape)
        about = {"batch": given.batch, "length": given.length, "tokens that are no padding": round(share, 3)}
        compare(f"padding, {name}, {method}", ways, asked.rounds, **facts | about)


def arguments() -> Namespace:
    options = parser(__doc__)
    for name, value in (("steps", 40), ("rounds", 5), ("batch", 8), ("length", 256), ("threads", 1), ("rank", 16)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--only", type=words, default="full,lora,padding,memory,saving,mask,processes")
    options.add_argument("--shape", choices=SHAPES, default="0.9M", help="of full, lora, padding, mask and saving")
    options.add_argument("--trl", action="store_true", help="TRL's SFTTrainer with packing beside them, in `padding`")
    options.add_argument("--together", action="store_true", help="this study alone")
    options.add_argument("--worker", help=SUPPRESS)
    options.add_argument("--memory", help=SUPPRESS)
    return options.parse_args()


def main() -> None:
    asked = arguments()
    if asked.memory:
        return peak(asked.memory, Recipe.model_validate_json(asked.worker))
    if asked.worker:
        return worker(Recipe.model_validate_json(asked.worker))
    given = {name: getattr(asked, name) for name in ("steps", "batch", "length", "threads", "rank")}
    recipe, shape, facts = Recipe(**given), SHAPES[asked.shape], {"model": asked.shape} | given
    if asked.together:
        return side_by_side(recipe, asked.rounds)
    with tempfile.TemporaryDirectory() as folder:
        whole, mixed, tokenizer = texts(Path(folder), shape.vocabulary)
        compare_rows(whole, recipe, shape, [name for name in ("full", "lora") if name in asked.only], asked.rounds, **facts)
        for name, packed in {"documents": whole, "paragraphs": mixed}.items():
            if "mask" in asked.only:
                compare_masks(name, packed, recipe, shape, asked.rounds, **facts)
            if "padding" in asked.only:
                compare_padding(name, packed, tokenizer, recipe, shape, asked, **facts)
        for method in ("full", "lora") if "saving" in asked.only else ():
            saving(whole, recipe.model_copy(update={"method": method, "steps": 3 * recipe.steps}), shape, **facts)
    for method in ("full", "lora") if "memory" in asked.only else ():
        memory(recipe.model_copy(update={"method": method, "steps": 3}), **facts | {"model": "4 layers of 256, vocabulary 16384"})
    if "processes" in asked.only:
        processes(recipe)
    goals()


if __name__ == "__main__":
    main()
