"""Attention functions under names of ours in transformers: inside each document of packed rows without a mask, by torch's flash kernel;
and in float32 where a CPU multiplies in bf16.

B rows, L tokens of a row, N = B·L positions, H heads of queries, K of keys and values, D width of a head, S documents
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

DOCUMENTS = "elmwood_documents"
FLOAT32 = "elmwood_float32"
WIDEST = 256  # D that the kernel takes
DTYPES = (torch.bfloat16, torch.float16)


def find_cuts(positions_BL: np.ndarray) -> np.ndarray:
    """Where documents begin in the rows joined, and the end [S + 1], int32. Positions count from the start of a document or row."""
    flat_N = positions_BL.reshape(-1)
    return np.append(np.flatnonzero(flat_N == 0), len(flat_N)).astype(np.int32)


def attend(
    module: Any, query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None, **named: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of transformers [B, L, H, D]: causal, within the documents that `cu_seq_lens_q` [S + 1] bounds.

    Without them it is transformers' own. Raises ValueError for what the kernel does not know.
    """
    if cu_seq_lens_q is None:
        named |= {"sliding_window": sliding_window}
        return sdpa_attention_forward(module, query_BHLD, key_BKLD, value_BKLD, attention_mask, dropout, scaling, **named)
    if named.get("softcap") or named.get("s_aux") is not None or query_BHLD.shape[-1] != value_BKLD.shape[-1]:
        raise ValueError("attention by document knows no capped scores, no sinks, and no values of another width")
    kind, rows = query_BHLD.device.type, query_BHLD.shape[0]
    if query_BHLD.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query_BHLD, key_BKLD, value_BKLD = (one.to(dtype) for one in (query_BHLD, key_BKLD, value_BKLD))
    query_NHD, key_NKD, value_NKD = (one.transpose(1, 2).flatten(0, 1) for one in (query_BHLD, key_BKLD, value_BKLD))
    found_NHD = within(query_NHD, key_NKD, value_NKD, cu_seq_lens_q, query_BHLD.shape[2], dropout, scaling, sliding_window)
    return found_NHD.unflatten(0, (rows, -1)), None


def within(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, cut_S: Tensor, longest: int, dropout: float = 0.0,
    scale: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention [N, H, D] inside each document; none is longer than `longest`, and each position sees the last `window`."""
    if not has_kernel(query_NHD):
        return _one_by_one(query_NHD, key_NKD, value_NKD, cut_S, dropout, scale, window)
    left = -1 if window is None else window - 1
    # what torch.nn.attention.varlen calls, which has no dropout
    return torch.ops.aten._flash_attention_forward(
        query_NHD, key_NKD, value_NKD, cut_S, cut_S, longest, longest, dropout, True, False, scale=scale,
        window_size_left=left, window_size_right=-1 if window is None else 0,
    )[0]  # fmt: skip


def has_kernel(query_NHD: Tensor) -> bool:
    """Whether the flash kernel takes these; a pretended GPU has it too."""
    return query_NHD.device.type not in ("cpu", "mps", "xpu") and query_NHD.dtype in DTYPES and query_NHD.shape[-1] <= WIDEST


def _one_by_one(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, cut_S: Tensor, dropout: float, scale: float | None, window: int | None
) -> Tensor:
    """The plain way, one document after another."""
    found = []
    for first, last in pairwise(cut_S.tolist()):
        query_HTD, key_KTD, value_KTD = (one[first:last].transpose(0, 1) for one in (query_NHD, key_NKD, value_NKD))
        place_T = torch.arange(last - first, device=cut_S.device)
        seen_TT = place_T[:, None] >= place_T
        if window is not None:
            seen_TT &= place_T[:, None] - place_T < window
        given_1 = query_HTD[None], key_KTD[None], value_KTD[None]
        y_1HTD = scaled_dot_product_attention(*given_1, attn_mask=seen_TT, dropout_p=dropout, scale=scale, enable_gqa=True)
        found.append(y_1HTD[0].transpose(0, 1))
    return torch.cat(found)


def attend_in_float32(
    module: Any, query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """transformers' own attention [B, L, H, D], in float32 whatever autocast says."""
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    with torch.autocast(query_BHLD.device.type, enabled=False):
        found_BLHD, _ = sdpa_attention_forward(module, query_BHLD.float(), key_BKLD.float(), value_BKLD.float(), attention_mask, **named)
    return found_BLHD, None


ALL_ATTENTION_FUNCTIONS.register(DOCUMENTS, attend)
ALL_ATTENTION_FUNCTIONS.register(FLOAT32, attend_in_float32)
ALL_MASK_ATTENTION_FUNCTIONS.register(FLOAT32, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def can_choose(model: Any) -> bool:
    """Whether a transformers model takes an attention function by its name; an eager one has its reasons, and keeps its own."""
    return bool(getattr(model, "_supports_attention_backend", False)) and model.config._attn_implementation == "sdpa"


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Let a transformers model attend by the function of that name inside the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
