"""What `fit` predicts against what runs take: peak resident memory and tokens per CPU second, each run in a process of its own.

    python benches/bench_fit.py [--quick]

One JSON line per run; "error" is predicted / measured - 1. The constants of elmwood/train/fit.py were chosen on these very runs (one
thread, glibc, x86), so the lines marked "apart" are the honest ones: they were not used.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM

from elmwood.corpus.tokens import Packed
from elmwood.records import Recipe
from elmwood.train import loop
from elmwood.train.adapter import adapter
from elmwood.train.fit import anatomy, components, speed

WARM = 3  # steps not counted


def like(kind: str, width: int, forward: int, layers: int, heads: int, vocabulary: int, **more: int) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return {"model_type": kind} | dict(zip(names, (width, forward, layers, heads, heads, vocabulary), strict=True)) | more


MODELS = {
    "llama 0.9M": like("llama", 128, 352, 3, 4, 2048),
    "llama 5.9M": like("llama", 256, 704, 6, 8, 4096),
    "llama 43M": like("llama", 512, 1408, 12, 8, 8192),
    "gpt2 29M": {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 1024, "vocab_size": 8192},
    "opt 17M": like("opt", 384, 0, 8, 6, 8192, ffn_dim=1536, word_embed_proj_dim=384),
    "qwen3 14M": like("qwen3", 320, 960, 10, 8, 8192, head_dim=40),
}
RUNS = [
    ("llama 0.9M", 8, 256, "full", "fitted"),
    ("llama 0.9M", 8, 256, "lora", "fitted"),
    ("llama 0.9M", 32, 256, "full", "fitted"),
    ("llama 5.9M", 8, 256, "full", "fitted"),
    ("llama 5.9M", 8, 256, "lora", "fitted"),
    ("llama 43M", 1, 128, "full", "fitted"),
    ("llama 43M", 2, 256, "full", "fitted"),
    ("llama 43M", 2, 256, "lora", "fitted"),
    ("llama 43M", 4, 512, "lora", "fitted"),
    ("llama 5.9M", 2, 1024, "lora", "apart"),
    ("gpt2 29M", 4, 256, "full", "apart"),
    ("gpt2 29M", 4, 256, "lora", "apart"),
    ("opt 17M", 8, 256, "full", "apart"),
    ("opt 17M", 2, 1024, "lora", "apart"),
    ("qwen3 14M", 4, 512, "full", "apart"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model alone")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        return one(*RUNS[options.run][:4])
    for number, (name, batch, length, method, kind) in enumerate(RUNS):
        if options.quick and name != "llama 0.9M":
            continue
        command = [sys.executable, "-W", "ignore", __file__, "--run", str(number)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        facts = {"bench": "fit", "model": name, "batch": batch, "length": length, "method": method, "kind": kind}
        print(json.dumps(facts | found), flush=True)


def one(name: str, batch: int, length: int, method: str) -> None:
    """A run of a few steps; its peak and its speed, predicted before it starts."""
    recipe = Recipe(steps=8, batch=batch, length=length, method=method)
    config = AutoConfig.for_model(**MODELS[name], bos_token_id=0, eos_token_id=0, pad_token_id=None)
    body = anatomy(config)
    parts = components(body, recipe, "cpu")
    model = AutoModelForCausalLM.from_config(config)
    if method == "lora":
        model = adapter(model, recipe, "bench")
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, 100_000).astype(np.uint16)
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        packed = Packed(tokens, np.arange(0, len(tokens), 700), 0)
        loop.run(model, packed, recipe, Path(work), lambda **_: None, lambda *_: marks.append(time.process_time()))
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) * 1024
    measured = batch * length * (len(marks) - WARM) / (marks[-1] - marks[WARM - 1]) * recipe.threads
    predicted = speed(body, recipe, "cpu")
    found = {
        "predicted MB": round(sum(parts.values()) / 1e6),
        "peak MB": round(peak / 1e6),
        "error": round(sum(parts.values()) / peak - 1, 3),
        "predicted tokens/s": round(predicted),
        "tokens/CPU s": round(measured),
        "speed error": round(predicted / measured - 1, 3),
        "components MB": {what: round(size / 1e6, 1) for what, size in parts.items()},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
