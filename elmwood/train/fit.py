"""Will it fit, and how long will it take? A formula per component, from the config alone: no weights are needed.

N tokens of a step, D width, F width of a feed-forward layer, Q width of all heads, V vocabulary
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from elmwood.errors import BadSeed
from elmwood.lm.load import best_device, seed_folder
from elmwood.records import Frozen, Recipe, Seed
from elmwood.store import Store
from elmwood.train.loop import threads
from elmwood.train.loss import CHUNK, ROWS

FLOAT = 4  # bytes
# Bytes beside the tensors. CPU: what the libraries grow by at the first step. CUDA: a context and its libraries, not measured yet.
BESIDE = {"cpu": 45_000_000, "cuda": 600_000_000}
# glibc keeps freed pieces that nothing fits into: how much of activations and gradients stands twice (measured, benches/bench_fit.py)
KEPT = {"cpu": (0.45, 0.55), "cuda": (0.05, 0.05)}
# times each kept activation is read or written in a step, beside matrix products (the same bench); adapters read them once more
TRAFFIC = {"full": 22, "lora": 32}


class Anatomy(NamedTuple):
    """What the formulas need to know of a model."""

    parameters: int
    layers: int
    width: int  # D
    heads: int  # Q
    feed_forward: int  # F
    branches: int  # numbers kept of a feed-forward layer for each of its F
    rms: bool  # norms without bias, which keep the normalised values
    query_norms: bool  # queries and keys have norms too
    vocabulary: int
    context: int
    matrices: int  # weights of the linear layers of the trunk
    linears: int
    ends: int  # rows and columns of these matrices, summed: an adapter of rank r has r times as many weights


class Fit(Frozen):
    """A prediction, in bytes and seconds. `components` stand at the peak and sum to `total`."""

    device: str
    parameters: int
    trained: int
    components: dict[str, int]
    total: int
    memory: int  # there is, or was asked about
    fits: bool
    tokens_per_second: float
    largest: dict[str, int]  # batch, length or rank that would still fit, the others as they are; 0: none
    verdict: str


def fit(seed: Seed | str, recipe: Recipe, store: Store | None = None, *, memory: int | None = None) -> Fit:
    """What training this seed by this recipe takes on this machine, or on one with `memory` bytes.

    `seed` is a record (then `store` has it), a folder with a config.json, or a model hub's id. Raises BadSeed.
    """
    device = best_device().type
    if isinstance(seed, Seed):
        folder: Path | str = seed_folder(seed, store or Store(Path(".elmwood")))
    else:
        folder = Path(seed).expanduser() if Path(seed).expanduser().exists() else seed
    config = _config(folder)
    body = anatomy(config)
    parts = components(body, recipe, device)
    total, there = sum(parts.values()), machine_memory(device) if memory is None else memory
    largest = {
        what: _largest(body, recipe, device, there, what) for what in ("batch", "length", "rank")[: 3 if recipe.method == "lora" else 2]
    }
    return Fit(
        device=device, parameters=body.parameters, trained=trained(body, recipe), components=parts, total=total, memory=there,
        fits=total <= there, tokens_per_second=speed(body, recipe, device), largest=largest,
        verdict=_verdict(body, recipe, device, total, there, largest),
    )  # fmt: skip


# ---- the formulas -----------------------------------------------------------------------------------------------


def components(body: Anatomy, recipe: Recipe, device: str) -> dict[str, int]:
    """Bytes at the peak: at the end of the forward pass, or, where gradients outweigh activations, at the end of the backward pass."""
    own, low = trained(body, recipe), FLOAT if device == "cpu" else 2  # frozen weights and activations are bf16 on a GPU
    gradients = own * FLOAT
    kept = activations(body, recipe) * low + recipe.batch * recipe.length**2 * low  # the mask of packed documents, once
    rows = min(recipe.batch * recipe.length, max(ROWS, CHUNK[device] // body.vocabulary))
    head = body.vocabulary * body.width * FLOAT if recipe.method == "full" else 0  # its gradient stands before the others
    first, second = kept + head, gradients
    again, more = KEPT[device]
    peak = max(first + again * first + more * gradients, second + again * first)
    return {
        "framework": _resident() + BESIDE[device] if device == "cpu" else BESIDE[device],
        "weights": body.parameters * (FLOAT if recipe.method == "full" else low) + (own * FLOAT if recipe.method == "lora" else 0),
        "optimiser": 2 * own * FLOAT,
        "activations": kept if first >= second else 0,
        "gradients": head if first >= second else gradients,
        "logits": 3 * rows * body.vocabulary * FLOAT,
        "allocator": round(peak) - max(first, second),
    }


def trained(body: Anatomy, recipe: Recipe) -> int:
    """Weights that are trained."""
    return body.parameters if recipe.method == "full" else recipe.rank * body.ends


def activations(body: Anatomy, recipe: Recipe) -> int:
    """Numbers kept for the backward pass, mask and loss aside.

    Of a layer: each norm's input and output (a trained RMS norm its normalised values too); queries, keys, values and what attention
    gives; of the feed-forward layer what its activation needs.
    """
    full = recipe.method == "full"
    norm = (3 if body.rms and full else 2) * body.width
    layer = 2 * norm + 4 * body.heads + body.branches * body.feed_forward
    layer += (4 if full else 2) * body.heads if body.query_norms else 0
    low = 0 if full else recipe.rank * body.linears
    return recipe.batch * recipe.length * (body.layers * layer + norm + low + body.width)


def anatomy(config: Any) -> Anatomy:
    """Counted on a model without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text, head = config.get_text_config(), model.get_output_embeddings()
    layers, width = text.num_hidden_layers, text.hidden_size
    # every matrix of the trunk but embeddings: nn.Linear, and GPT-2's Conv1D
    shapes = [
        tuple(module.weight.shape)
        for module in model.modules()
        if module is not head and not isinstance(module, nn.Embedding) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    forward = next((size for size in (getattr(text, name, None) for name in names) if size), 4 * width)
    return Anatomy(
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=layers,
        width=width,
        heads=text.num_attention_heads * (getattr(text, "head_dim", None) or width // text.num_attention_heads),
        feed_forward=forward,
        branches=_branches(text, sum(forward in shape for shape in shapes) >= 3 * layers),
        rms=not any(isinstance(module, nn.LayerNorm) for module in model.modules()),
        query_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None) or 1 << 20,
        matrices=sum(rows * columns for rows, columns in shapes),
        linears=len(shapes),
        ends=sum(rows + columns for rows, columns in shapes),
    )


def _branches(text: Any, gated: bool) -> int:
    """Gated: the gate, its activation, the other branch, their product. Else before and after the activation, which ReLU needs once."""
    activation = str(getattr(text, "activation_function", None) or getattr(text, "hidden_act", ""))
    return 4 if gated else {"relu": 1, "gelu_new": 5, "gelu_fast": 5}.get(activation, 2)  # the last two are made of several operations


def speed(body: Anatomy, recipe: Recipe, device: str) -> float:
    """Tokens per second: the arithmetic by the speed of a matrix product, the rest by the speed of memory, both measured here briefly."""
    passes = 3 if recipe.method == "full" else 2  # forward, gradient of the inputs, gradient of the weights
    head = body.vocabulary * body.width
    attention = 2 * body.layers * body.heads * recipe.length * 4.5  # the backward pass computes the scores again, and small heads are slow
    flops = 2 * passes * (body.matrices + head) + 6 * (trained(body, recipe) if recipe.method == "lora" else 0) + 2 * attention
    traffic = TRAFFIC[recipe.method] * FLOAT * activations(body, recipe) / (recipe.batch * recipe.length) + 6 * FLOAT * body.vocabulary
    step = 7 * FLOAT * trained(body, recipe) / (recipe.batch * recipe.length)  # AdamW reads four numbers per weight and writes three
    with threads(recipe.threads):
        product, memory = _probe(body, recipe, device)
    return 1 / (flops / product + (traffic + step) / memory)


def _probe(body: Anatomy, recipe: Recipe, device: str) -> tuple[float, float]:
    """Floating-point operations and bytes per second of tensors of this model's size, in some tenths of a second."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    most = 1024 if device == "cpu" else 8192  # larger ones are no faster
    tokens, width, forward = (min(most, one) for one in (recipe.batch * recipe.length, body.width, body.feed_forward))
    x_ND, weight_FD = (torch.ones(rows, width, dtype=dtype, device=device) for rows in (tokens, forward))
    y_NF = torch.ones(tokens, forward, dtype=dtype, device=device)
    product = _rate(lambda: torch.mm(x_ND, weight_FD.t(), out=y_NF), device) * 2 * tokens * weight_FD.numel()
    memory = _rate(lambda: nn.functional.silu(y_NF) * y_NF, device) * 5 * y_NF.nbytes
    return product, memory


def _rate(work: Callable[[], Any], device: str) -> float:
    """Calls per second, by the fastest of some. On a CPU its own time is counted, so that others at work do not enter a prediction."""
    clock = time.perf_counter if device == "cuda" else lambda: time.process_time() / torch.get_num_threads()
    fastest, start = float("inf"), time.monotonic()
    work()
    while time.monotonic() - start < 0.2 or fastest == float("inf"):
        before = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, clock() - before)
    return 1 / fastest


# ---- what would fit ---------------------------------------------------------------------------------------------


def _largest(body: Anatomy, recipe: Recipe, device: str, memory: int, what: str) -> int:
    """The largest value of one setting that fits, by bisection; 0 where even the smallest does not."""
    low, high = 0, {"batch": 1 << 16, "length": body.context, "rank": body.width}[what]
    floor = {"length": 2}.get(what, 1)
    while low < high:
        middle = (low + high + 1) // 2
        tried = recipe.model_copy(update={what: max(middle, floor)})
        low, high = (middle, high) if sum(components(body, tried, device).values()) <= memory else (low, middle - 1)
    return low


def _verdict(body: Anatomy, recipe: Recipe, device: str, total: int, memory: int, largest: dict[str, int]) -> str:
    """One sentence: fits and how far one could go, or the cheapest change that would make it fit."""
    have = f"{total / 1e9:.2f} GB of {memory / 1e9:.2f} GB"
    if recipe.length > body.context:
        return f"rows of {recipe.length} tokens are longer than the {body.context} positions of the model"
    if total <= memory:
        room = ", ".join(f"{what} {most}" for what, most in largest.items())
        return f"fits: {have}; it would with {room}, each alone"
    lora = recipe.model_copy(update={"method": "lora"})
    if largest["batch"]:
        return f"does not fit: {have}; --batch {largest['batch']} would (with more steps, the same tokens)"
    if largest["length"] >= 64:
        return f"does not fit: {have}; --length {largest['length']} would"
    for batch in (recipe.batch, 1):
        if recipe.method == "full" and sum(components(body, lora.model_copy(update={"batch": batch}), device).values()) <= memory:
            return f"does not fit: {have}; --method lora --batch {batch} would"
    return f"does not fit: {have}; choose a smaller seed, or a machine with more memory"


def machine_memory(device: str) -> int:
    """Bytes of memory of the device, or of this machine and what a container leaves of it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    limit, whole = Path("/sys/fs/cgroup/memory.max"), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(whole, int(text)) if text.isdigit() else whole


def _resident() -> int:
    """Bytes this process holds: Python, torch, transformers."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _config(folder: Path | str) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadSeed(
            f"{folder}: no config that transformers knows ({error}): give a seed, a folder with a config.json, or a hub id"
        ) from error
