"""What training takes: a formula per component of memory, and one for time, from the config alone. No weights are needed.

N tokens of a step, D width, F width of a feed-forward layer, Q width of all heads, V vocabulary
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from elmwood.lm.importing.config import context_of
from elmwood.lm.pretrained import empty_model
from elmwood.records import Recipe
from elmwood.train.loop import use_threads
from elmwood.train.loss import rows_of_chunk

FLOAT = 4  # bytes
# Bytes beside the tensors. CPU: what the libraries grow by at the first step. CUDA: a context and its libraries, 0.81 GB on an H100, and
# what loading leaves, nothing to 0.7 GB: with this number seven runs are within 10 % of their rehearsal (docs/log/training.md)
BESIDE = {"cpu": 45_000_000, "cuda": 1_100_000_000}
# glibc's heap keeps what is freed: small objects settle in the holes, and the next tensor of that size does not fit (before 2.38 not even
# without them, glibc's bug 14581). This share of activations and gradients takes twice the memory (measured, benches/speed/fit.py)
KEPT = {"cpu": (0.45, 0.55), "cuda": (0.05, 0.05)}
# bitsandbytes and what it brings, where the seed is quantised (a run whose tensors were mapped one by one); and the share of what comes and
# goes during a forward pass whose room is not used again (checkpointing; of qlora and of LoRA by PEFT's own pass it came out alike)
LIBRARIES = {"cpu": 70_000_000, "cuda": 0}
HOLES = {"cpu": 0.6, "cuda": 0.0}
MAPPED = 1 << 20  # bytes: tensors below leave holes too small to matter
# times each kept activation is read or written in a step, beside matrix products (the same bench); adapters read them once more
TRAFFIC = {"full": 22, "lora": 32, "qlora": 32, "dora": 40}
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight in NF4: its own, a byte for 64 of them, a float for 256 of these bytes
EIGHT_BITS = 1 + 4 / 256  # bytes of a moment, where a weight has at least:
SMALLEST = 4096  # numbers


class Anatomy(NamedTuple):
    """What the formulas need to know of a model."""

    parameters: int
    layers: int
    width: int  # D
    heads: int  # Q
    grouped: int  # width of the heads of keys, and of values
    feed_forward: int  # F
    branches: int  # numbers kept of a feed-forward layer for each of its F
    rms: bool  # norms without bias, which keep the normalised values
    query_norms: bool  # queries and keys have norms too
    noise: int  # numbers of dropout kept of a layer for each of its D; the embeddings' own, where they are trained, besides
    embedded_noise: int
    transposed: bool  # GPT-2's Conv1D
    scores: int  # numbers of attention kept for each pair of tokens: those of all heads, where dropout in between forbids a fused kernel
    vocabulary: int
    context: int
    shapes: tuple[tuple[int, int], ...]  # what comes out of and goes into each linear layer of the trunk

    @property
    def matrices(self) -> int:
        """Weights of these layers."""
        return sum(out * into for out, into in self.shapes)

    @property
    def readers(self) -> int:
        """Linear layers that read what the two norms of a layer give: queries, keys, values (or one for all), and into the feed-forward."""
        return sum(into == self.width for _, into in self.shapes) // self.layers - (self.heads == self.width)

    @property
    def largest(self) -> int:
        return max((out * into for out, into in self.shapes), default=0)


def anatomy(config: Any) -> Anatomy:
    """Counted on a model without storage."""
    model = empty_model(config)
    text, last = config.get_text_config(), model.get_output_embeddings()
    layers, width = text.num_hidden_layers, text.hidden_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    # every matrix of the trunk but embeddings: nn.Linear, and GPT-2's Conv1D
    shapes = tuple(
        tuple(module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1])
        for module in model.modules()
        if module is not last and not isinstance(module, nn.Embedding) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    forward = next((size for size in (getattr(text, name, None) for name in names) if size), 4 * width)
    return Anatomy(
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=layers,
        width=width,
        heads=text.num_attention_heads * head,
        grouped=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head,
        feed_forward=forward,
        branches=_branches(text, sum(forward in shape for shape in shapes) >= 3 * layers),
        rms=not any(isinstance(module, nn.LayerNorm) for module in model.modules()),
        query_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        noise=2 * _dropped(text, "resid_pdrop", "dropout", "hidden_dropout", "residual_dropout"),
        embedded_noise=int(_dropped(text, "embd_pdrop", "embedding_dropout")),
        transposed=any(isinstance(module, Conv1D) for module in model.modules()),
        scores=3 * text.num_attention_heads * _dropped(text, "attn_pdrop", "attention_dropout"),
        vocabulary=text.vocab_size,
        context=context_of(config) or 1 << 20,
        shapes=shapes,
    )


def _branches(text: Any, gated: bool) -> int:
    """Gated: the gate, its activation, the other branch, their product. Else before and after the activation, which ReLU needs once."""
    activation = str(getattr(text, "activation_function", None) or getattr(text, "hidden_act", ""))
    return 4 if gated else {"relu": 1, "gelu_new": 5, "gelu_fast": 5}.get(activation, 2)  # the last two are made of several operations


def _dropped(text: Any, *names: str) -> bool:
    """Whether the config drops anything under one of the names that its makers may have given it."""
    return any(getattr(text, name, None) for name in names)


# ---- memory -----------------------------------------------------------------------------------------------------


def components(body: Anatomy, recipe: Recipe, device: str) -> dict[str, int]:
    """Bytes at the peak: at the end of the forward pass, or, where gradients outweigh activations, at the end of the backward pass."""
    own, low = trained_parameters(body, recipe) * recipe.together, width_of(device)
    if device == "cuda":  # dropout keeps a byte there, half a number, and none inside the fused attention
        body = body._replace(noise=body.noise // 2, scores=0)
    gradients, positions = own * FLOAT, rows_at_once(recipe) * recipe.length
    kept = (activations(body, recipe, device) + (positions * recipe.length if device == "cpu" else 0)) * low  # a CPU has a mask, once
    head = body.vocabulary * body.width * FLOAT if recipe.method == "full" else 0  # its gradient comes before the others
    before = gradients if recipe.accumulate > 1 or recipe.together > 1 else 0  # those of earlier passes, or one flat tensor of all
    return {
        "process": resident_memory() if device == "cpu" else 0,  # what this one holds now
        "libraries": BESIDE[device] + (LIBRARIES[device] if recipe.method == "qlora" else 0),
        "weights": weights(body, recipe, device),
        "optimiser": moments(body, recipe) * recipe.together,
        "logits": logits(body.vocabulary, positions, device),
        "workspace": workspace(body, recipe, device),
        **highest(kept, max(head, before), gradients, gradients - before, passing(body, recipe, device) * low, device),
    }


def highest(kept: int, before: int, gradients: int, made: int, passing: int, device: str) -> dict[str, int]:
    """Bytes of activations and gradients where both are highest together, and what the allocator keeps beside them.

    `kept` for the backward pass beside gradients from `before` it; `gradients` at its end, `made` of them during it; and what
    was `passing` in the forward pass.
    """
    again, more, holes = (*KEPT[device], HOLES[device]) if leaves_holes(device) else (0.0, 0.0, 0.0)
    first = kept + before
    peak = max(first + again * first + more * made, gradients + again * first)
    return {
        "activations": kept if first >= gradients else 0,
        "gradients": before if first >= gradients else gradients,
        "allocator": round(peak + holes * passing) - max(first, gradients),
    }


def width_of(device: str) -> int:
    """Bytes of a number of frozen weights and activations: float32 on a CPU, bf16 on a GPU."""
    return FLOAT if device == "cpu" else 2


def logits(vocabulary: int, positions: int, device: str) -> int:
    """Bytes of one chunk of them, in three tensors (`loss.ChunkedLoss`)."""
    return 3 * min(positions, rows_of_chunk(positions, vocabulary, "cpu" if device == "cpu" else "gpu")) * vocabulary * FLOAT


def leaves_holes(device: str) -> bool:
    """Whether freed tensors leave holes in the heap: not if glibc maps each tensor on its own, MALLOC_MMAP_THRESHOLD_=1000000."""
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    return device == "cuda" or not threshold.isdigit() or int(threshold) > MAPPED


def rows_at_once(recipe: Recipe) -> int:
    """Sequences of one pass."""
    return math.ceil(recipe.batch / recipe.accumulate) * recipe.together


def weights(body: Anatomy, recipe: Recipe, device: str) -> int:
    """Bytes in memory of the seed and of the trained weights."""
    own, low = trained_parameters(body, recipe) * FLOAT, width_of(device)
    if recipe.method == "full":  # autocast keeps a second copy of what is multiplied, in bf16
        return own + (2 * body.matrices if device == "cuda" else 0)
    frozen = body.parameters * low
    if recipe.method == "qlora":
        frozen = (body.parameters - body.matrices) * low + round(body.matrices * FOUR_BITS)
    return frozen + own * (1 if recipe.together == 1 else recipe.together + 1)  # the PEFT model's own copy beside the stack


def moments(body: Anatomy, recipe: Recipe) -> int:
    """Bytes of the two moments of one expert."""
    own = trained_parameters(body, recipe)
    if recipe.optimiser == "adamw":
        return 2 * own * FLOAT
    if recipe.method == "full":
        return round(2 * own * EIGHT_BITS)  # but for norms and biases, which are few
    large = sum(size for out, into in adapted(body, recipe) for size in (recipe.rank * out, recipe.rank * into) if size >= SMALLEST)
    return round(2 * (large * EIGHT_BITS + (own - large) * FLOAT))


def workspace(body: Anatomy, recipe: Recipe, device: str) -> int:
    """Bytes that come and go inside one layer: a matrix in full precision (qlora), the product of A and B beside it (dora), the activations
    and gradients of a layer that is computed again."""
    low = width_of(device)
    matrix = {"qlora": body.largest * low, "dora": 3 * body.largest * FLOAT}.get(recipe.method, 0)
    again = rows_at_once(recipe) * recipe.length * 2 * body.feed_forward * low if recipe.checkpointing else 0
    return matrix + again


def passing(body: Anatomy, recipe: Recipe, device: str) -> int:
    """Numbers that come and go during a forward pass: activations that are computed again later, matrices unpacked or multiplied out."""
    again = activations(body, recipe.model_copy(update={"checkpointing": False}), device) - activations(body, recipe, device)
    matrices = {"qlora": 1, "dora": 3}.get(recipe.method, 0) * body.matrices
    return again + matrices


def adapted(body: Anatomy, recipe: Recipe) -> tuple[tuple[int, int], ...]:
    """Shapes of the layers that have adapters."""
    share = math.ceil(recipe.late * body.layers) / body.layers
    return body.shapes[len(body.shapes) - round(share * len(body.shapes)) :]


def trained_parameters(body: Anatomy, recipe: Recipe) -> int:
    """Weights of one expert that are trained."""
    if recipe.method == "full":
        return body.parameters
    return sum(recipe.rank * (out + into) + (out if recipe.method == "dora" else 0) for out, into in adapted(body, recipe))


def activations(body: Anatomy, recipe: Recipe, device: str = "cpu") -> int:
    """Numbers (of `width_of` the device) kept for the backward pass of one pass, mask and loss aside.

    Of a layer: what its norms keep; queries, keys, values and what attention gives; of the feed-forward layer what its activation needs;
    the factors of dropout; with dora what each linear layer gives, twice. Layers below the first adapter keep nothing; those computed
    again keep what goes into them, and one at a time the rest.
    """
    full, halved = recipe.method == "full", width_of(device) < FLOAT
    norms, last, queries = normed(body, full, halved)
    # keys and values are repeated for each head that reads them, but for the kernel of a card
    layer = (
        norms
        + 2 * body.heads
        + 2 * (body.grouped if halved else body.heads)
        + body.branches * body.feed_forward
        + body.noise * body.width
        + body.scores * recipe.length
    )
    layer += queries * body.heads if body.query_norms else 0
    count = body.layers if full else math.ceil(recipe.late * body.layers)
    low = 0 if full else recipe.rank * len(adapted(body, recipe))
    low += 2 * sum(out for out, _ in adapted(body, recipe)) if recipe.method == "dora" else 0
    outside = last + body.width + (body.embedded_noise * body.width if full else 0)
    between = count * body.width  # what goes into layers
    inside = count * layer + low
    if recipe.checkpointing:
        again = math.ceil(recipe.checkpointed * count)  # of the layers; the rest keep all
        inside = (layer + low // count) * max(1, count - again) + between * again // count
    return rows_at_once(recipe) * recipe.length * (inside + outside)


def normed(body: Anatomy, full: bool, halved: bool) -> tuple[int, int, int]:
    """Numbers of one position kept for the two norms of a layer, for the last norm, and, by each of its numbers, for queries and keys.

    Each norm keeps what it reads and what it gives, a trained RMS norm the normalised values too. On a GPU an RMS norm computes in
    float32, two numbers for one. Where all weights are trained, what a norm gives is float32 too, and each linear layer that reads it
    keeps a bf16 copy of its own; with adapters it is bf16. What layers add to is bf16 either way.
    """
    normalised = body.rms and full
    if not halved:
        return 2 * (2 + normalised) * body.width, (2 + normalised) * body.width, 4 if full else 2
    if not full:
        return 2 * (2 + body.rms) * body.width, (2 + body.rms) * body.width, 4
    return (2 * (2 + normalised) + body.readers) * body.width, (3 + normalised) * body.width, 6


def resident_memory() -> int:
    """Bytes this process holds: Python, torch, transformers, and what else it has imported."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- time -------------------------------------------------------------------------------------------------------


def speed(body: Anatomy, recipe: Recipe, device: str) -> float:
    """Tokens per second, of all experts that are trained together: the arithmetic by the speed of a matrix product, the rest by the
    speed of memory, both measured here briefly."""
    forward, above = 1.0, 1.0 if recipe.method == "full" else math.ceil(recipe.late * body.layers) / body.layers
    # the forward pass, again where it is computed twice; the gradient of the inputs; of the weights
    passes = forward + above * (1 + recipe.checkpointing + (recipe.method == "full"))
    head = body.vocabulary * body.width
    attention = 2 * body.layers * body.heads * recipe.length * (2 + 2.5 * above)  # the backward pass computes the scores again
    own, tokens = trained_parameters(body, recipe), rows_at_once(recipe) * recipe.length
    flops = 2 * passes * body.matrices + 2 * (3 if recipe.method == "full" else 2) * head
    flops += (0 if recipe.method == "full" else 6 * own) + 2 * attention
    whole = activations(body, recipe.model_copy(update={"checkpointing": False}))
    traffic = TRAFFIC[recipe.method] * FLOAT * whole * (4 / 3 if recipe.checkpointing else 1) / tokens + 6 * FLOAT * body.vocabulary
    if recipe.method in ("qlora", "dora"):  # matrices are unpacked, or multiplied out, in each pass whatever its tokens
        traffic += (2 if recipe.method == "qlora" else 6) * (1 + above) * FLOAT * body.matrices / tokens
    step = 7 * FLOAT * own / (recipe.batch * recipe.length)  # AdamW reads four numbers per weight and writes three
    with use_threads(recipe.threads):
        product, memory = _probe(body, recipe, device)
    return 1 / (flops / product + (traffic + step) / memory)


def _probe(body: Anatomy, recipe: Recipe, device: str) -> tuple[float, float]:
    """Floating-point operations and bytes per second of tensors of this model's size, in some tenths of a second."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    most = 1024 if device == "cpu" else 8192  # larger ones are no faster
    tokens, width, forward = (min(most, one) for one in (rows_at_once(recipe) * recipe.length, body.width, body.feed_forward))
    x_ND, weight_FD = (torch.ones(rows, width, dtype=dtype, device=device) for rows in (tokens, forward))
    y_NF = torch.ones(tokens, forward, dtype=dtype, device=device)
    product = _rate(lambda: torch.mm(x_ND, weight_FD.t(), out=y_NF), device) * 2 * tokens * weight_FD.numel()
    memory = _rate(lambda: nn.functional.silu(y_NF) * y_NF, device) * 5 * y_NF.nbytes
    return product, memory


def _rate(work: Callable[[], Any], device: str) -> float:
    """Calls per second, by the fastest of some. On a CPU its own time is counted, so that others at work do not enter a prediction."""
    clock = time.perf_counter if device == "cuda" else lambda: time.process_time() / torch.get_num_threads()

    def took(calls: int) -> float:
        before = clock()
        for _ in range(calls):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - before

    took(1)  # sets things up
    calls = 1
    while (fastest := took(calls)) < 0.01:  # some systems count a process's time in steps of milliseconds
        calls *= 2
    start = time.monotonic()
    while time.monotonic() - start < 0.2:
        fastest = min(fastest, took(calls) or fastest)
    return calls / fastest
