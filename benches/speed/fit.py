"""What `fit` predicts against what runs take: peak memory and tokens per second, each run in a separate process.

    python -m benches.speed.fit [--quick] [--recipes] [--apart]
    python -m benches.speed.fit --mixture              four experts of random weights in one mixture, routers tuned and more
    python -m benches.speed.fit --opt [--small]        OPT-6.7B of random weights as QLoRA at 2,048 tokens, on a GPU; --small: shrunk, here
    python -m benches.speed.fit --rehearsal            the same rehearsed without a GPU, beside what an H100 took for PEFT's forward pass

One JSON line per run; "error" is predicted / measured - 1. The constants of elmwood/train/fit/formulas.py were fitted to the runs marked
"fitted" (one thread, glibc, x86); those marked "apart" were not used. --recipes runs only those that are neither full nor plain lora,
--apart only those that nothing was fitted to. With MALLOC_MMAP_THRESHOLD_=1000000 in the environment each tensor is mapped separately: no
constant of the allocator is used, and the sum of the counted tensors is compared with the peak. Memory can be measured beside other
processes, speed (CPU seconds) less so. --opt needs 30 GB of disk and 16 of memory.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers import AutoConfig

from benches.common import parser, say
from elmwood.lm.devices import best_device
from elmwood.lm.load import seed_folder
from elmwood.merge.moe.build import LOW, Mixing, Parts, write
from elmwood.merge.moe.gates import layers_of, random_rows
from elmwood.merge.moe.shards import Shards
from elmwood.merge.states import seed_places
from elmwood.records import Gates, Mixture, Recipe
from elmwood.store import Store
from elmwood.train import adapter
from elmwood.train.card import precision
from elmwood.train.fit.formulas import anatomy, components, leaves_holes, speed
from elmwood.train.fit.gpu_table import SEEDS
from elmwood.train.fit.measure import measure, predict_peak, random_seed
from elmwood.train.fit.mixture import fit_mixture
from elmwood.train.fit.predict import rehearsed
from elmwood.train.fit.rehearsal import rehearse_here
from elmwood.train.loss import CHUNK


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
    "llama 21M": like("llama", 384, 1056, 8, 6, 8192),
}
RUNS: list[tuple[str, dict, str]] = [
    ("llama 0.9M", {"batch": 8, "method": "full"}, "fitted"),
    ("llama 0.9M", {"batch": 8, "method": "lora"}, "fitted"),
    ("llama 0.9M", {"batch": 32, "method": "full"}, "fitted"),
    ("llama 5.9M", {"batch": 8, "method": "full"}, "fitted"),
    ("llama 5.9M", {"batch": 8, "method": "lora"}, "fitted"),
    ("llama 43M", {"batch": 1, "length": 128, "method": "full"}, "fitted"),
    ("llama 43M", {"batch": 2, "method": "full"}, "fitted"),
    ("llama 43M", {"batch": 2, "method": "lora"}, "fitted"),
    ("llama 43M", {"batch": 4, "length": 512, "method": "lora"}, "fitted"),
    ("llama 5.9M", {"batch": 2, "length": 1024, "method": "lora"}, "apart"),
    ("gpt2 29M", {"batch": 4, "method": "full"}, "apart"),
    ("gpt2 29M", {"batch": 4, "method": "lora"}, "fitted"),
    ("opt 17M", {"batch": 8, "method": "full"}, "apart"),
    ("opt 17M", {"batch": 2, "length": 1024, "method": "lora"}, "apart"),
    ("qwen3 14M", {"batch": 4, "length": 512, "method": "full"}, "apart"),
    ("llama 43M", {"batch": 2, "method": "qlora"}, "fitted"),
    ("llama 43M", {"batch": 2, "method": "dora"}, "fitted"),
    ("llama 43M", {"batch": 4, "length": 512, "method": "lora", "checkpointing": True}, "fitted"),
    ("llama 43M", {"batch": 4, "length": 512, "method": "lora", "late": 0.34}, "apart"),
    ("opt 17M", {"batch": 4, "length": 512, "method": "qlora"}, "fitted"),
    ("qwen3 14M", {"batch": 4, "length": 512, "method": "qlora"}, "apart"),
    ("llama 5.9M", {"batch": 8, "method": "qlora"}, "apart"),
    ("gpt2 29M", {"batch": 2, "length": 512, "method": "lora"}, "apart"),
    ("qwen3 14M", {"batch": 4, "length": 512, "method": "dora"}, "apart"),
    ("opt 17M", {"batch": 4, "length": 512, "method": "full", "checkpointing": True}, "apart"),
    ("llama 43M", {"batch": 2, "method": "full", "optimiser": "adamw8bit"}, "apart"),
    ("llama 43M", {"batch": 8, "length": 512, "method": "lora", "accumulate": 4}, "apart"),
    ("llama 5.9M", {"batch": 1, "method": "lora", "together": 8}, "apart"),
]
OPT = {"batch": 1, "length": 2048, "method": "qlora"}
# model, layout, top-k of four experts, recipe
MIXTURES: list[tuple[str, str, int, dict, str]] = [
    ("llama 21M", "checkpoint", 2, {"tuned": "routers", "batch": 4}, "fitted"),
    ("llama 21M", "checkpoint", 2, {"tuned": "norms", "batch": 4}, "fitted"),
    ("llama 21M", "checkpoint", 2, {"tuned": "shared", "batch": 4}, "fitted"),
    ("llama 21M", "checkpoint", 2, {"tuned": "everything", "batch": 4}, "fitted"),
    ("llama 21M", "checkpoint", 4, {"tuned": "routers", "batch": 2}, "apart"),
    ("llama 21M", "low-rank", 2, {"tuned": "routers", "batch": 4}, "fitted"),
    ("llama 5.9M", "checkpoint", 2, {"tuned": "everything", "batch": 16}, "apart"),
    ("llama 5.9M", "checkpoint", 2, {"tuned": "routers", "batch": 16}, "apart"),
    ("llama 5.9M", "low-rank", 2, {"tuned": "routers", "batch": 4, "length": 1024}, "apart"),
    ("qwen3 14M", "checkpoint", 2, {"tuned": "routers", "batch": 2, "length": 512}, "apart"),
    ("qwen3 14M", "checkpoint", 2, {"tuned": "everything", "batch": 8, "length": 512, "accumulate": 4}, "apart"),
]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="the smallest model alone")
    arguments.add_argument("--recipes", action="store_true")
    arguments.add_argument("--apart", action="store_true", help="only those that no constant was fitted to")
    arguments.add_argument("--opt", action="store_true")
    arguments.add_argument("--small", action="store_true")
    arguments.add_argument("--mixture", action="store_true")
    arguments.add_argument("--rehearsal", action="store_true")
    options = arguments.parse_args()
    if options.mixture:
        for name, layout, top_k, how, kind in MIXTURES:
            if not (options.apart and kind != "apart"):
                mixture(name, layout, top_k, Recipe(steps=2, method="router", **how), kind)
        return
    if options.rehearsal:
        rehearsal()
        return
    if options.opt:
        config = AutoConfig.for_model(**SEEDS["7B (OPT-6.7B)"] | {"dtype": "bfloat16"})
        if options.small:
            config.hidden_size = config.word_embed_proj_dim = 256
            config.ffn_dim, config.num_hidden_layers, config.num_attention_heads = 1024, 4, 4
        for more in ({}, {"checkpointing": True}):
            one("opt 6.7B" + (", shrunk" if options.small else ""), config, Recipe(steps=2, **OPT | more), "apart", best_device().type)
        return
    for name, how, kind in RUNS:
        if options.apart and kind != "apart":
            continue
        if (options.quick and name != "llama 0.9M") or (
            options.recipes and how["method"] in ("full", "lora") and set(how) <= {"batch", "length", "method"}
        ):
            continue
        config = AutoConfig.for_model(**MODELS[name], bos_token_id=0, eos_token_id=0, pad_token_id=None)
        one(name, config, Recipe(steps=2, **how), kind, "cpu")


def rehearsal() -> None:
    """OPT-6.7B as QLoRA on a pretended GPU: by our forward pass, and by PEFT's under autocast, which was measured on an H100."""
    config = AutoConfig.for_model(**SEEDS["7B (OPT-6.7B)"] | {"dtype": "bfloat16"})
    for pass_ in ("ours", "PEFT's under autocast"):
        if pass_ != "ours":  # as it was when it was measured
            adapter.fuse = lambda adapted: None
            precision.is_narrow = lambda model: False
            CHUNK["gpu"] = 1 << 26
        for checkpointing, measured in ((False, 20_672), (True, 8_523)):
            recipe, began = Recipe(steps=2, **OPT, checkpointing=checkpointing), time.process_time()
            parts = rehearse_here(config, recipe)
            found = {} if pass_ == "ours" else {"measured MB": measured, "error": round(sum(parts.values()) / measured / 1e6 - 1, 3)}
            say("rehearsal", **{
                "pass": pass_, "checkpointing": checkpointing, "total MB": round(sum(parts.values()) / 1e6), **found,
                "components MB": {what: round(size / 1e6) for what, size in parts.items()}, "CPU s": round(time.process_time() - began, 1),
            })  # fmt: skip


def one(name: str, config: object, recipe: Recipe, kind: str, device: str) -> None:
    """Two steps; peak and speed, predicted and measured."""
    body = anatomy(config)
    parts = (rehearsed(config, recipe) if device != "cpu" else None) or components(body, recipe, device)
    predicted = speed(body, recipe, device)
    found = measure(config, recipe, device=device)
    total = predict_peak(parts, found)
    say("fit", **{
        "model": name, **recipe.model_dump(exclude_defaults=True, exclude={"steps"}), "kind": kind, "device": device,
        "allocator": "heap" if leaves_holes(device) else "mapped",
        "predicted MB": round(total / 1e6), "peak MB": round(found.peak / 1e6), "error": round(total / found.peak - 1, 3),
        "predicted tokens/s": round(predicted), "tokens/s": round(found.tokens_per_second),
        "speed error": round(predicted / found.tokens_per_second - 1, 3), 
        "components MB": {what: round(size / 1e6, 1) for what, size in parts.items()},
    })  # fmt: skip


def mixture(name: str, layout: str, top_k: int, recipe: Recipe, kind: str) -> None:
    """Two steps of tuning; peak and speed, predicted and measured."""
    config = AutoConfig.for_model(**MODELS[name], bos_token_id=0, eos_token_id=0, pad_token_id=None)
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        made = random_mixture(config, layout, top_k, store)
        fitted, found = fit_mixture(made, recipe, store, device="cpu"), measure(made, recipe, store)
    total = predict_peak(fitted.components, found)
    say("fit", **{
        "mixture of 4": name, "layout": layout, "top_k": top_k,
        **recipe.model_dump(exclude_defaults=True, exclude={"steps", "method"}), "tuned": recipe.tuned, "kind": kind,
        "allocator": "heap" if leaves_holes("cpu") else "mapped", "parameters": fitted.parameters, "trained": fitted.trained,
        "predicted MB": round(total / 1e6), "peak MB": round(found.peak / 1e6), "error": round(total / found.peak - 1, 3),
        "CPU seconds per million tokens, predicted": round(1e6 / (fitted.tokens_per_second or 1)),
        "CPU seconds per million tokens": round(1e6 / found.tokens_per_second),
        "speed error": round((fitted.tokens_per_second or 1) / found.tokens_per_second - 1, 3),
        "components MB": {what: round(size / 1e6, 1) for what, size in fitted.components.items()},
    })  # fmt: skip


def random_mixture(config: object, layout: str, top_k: int, store: Store, experts: int = 4, rank: int = 16) -> Mixture:
    """As many copies of a random seed's feed-forward, or random factors over it; random gates."""
    seed = random_seed(config, store)
    folder, tensors, gates = store.root / "work" / "mixture", seed_places(seed, store), Gates(kind="random", top_k=top_k)
    rows = random_rows(tensors, [str(e) for e in range(experts)], 0, 50.0)
    if layout == "checkpoint":
        config_of_seed = json.loads((seed_folder(seed, store) / "config.json").read_bytes())
        write(Parts(seed.digest, config_of_seed, tensors, [], (seed.digest,) * experts), rows, Mixing(gates=gates), folder, lambda *_: None)
    else:
        shape = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size, "down_proj": config.hidden_size}
        wide = {"gate_proj": config.hidden_size, "up_proj": config.hidden_size, "down_proj": config.intermediate_size}
        values = {f"{layer}.mlp.gate.weight": row_EH for layer, row_EH in rows.items()}
        for layer in layers_of(tensors):
            for e in range(experts):
                for part in shape:
                    top = f"{layer}.mlp.experts.{e}.{part}"
                    values |= {f"{top}.lora_A": np.full((rank, wide[part]), 0.01), f"{top}.lora_B": np.full((shape[part], rank), 0.01)}
        shards = Shards([(one, "F32", value.shape) for one, value in values.items()], folder, len(rows), "mixture")
        for one, value in values.items():
            shards.put_numbers(one, value)
        shards.close()
        (folder / LOW).write_text(json.dumps({"experts": experts, "top_k": top_k}))
    made = Mixture(
        seed=seed.digest, forest=seed.digest, experts=(seed.digest,) * experts, gates=gates, layout=layout, method="seed",
        files=store.put_folder(folder),
    )  # fmt: skip
    store.add(made)
    return made


if __name__ == "__main__":
    main()
