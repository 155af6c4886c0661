"""An adapter folded into its seed: one dense checkpoint, streamed, each value rounded once.

N values of a piece of one tensor; O, I: what a linear layer gives out and takes in; R rank
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.weights.experts import Low
from elmwood.weights.tensors import PIECE, Files, StoredTensor, Twin, decode, encode_finite, places


def fold(seed: Mapping[str, StoredTensor], adapter: Path, digest: str, folder: Path, progress: Progress = silent) -> None:
    """W + scale B A in the seed's own files and dtypes; for a weight-decomposed adapter m (W + scale B A) / |W + scale B A|, row by
    row (DoRA, arXiv:2402.09353). The products are exact (see `exact_product`) and added in float64. Raises BadInput, ForeignExpert.
    """
    low, magnitudes = Low(digest, adapter, dict(seed), dora=True), _magnitudes(adapter / "adapter_model.safetensors")
    if magnitudes and low.turned:
        raise BadInput(f"expert {digest[:8]} decomposes layers whose matrix stands the other way round (Conv1D): fold it with PEFT")
    twin, files, done = Twin(seed, folder, low.factors), Files(), 0
    total = sum(seed[name].numbers for name in low.factors)
    for name in (name for name in seed if name in low.factors):
        place, width = seed[name], seed[name].shape[-1]
        step = max(1, PIECE // width) * width  # whole rows
        for first in range(0, place.numbers, step):
            last = min(first + step, place.numbers)
            theta_N = decode(files.read(place, first, last), place.dtype).astype(np.float64)
            theta_N += low.delta(name, first, last, width)
            if magnitudes:
                theta_OI = theta_N.reshape(-1, width)
                theta_OI *= (magnitudes[name][first // width : last // width] / np.linalg.norm(theta_OI, axis=1))[:, None]
            twin.put(place, first, encode_finite(theta_N, place.dtype, name))
            done += last - first
            progress("fold", done, total, "values")
    files.close()
    twin.close()


def _magnitudes(path: Path) -> dict[str, NDArray[np.float64]]:
    """m [O] of each weight that is decomposed; none in a plain adapter."""
    files, end = Files(), ".lora_magnitude_vector"
    found = {key.removesuffix(".weight"): place for key, place in places([path]).items()}
    made = {
        key.removeprefix("base_model.model.").removesuffix(end) + ".weight": decode(files.read(one, 0, one.numbers), one.dtype).astype(
            np.float64
        )
        for key, one in found.items()
        if key.endswith(end)
    }
    files.close()
    return made
