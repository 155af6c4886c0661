"""Tiny language models as an embedder: what each says of the beginning of a text (SmallTalk, arXiv:2410.03529).

W tokens of one text, K models, B windows in one batch, T tokens of the longest, V words
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from elmwood.corpus.tokens import load_tokenizer, special_tokens_as_text
from elmwood.errors import BadRecord
from elmwood.lm.devices import choose_device
from elmwood.lm.hidden_states import in_batches
from elmwood.lm.pretrained import end_ids, open_weights
from elmwood.lm.products import hasten
from elmwood.records import Files
from elmwood.store import Store

CHARACTERS = 32  # of a text for each token that is read of it, at most

TokenScores = tuple[NDArray[np.float32], NDArray[np.int64]]  # score_WK, end_W


def open_router_lms(models_K: Sequence[Files], store: Store) -> Callable[[Sequence[str]], list[TokenScores]]:
    """Open router LMs, each a transformers folder, as a function of texts: for each, log p of its tokens under each model [W, K], nats, and
    the characters of the text up to the end of each token [W]. Tokens past the models' context are not read. Raises BadRecord, BadSeed."""
    folders = [store.folder(files) for files in models_K]
    place = choose_device(None)
    models = [hasten(open_weights(folder, dtype=torch.float32).to(place).eval()) for folder in folders]
    words, separator = load_tokenizer(folders[0]), _separator(folders[0])
    most = min(model.config.max_position_embeddings for model in models) - 1

    def scores(texts: Sequence[str]) -> list[TokenScores]:
        with special_tokens_as_text(words):
            encoded = words.encode_batch([text[: CHARACTERS * most] for text in texts], add_special_tokens=False)
        windows = [(n, 0, [separator, *one.ids[:most]]) for n, one in enumerate(encoded)]
        found = [np.zeros((len(row) - 1, len(models)), np.float32) for _, _, row in windows]
        for batch in in_batches(sorted(windows, key=lambda window: len(window[2]))):
            for k, model in enumerate(models):
                for (n, _, row), score_T in zip(batch, _score(model, [row for _, _, row in batch]), strict=True):
                    found[n][:, k] = score_T[: len(row) - 1]
        return [(score, np.array([end for _, end in one.offsets[:most]], np.int64)) for score, one in zip(found, encoded, strict=True)]

    return scores


@torch.inference_mode()
def _score(model: Any, rows: list[list[int]]) -> NDArray[np.float32]:
    """log p of each token after the first [B, T - 1]; those past the end of a row are of padding."""
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits[:, :-1].float()
    return -cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none").cpu().numpy()


def _separator(folder: Path) -> int:
    if not (ends := end_ids(folder)):
        raise BadRecord("this embedder's router LMs name no token that ends a text: download it again")
    return ends[0]
