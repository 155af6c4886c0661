"""Cross-entropy without the logits standing whole, and what a model allows of it: found out by asking the model, not by its name.

N positions, C of them at a time, D width, V vocabulary, L tokens of a row
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from elmwood.train.data import UNSCORED

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits at once: a few MB, so that they stay in the cache; more where launches cost
ROWS = 128  # at least, so that the head's weights are not read for nothing


class Abilities(NamedTuple):
    """What a model allows. Where something is missing the plain way is taken, which is slower or sees across documents."""

    packed: bool  # restarting position_ids keep a row's documents from seeing one another
    chunked: bool  # the logits are a bias-free linear head on the last hidden states, and nothing else


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head, its gradient made in the forward pass, chunk by chunk (arXiv:2411.09009 has the idea).

    The weights' gradient is made only where it is wanted: a frozen head has none.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Tensor:  # type: ignore[override]  # torch leaves it open
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
        with torch.autocast(kind, enabled=False):
            loss, grad_ND, grad_VD = _chunks(hidden_ND.to(dtype), head_VD.to(dtype), target_N, ctx.needs_input_grad[:2])
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.dtypes = hidden_ND.dtype, head_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        hidden, head = (None if one is None else one.mul_(grad).to(dtype) for one, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return hidden, head, None


def _chunks(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss (float32) and its gradients after hidden states and head."""
    grad_ND = torch.empty_like(hidden_ND) if wanted[0] else None
    grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wanted[1] else None
    share_N1 = (target_N != UNSCORED).float()[:, None]
    share_N1 /= share_N1.sum().clamp(min=1)
    target_N1 = target_N.clamp(min=0)[:, None]
    loss = torch.zeros((), device=hidden_ND.device)
    rows = max(ROWS, CHUNK[hidden_ND.device.type] // len(head_VD))
    for start in range(0, len(hidden_ND), rows):
        hidden_CD, target_C1, share_C1 = (part[start : start + rows] for part in (hidden_ND, target_N1, share_N1))
        logit_CV = (hidden_CD @ head_VD.t()).float()
        top_C1, place_C1 = logit_CV.max(-1, keepdim=True)
        gold_C1 = logit_CV.gather(1, target_C1)
        prob_CV = torch.softmax(logit_CV, -1)
        loss += ((top_C1 - prob_CV.gather(1, place_C1).log() - gold_C1) * share_C1).sum()  # log-sum-exp less the target's logit
        prob_CV.mul_(share_C1).scatter_add_(1, target_C1, -share_C1)
        grad_CV = prob_CV.to(hidden_CD.dtype)
        if grad_ND is not None:
            torch.mm(grad_CV, head_VD, out=grad_ND[start : start + rows])
        if grad_VD is not None:
            grad_VD += grad_CV.t() @ hidden_CD
    return loss, grad_ND, grad_VD


def parts(model: Any) -> tuple[Callable[..., Any], Any]:
    """The trunk (token ids -> last hidden states) and the head of a causal LM, with adapters or without."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model, inner.get_output_embeddings()


@torch.no_grad()
def abilities(model: Any) -> Abilities:
    """Three small forward passes: would another first document change what the second sees, and are the logits head(trunk)?"""
    place = next(model.parameters()).device
    first_L, other_L, second_L = (torch.arange(start, start + 8, device=place) % model.config.vocab_size for start in (0, 8, 16))
    row_2L = torch.stack([torch.cat([first_L, second_L]), torch.cat([other_L, second_L])])
    packed = False
    if "position_ids" in inspect.signature(model.forward).parameters:
        position_2L = torch.arange(8, device=place).repeat(2, 2)
        logit_2LV = model(input_ids=row_2L, position_ids=position_2L, use_cache=False).logits
        packed = torch.equal(logit_2LV[0, 8:], logit_2LV[1, 8:])
    trunk, head = parts(model)
    chunked = False
    if type(head) is nn.Linear and head.bias is None:
        hidden_2LD = trunk(input_ids=row_2L, use_cache=False)[0]
        if hidden_2LD.shape[-1] == head.in_features:
            logit_2LV = model(input_ids=row_2L, use_cache=False).logits
            chunked = torch.equal(nn.functional.linear(hidden_2LD, head.weight), logit_2LV)
    return Abilities(packed, chunked)


def loss(model: nn.Module, able: Abilities, tokens_BL: Tensor, targets_BL: Tensor, positions_BL: Tensor | None) -> Tensor:
    """Mean cross-entropy in nats over the scored targets. positions_BL None: every row is of one document."""
    inputs = {"input_ids": tokens_BL, "use_cache": False}
    if able.packed and positions_BL is not None:
        inputs["position_ids"] = positions_BL
    if not able.chunked:
        return cross_entropy(model(**inputs).logits.float().flatten(0, 1), targets_BL.flatten(), ignore_index=UNSCORED)
    trunk, head = parts(model)
    return ChunkedLoss.apply(trunk(**inputs)[0].flatten(0, 1), head.weight, targets_BL.flatten())
