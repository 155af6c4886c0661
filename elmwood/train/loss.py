"""Cross-entropy without all logits in memory, and which fast paths a model allows: tried on the model, not looked up by name.

N positions, C of them at a time, D width, V vocabulary, L tokens of a row
"""

import inspect
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from elmwood.lm.devices import kind_of
from elmwood.lm.products import linear, plain_head
from elmwood.train.card.attention import DOCUMENTS, attending, can_choose
from elmwood.train.data import UNSCORED

CHUNK = {"cpu": 1 << 20, "gpu": 1 << 24}  # logits at once: a few MB, which stay in the cache; on a GPU enough to fill it
PARTS = 32  # at most, on a GPU: each part starts kernels, and reads and writes the gradient of a trained head
FUSED = ContextVar("fused", default=False)  # whether a run compiles what it computes on CUDA
ROWS = 128  # at least: fewer rows would read the head's weights too often


# a kernel that knows where documents begin (CUDA); one mask for all layers; position_ids that restart; documents see one another
Way = Literal["documents", "mask", "positions", "no"]


class Abilities(NamedTuple):
    """What a model allows. Otherwise the plain path is taken, which is slower or attends across documents."""

    packed: Way  # how the documents of a row are kept apart
    chunked: bool  # the logits are a bias-free linear head on the last hidden states, and nothing else


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head. The forward pass computes its gradient too, chunk by chunk (idea of arXiv:2411.09009).

    The gradient of the weights is computed only if it is needed: a frozen head has none. `groups`: as many means [groups], each of its
    share of the positions in order; the head is frozen then.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, groups: int = 1) -> Tensor:  # type: ignore[override]
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
        with torch.autocast(kind, enabled=False):
            loss, grad_ND, grad_VD = _chunks(hidden_ND.to(dtype), head_VD.to(dtype), target_N, ctx.needs_input_grad[:2], groups)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.dtypes, ctx.groups = (hidden_ND.dtype, head_VD.dtype), groups
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        if ctx.groups > 1:
            grad_ND, _ = ctx.saved_tensors
            grad_ND.unflatten(0, (ctx.groups, -1)).mul_(grad[:, None, None])
            return grad_ND.to(ctx.dtypes[0]), None, None, None
        hidden, head = (None if one is None else one.mul_(grad).to(dtype) for one, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return hidden, head, None, None


def _chunks(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, wanted: tuple[bool, bool], groups: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss (float32), and its gradients with respect to hidden states and head."""
    grad_ND = torch.empty_like(hidden_ND) if wanted[0] else None
    grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wanted[1] else None
    share_N1 = (target_N != UNSCORED).float()[:, None]
    if groups == 1:
        share_N1 /= share_N1.sum().clamp(min=1)
    else:
        share_N1.unflatten(0, (groups, -1)).div_(share_N1.view(groups, -1).sum(1)[:, None, None].clamp(min=1))
    target_N1 = target_N.clamp(min=0)[:, None]
    loss, parts = torch.zeros((), device=hidden_ND.device), []
    rows = rows_of_chunk(len(hidden_ND), len(head_VD), kind_of(hidden_ND.device))
    score = fused_score() if FUSED.get() and hidden_ND.is_cuda else score_logits
    for start in range(0, len(hidden_ND), rows):
        hidden_CD, target_C1, share_C1 = (part[start : start + rows] for part in (hidden_ND, target_N1, share_N1))
        loss_C1, grad_CV = score(linear(hidden_CD, head_VD), target_C1, share_C1)
        if groups == 1:
            loss += loss_C1.sum()
        else:
            parts.append(loss_C1)
        if grad_ND is not None:
            grad_ND[start : start + rows] = linear(grad_CV, head_VD.t())
        if grad_VD is not None:
            grad_VD += linear(grad_CV.t(), hidden_CD.t())
    return torch.cat(parts).view(groups, -1).sum(1) if parts else loss, grad_ND, grad_VD


def rows_of_chunk(positions: int, vocabulary: int, kind: str) -> int:
    """How many positions have their logits computed at once. On a GPU a power of two: most batches are multiples of it."""
    rows = max(ROWS, CHUNK[kind] // vocabulary)
    return rows if kind == "cpu" else 1 << max(rows, positions // PARTS).bit_length() - 1


def score_logits(logit_CV: Tensor, target_C1: Tensor, share_C1: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of some positions, each times its share (float32), and the gradient of their logits, in the logits' dtype."""
    dtype, logit_CV = logit_CV.dtype, logit_CV.float()
    top_C1, place_C1 = logit_CV.max(-1, keepdim=True)
    gold_C1 = logit_CV.gather(1, target_C1)
    prob_CV = torch.softmax(logit_CV, -1)
    loss_C1 = (top_C1 - prob_CV.gather(1, place_C1).log() - gold_C1) * share_C1  # log-sum-exp less the target's logit
    return loss_C1, prob_CV.mul_(share_C1).scatter_add_(1, target_C1, -share_C1).to(dtype)


def score_at_once(logit_CV: Tensor, target_C1: Tensor, share_C1: Tensor) -> tuple[Tensor, Tensor]:
    """The same in a form that a compiler makes two kernels of, which read the logits twice and write the gradient."""
    wide_CV = logit_CV.float()
    whole_C1 = wide_CV.logsumexp(-1, keepdim=True)
    loss_C1 = (whole_C1 - wide_CV.gather(1, target_C1)) * share_C1
    hit_CV = torch.arange(logit_CV.shape[1], device=logit_CV.device) == target_C1
    return loss_C1, (((wide_CV - whole_C1).exp() - hit_CV.float()) * share_C1).to(logit_CV.dtype)


@cache
def fused_score() -> Any:
    return torch.compile(score_at_once)


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model; PEFT adds its adapters in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def find_abilities(model: Any, size: int = 8) -> Abilities:
    """Try documents of `size` tokens: are two in one row kept apart, and are the logits head(trunk)?"""
    model = base_model(model)
    document_3L = (
        torch.arange(3 * size, device=next(model.parameters()).device).reshape(3, size) % model.config.get_text_config().vocab_size
    )
    tokens_2L = torch.stack([document_3L[[0, 2]].flatten(), document_3L[[1, 2]].flatten()])
    ways: tuple[Way, ...] = ("positions",) if _has_windows(model.config) else ("mask", "positions")
    packed: Way = "no"
    if tokens_2L.device.type == "cuda" and can_choose(model):
        with attending(model, DOCUMENTS):
            packed = "documents" if _keeps_documents_apart(model, "documents", tokens_2L) else "no"
    if packed == "no":
        packed = next((way for way in ways if _keeps_documents_apart(model, way, tokens_2L)), "no")
    return Abilities(packed, plain_head(model) is not None)


def _has_windows(config: Any) -> bool:
    """Whether some layers attend to a window only, so that one mask for all layers would be wrong."""
    text = config.get_text_config()
    return bool(getattr(text, "sliding_window", None)) or set(getattr(text, "layer_types", None) or ()) > {"full_attention"}


def _keeps_documents_apart(model: Any, way: Way, tokens_2L: Tensor) -> bool:
    """Whether the logits of the second half are bit-identical for any first half, and equal but for rounding without one."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    half, device = tokens_2L.shape[1] // 2, tokens_2L.device
    positions_2L = torch.arange(half, device=device).repeat(2, 2)
    cut_5 = torch.arange(0, 4 * half + 1, half, dtype=torch.int32, device=device)
    low = model.dtype.itemsize < 4 or way == "documents"  # the kernel takes no float32
    with torch.autocast(device.type, torch.bfloat16, enabled=low and model.dtype == torch.float32):
        try:
            logit_2LV = model(**model_inputs(way, tokens_2L, positions_2L, model.dtype, cut_5)).logits[:, half:]
        except (TypeError, ValueError, RuntimeError, IndexError):  # how a model refuses a mask per row
            return False
        alone_LV = model(input_ids=tokens_2L[:1, half:], use_cache=False).logits[0]
    near = 0.1 if low else 1e-3
    return torch.equal(logit_2LV[0], logit_2LV[1]) and torch.allclose(logit_2LV[0], alone_LV, near, near * alone_LV.std().item())


def model_inputs(
    way: Way, tokens_BL: Tensor, positions_BL: Tensor | None, dtype: torch.dtype, cut_S: Tensor | None = None
) -> dict[str, Any]:
    """The inputs of a transformers model; `dtype` is that of its attention. One mask serves all layers; from positions each layer
    makes its own; `cut_S` bounds the documents of the rows joined. positions_BL None: every row is one document."""
    given: dict[str, Any] = {"input_ids": tokens_BL, "use_cache": False}
    if way == "no" or positions_BL is None:
        return given
    given["position_ids"] = positions_BL
    if way == "documents":
        given |= {"cu_seq_lens_q": cut_S, "cu_seq_lens_k": cut_S, "max_length_q": tokens_BL.shape[1], "max_length_k": tokens_BL.shape[1]}
    if way == "mask":
        place_L = torch.arange(positions_BL.shape[1], device=positions_BL.device)
        begun_BL = place_L - positions_BL
        hidden_BLL = (begun_BL[:, :, None] != begun_BL[:, None, :]) | (place_L[:, None] < place_L)
        mask_B1LL = torch.zeros(hidden_BLL.shape, dtype=dtype, device=place_L.device).masked_fill_(hidden_BLL, -torch.inf)[:, None]
        given["attention_mask"] = mask_B1LL
    return given


def loss(
    model: Any, able: Abilities, tokens_BL: Tensor, targets_BL: Tensor, positions_BL: Tensor | None, cut_S: Tensor | None = None,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """Mean cross-entropy in nats over the scored targets; `groups`: as many means [groups], each of its share of the rows in order.
    positions_BL None: every row is one document."""
    model, kind = base_model(model), tokens_BL.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    given = model_inputs(able.packed, tokens_BL, positions_BL, dtype, cut_S)
    if not able.chunked:
        parts = zip(model(**given).logits.float().chunk(groups), targets_BL.chunk(groups), strict=True)
        losses = [cross_entropy(logit_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=UNSCORED) for logit_BLV, target_BL in parts]
        return torch.stack(losses) if groups > 1 else losses[0]
    hidden_BLD = model.base_model(**given)[0]
    return ChunkedLoss.apply(hidden_BLD.flatten(0, 1), model.get_output_embeddings().weight, targets_BL.flatten(), groups)
