"""A card in one command, at most eight minutes: placement, training and the Trainer, four bits, experts at once, decoding, a forest.

    python -m benches.gpu [--device cpu --small] [--only placement,train] [--limit 60] [--peers PYTHON] [--text FOLDER_OR_FILE ...]

Each measurement is a JSON line as soon as it exists (also in --out), ends after --limit seconds or by an error, which is a line too, and
the last line is a summary beside the goals. Weights are random and text is made here; the forest reads --text, or the bundled sample. Needs
torch, transformers, peft and accelerate; qlora needs bitsandbytes, the tuned Trainer liger-kernel.

placement  a step on each device: which devices and dtypes weights, activations, gradients and moments have
train      SmolLM2-135M's shape in rows of 2,048 tokens: full and LoRA, rows of several documents (700 tokens) and of one; a seed of 30M
folding    losses of LoRA whose narrow layers are folded, and of the same with separate products
trainer    transformers' Trainer, and with liger-kernel's kernels; trl; unsloth; and where --only names it, compiled: the Trainer through
           torch.compile. Each in a process of --peers, a Python that has them: benches/gpu_peers.py
qlora      OPT-6.7B in four bits, rank 16, 1 x 2,048: all activations kept, an eighth of the layers and all of them recomputed
together   16 LoRA experts at once against one alone, one row each
fit        what `fit` predicts for what was measured uncompiled
decode, scoring   see benches/gpu_decode.py
forest     a seed of 30M from nothing, eight experts and their controls: benches/gpu_forest.py; it may take twice --limit

MFU is by 6 N + 12 layers width length (arXiv:2204.02311), whatever is trained and attended to. "beside MB" is what the card holds of this
process that torch's allocator does not know.
"""

import contextlib
import gc
import json
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from benches.common import parser, shorten, words
from elmwood.corpus.tokens import Packed
from elmwood.lm.devices import best_device
from elmwood.lm.pretrained import new_model_of
from elmwood.records import Recipe
from elmwood.train import adapter, loop, together
from elmwood.train.adapter import add_adapter
from elmwood.train.card import compiled
from elmwood.train.card.peak import find_share
from elmwood.train.fit.gpu_table import LLAMA, SEEDS
from elmwood.train.fit.rehearsal import pack_linear, rehearse

ROOT = Path(__file__).parents[1]
SMOL, OPT = "0.1B (SmolLM2-135M)", "7B (OPT-6.7B)"
SEED_30M = LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
                    "num_key_value_heads": 8, "vocab_size": 8192, "tie_word_embeddings": True}  # fmt: skip
TINY: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 128}
LONG_RUN = 20_000  # steps of a recipe of which the first are measured: what is decided by a run's length is decided as for a real one
LINES: list[dict[str, Any]] = []


class Enough(Exception):
    """A measurement has all it needs of a run."""


class Bench:
    """Where it runs, how large, and where lines go."""

    def __init__(self, asked: Namespace):
        self.device, self.small, self.out = torch.device(asked.device), asked.small, Path(asked.out) if asked.out else None
        self.texts, self.peers = asked.text, asked.peers
        self.length, self.batch = (32, 2) if self.small else (2048, 32)

    def say(self, **facts: Any) -> None:
        line = {"bench": "gpu", **shorten(facts)}
        LINES.append(line)
        print(json.dumps(line), flush=True)
        if self.out:
            with self.out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def attempt(self, **about: Any) -> Iterator[None]:
        """What fails is a line, and the next row is measured."""
        try:
            self.clear()
            yield
        except TimeoutError:
            raise
        except Exception as error:
            if self.small:
                raise
            self.say(**about, error=f"{type(error).__name__}: {str(error)[:400]}")

    def config(self, name: str) -> Any:
        config = AutoConfig.for_model(**(SEED_30M if name == "30M" else SEEDS[name]))
        config.max_position_embeddings = 4096
        if self.small:
            small = {"hidden_size": 36, "intermediate_size": 48, "head_dim": 4} if config.model_type == "llama" else {}
            small = small or {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4}
            for key, value in (TINY | small).items():
                setattr(config, key, value)
        return config

    def model(self, name: str, method: str) -> Any:
        torch.manual_seed(0)
        with self.device:
            model = new_model_of(self.config(name), torch.float32 if method == "full" else torch.bfloat16)
        return model if method == "full" else add_adapter(model, Recipe(steps=1, method=method), "bench")

    def text(self, mean: int, vocabulary: int, number: int = 0) -> Packed:
        """Random tokens in documents of about so many; 0: one document."""
        rng, size = np.random.default_rng(number), 20_000 if self.small else 3_000_000
        sizes = np.maximum(8, rng.exponential(mean, 4 * size // mean).astype(int)) if mean else np.array([size])
        starts = np.append(0, np.cumsum(sizes))
        return Packed(
            rng.integers(1, min(vocabulary, 120 if self.small else vocabulary), size).astype(np.uint16), starts[starts < size - 8], 0
        )

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        free, there = torch.cuda.mem_get_info()
        beside = there - free - torch.cuda.memory_reserved()
        return {"reserved MB": torch.cuda.max_memory_reserved() / 1e6, "beside MB": beside / 1e6}

    def rate(self, model: Any, packed: Packed | list[Packed], recipe: Recipe, warm: int = 4, steps: int = 8) -> dict[str, float]:
        """Tokens per second of steps after the first ones, of the real loop, and the seconds of the first."""
        warm, steps = (1, 1) if self.small else (warm, steps)
        marks: list[float] = []

        def tick(what: str, done: float, *_: Any) -> None:
            step = done // (recipe.batch * recipe.length) if what.startswith("train on ") else 0
            if step in (1, warm, warm + steps):
                self.sync()
                marks.extend([time.perf_counter()] * (2 if step == warm == 1 else 1))
            if step == warm + steps:
                raise Enough

        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as work, contextlib.suppress(Enough):
            if isinstance(packed, list):
                together.run(model, packed, recipe, Path(work), lambda *_, **__: None, tick)
            else:
                loop.run(model, packed, recipe, Path(work), lambda **_: None, tick)
        tokens = steps * recipe.batch * recipe.length * recipe.together
        return {"tokens/s": tokens / (marks[2] - marks[1]), "first step s": marks[0] - began}


@contextlib.contextmanager
def worth(operations: float) -> Iterator[None]:
    """Compile runs from so many operations on."""
    before, compiled.WORTH = compiled.WORTH, operations
    try:
        yield
    finally:
        compiled.WORTH = before


# ---- the measurements -----------------------------------------------------------------------------------------------


def placement(bench: Bench) -> None:
    for method in ("full", "lora"):
        model, seen = bench.model(SMOL, method), set[tuple[str, str]]()
        recipe = Recipe(steps=2, method=method, batch=2, length=bench.length)
        for layer in compiled.layers_of(loop.base_model(model)):
            layer.register_forward_hook(lambda _, __, y, seen=seen: seen.add((y.device.type, str(y.dtype))))
        losses: list[float] = []
        with tempfile.TemporaryDirectory() as work:
            done = loop.run(model, bench.text(20, 49_000), recipe, Path(work), lambda losses=losses, **facts: losses.append(facts["loss"]))
        where = {weight.device.type for weight in model.parameters()} | {device for device, _ in seen}
        bench.say(measured="placement", method=method, devices=sorted(where), activations=sorted({dtype for _, dtype in seen}),
                  packed=done.able.packed, chunked=done.able.chunked, losses=losses, right=where == {bench.device.type})  # fmt: skip


def train(bench: Bench) -> None:
    rows = (("full", 700, SMOL), ("full", 0, SMOL), ("lora", 700, SMOL), ("lora", 0, SMOL), ("full", 700, "30M"))
    for method, mean, name in rows:
        about = {"measured": "train", "model": name, "method": method, "documents": mean or "one a row"}
        with bench.attempt(**about):
            model = bench.model(name, method)
            recipe = Recipe(steps=LONG_RUN, method=method, batch=bench.batch, length=bench.length)
            share = find_share(loop.base_model(model), bench.length) or 0
            found = bench.rate(model, bench.text(mean, 8_000 if name == "30M" else 49_000), recipe)
            bench.say(**about, batch=recipe.batch, length=recipe.length, **found, MFU=found["tokens/s"] * share, **bench.memory())
        model = None
    for method in ("full", "lora"):  # without the compiler, as short runs are
        bench.clear()
        recipe = Recipe(steps=2, method=method, batch=max(2, bench.batch // 2), length=bench.length)
        with worth(float("inf")):
            found = bench.rate(bench.model(SMOL, method), bench.text(700, 49_000), recipe.model_copy(update={"steps": LONG_RUN}), 2, 4)
        bench.say(measured="train uncompiled", model=SMOL, method=method, batch=recipe.batch, **found, **bench.memory())


def folding(bench: Bench) -> None:
    packed = bench.text(700, 49_000)
    packed = Packed(np.tile(packed.tokens[:40_000], 4), np.arange(0, 160_000, 1_000), 0) if not bench.small else packed
    recipe = Recipe(steps=4 if bench.small else 80, method="lora", batch=max(2, bench.batch // 4), length=bench.length, learning_rate=3e-3)
    for folded in (1000, 0):
        bench.clear()
        losses: list[float] = []
        before, adapter.FOLDED = adapter.FOLDED, folded
        with worth(0.0), tempfile.TemporaryDirectory() as work:
            loop.run(bench.model(SMOL, "lora"), packed, recipe, Path(work), lambda losses=losses, **facts: losses.append(facts["loss"]))
        adapter.FOLDED = before
        bench.say(measured="folding", folded=bool(folded), steps=recipe.steps, first=losses[0], middle=losses[len(losses) // 2],
                  last=sum(losses[-10:]) / len(losses[-10:]))  # fmt: skip


def peers(bench: Bench, names: tuple[str, ...]) -> None:
    """Each in a process of its own; its lines as they come."""
    bench.clear()
    with tempfile.TemporaryDirectory() as folder:
        (config := Path(folder) / "config.json").write_text(json.dumps(bench.config(SMOL).to_dict()))
        for name in names:
            words = [bench.peers, "-m", "benches.gpu_peers", name, "--device", str(bench.device), "--config", str(config)]
            with Popen([*words, *(["--small"] if bench.small else [])], cwd=ROOT, stdout=PIPE, text=True) as process:
                try:
                    for line in process.stdout or ():
                        bench.say(**{key: value for key, value in json.loads(line).items() if key != "bench"})
                finally:
                    process.kill()  # which has ended, or has no more time
            if bench.small and process.returncode:
                raise RuntimeError(f"{name} ended with {process.returncode}")


def in_four_bits(bench: Bench, name: str) -> Any:
    """A model of random weights, its linear layers in four bits, made on the device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        model = new_model_of(bench.config(name), torch.bfloat16)
        pack_linear(model)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, weight in [(key, weight) for key, weight in module._parameters.items() if weight is not None]:
            if type(module) is Linear4bit and key == "weight":
                value = torch.randn(module.out_features, module.in_features, device=bench.device, dtype=torch.bfloat16) * 0.02
                packed = Params4bit(value, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module)
                module.weight = packed.to(bench.device)
            else:
                value = torch.randn(weight.shape, device=bench.device, dtype=weight.dtype) * 0.02
                made.setdefault(id(weight), nn.Parameter(value if weight.ndim > 1 else torch.ones_like(value), requires_grad=False))
                module._parameters[key] = made[id(weight)]
    return add_adapter(model, Recipe(steps=1, method="qlora"), "bench")


def qlora(bench: Bench) -> None:
    for share in (0.0, 0.125, 1.0):
        about = {"measured": "qlora", "model": OPT, "checkpointed": share}
        with bench.attempt(**about):
            model = in_four_bits(bench, OPT)
            bench.clear()  # what packing took
            more = {"checkpointing": True, "checkpointed": share} if share else {}
            recipe = Recipe(steps=LONG_RUN, method="qlora", batch=1, length=bench.length, **more)
            found = bench.rate(model, bench.text(700, 50_000), recipe, 3, 10)
            bench.say(**about, **found, **bench.memory())
        model = None


def at_once(bench: Bench) -> None:
    experts = 3 if bench.small else 16
    for length in (bench.length // 4, bench.length):
        recipe = Recipe(steps=LONG_RUN, method="lora", batch=1, length=length)
        bench.clear()
        alone = bench.rate(bench.model(SMOL, "lora"), bench.text(700, 49_000), recipe, 4, 12)
        bench.clear()
        parts = [bench.text(700, 49_000, number) for number in range(experts)]
        found = bench.rate(bench.model(SMOL, "lora"), parts, recipe.model_copy(update={"together": experts}), 3, 6)
        bench.say(measured="together", experts=experts, rows=1, length=length, alone=alone["tokens/s"], **found,
                  ratio=found["tokens/s"] / alone["tokens/s"], **bench.memory())  # fmt: skip


def fit(bench: Bench) -> None:
    """Predictions for what was measured before, in the same order."""
    runs: list[tuple[Any, Recipe, dict[str, Any]]] = []
    for line in LINES:
        if "reserved MB" not in line or line["measured"] not in ("train uncompiled", "qlora"):
            continue
        method = line.get("method", "qlora")
        share = line.get("checkpointed") or 0
        recipe = Recipe(
            steps=2, method=method, batch=line.get("batch", 1), length=bench.length, checkpointing=share > 0, checkpointed=share or 1
        )
        runs.append((bench.config(line["model"]), recipe, line))
    for (_, _, line), parts in zip(runs, rehearse(*((config, recipe) for config, recipe, _ in runs)) if runs else (), strict=True):
        took = line["reserved MB"] + line["beside MB"]
        said = sum(parts.values()) / 1e6 if parts else 0.0
        about = {key: line[key] for key in ("model", "method", "batch", "checkpointed") if key in line}
        bench.say(measured="fit", **about, **{"predicted MB": said, "measured MB": took, "error": said / took - 1, "parts": parts})


def apart(bench: Bench, what: str, limit: float) -> None:
    """Decoding or scoring: models and stores of their own."""
    from benches import gpu_decode

    gpu_decode.say = lambda _, **facts: bench.say(**facts)
    getattr(gpu_decode, f"measure_{what}")(str(bench.device), bench.small, limit)


def forest(bench: Bench) -> None:
    from benches import gpu_forest

    gpu_forest.say = lambda _, **facts: bench.say(**facts)
    gpu_forest.measure_forest(str(bench.device), bench.small, bench.texts, 30_000_000, 8_000_000)


MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "placement": placement, "train": train, "qlora": qlora, "together": at_once, "folding": folding,
    "decode": partial(apart, what="decode", limit=40), "scoring": partial(apart, what="scoring", limit=30), "fit": fit,
    "trainer": partial(peers, names=("trainer", "liger")), "trl": partial(peers, names=("trl",)),
    "unsloth": partial(peers, names=("unsloth",)), "compiled": partial(peers, names=("compiled",)), "forest": forest,
}  # fmt: skip


# ---- the summary ----------------------------------------------------------------------------------------------------


def summary() -> list[dict[str, Any]]:
    """Each goal of a card that was measured."""

    def best(measured: str, field: str, **wanted: Any) -> float | None:
        values = [line[field] for line in LINES if line.get("measured") == measured and wanted.items() <= line.items() and field in line]
        return max(values, default=None)

    full, lora = (best("train", "tokens/s", model=SMOL, method=method) for method in ("full", "lora"))
    rows: list[tuple[str, float | None, str, float]] = [
        (f"MFU, {method}", best("train", "MFU", model=SMOL, method=method), "at least", 0.4) for method in ("full", "lora")
    ]
    rows.append(("MFU, seed of 30M", best("train", "MFU", model="30M"), "at least", 0.4))
    rows.append(("LoRA / full", lora and full and lora / full, "at least", 1.0))
    for method, ours in (("full", full), ("lora", lora)):
        for name, goal in (("trainer", 1.5), ("liger", 1.5), ("compiled", 1.5), ("trl", 1.0), ("unsloth", 1.0)):
            theirs = best("peer", "tokens/s", method=method, peer=name)
            rows.append((f"{method} / {name}", ours and theirs and ours / theirs, "at least", goal))
    small = [line for line in LINES if line.get("measured") == "qlora" and line.get("reserved MB", 1e9) + line.get("beside MB", 0) < 12_000]
    rows.append(("QLoRA under 12 GB, tokens/s", max((line["tokens/s"] for line in small), default=None), "at least", 6000))
    rows.append(("16 together / in turn", best("together", "ratio"), "at least", 4.0))
    return [
        {"what": what, "measured": value, "goal": f"{side} {goal:g}", "reached": value >= goal} for what, value, side, goal in rows if value
    ]


def stop(_: int, __: FrameType | None) -> None:
    raise TimeoutError("no more time for it")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default=str(best_device()))
    options.add_argument("--small", action="store_true", help="tiny models and few steps: that it runs")
    options.add_argument("--only", type=words, default=[name for name in MEASUREMENTS if name != "compiled"])
    options.add_argument("--limit", type=int, default=90, help="seconds for each measurement")
    options.add_argument("--text", nargs="+", default=["sample"], help="of the forest: prepared, and of at most 50 MB")
    options.add_argument("--peers", default=sys.executable, help="a Python that has other trainers")
    options.add_argument("--out", help="a file that gets the lines too")
    asked = options.parse_args()
    bench, began = Bench(asked), time.perf_counter()
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else bench.device.type
    bench.say(measured="machine", device=name, torch=torch.__version__, small=bench.small)
    loop.EVERY = 1e9  # checkpoints cost what SHARE allows, and are not measured here
    signal.signal(signal.SIGALRM, stop)
    failed = False
    for what in asked.only:
        signal.alarm(asked.limit * (2 if what == "forest" else 1))
        try:
            MEASUREMENTS[what](bench)
        except (Exception, TimeoutError) as error:  # a line like others: the next measurement still runs
            failed = True
            bench.say(measured=what, error=f"{type(error).__name__}: {str(error)[:400]}")
        finally:
            signal.alarm(0)
    bench.say(measured="summary", rows=[] if bench.small else summary(), seconds=time.perf_counter() - began)
    sys.exit(1 if failed and bench.small else 0)


if __name__ == "__main__":
    main()
