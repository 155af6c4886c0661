"""An adapter folded into its seed: one dense checkpoint, streamed, each value rounded once.

N values of a piece of one tensor; O, I: what a linear layer gives out and takes in; R rank
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.weights.experts import Low
from elmwood.weights.tensors import PIECE, Files, StoredTensor, Twin, decode, encode_finite


def fold(seed: Mapping[str, StoredTensor], adapter: Path, digest: str, folder: Path, progress: Progress = silent) -> None:
    """W + scale B A in the seed's own files and dtypes; for a weight-decomposed adapter m (W + scale B A) / |W + scale B A|, row by
    row (DoRA, arXiv:2402.09353). The products are exact (see `exact_product`) and added in float64. Raises BadInput, ForeignExpert.
    """
    low = Low(digest, adapter, seed, dora=True)
    twin, files, done = Twin(seed, folder, low.factors), Files(), 0
    total = sum(seed[name].numbers for name in low.factors)
    for name in (name for name in seed if name in low.factors):
        place, width = seed[name], seed[name].shape[-1]
        magnitude_O = _values(low.magnitudes[name], files) if name in low.magnitudes else None
        whole = magnitude_O is not None and place.turned  # its outputs are columns
        step = place.numbers if whole else max(1, PIECE // width) * width  # whole rows
        for first in range(0, place.numbers, step):
            last = min(first + step, place.numbers)
            theta_N = decode(files.read(place, first, last), place.dtype).astype(np.float64)
            theta_N += low.delta(name, first, last, width)
            if magnitude_O is not None:
                theta_OI = theta_N.reshape(-1, width).T if whole else theta_N.reshape(-1, width)
                part_O = magnitude_O if whole else magnitude_O[first // width : last // width]
                theta_OI *= (part_O / np.linalg.norm(theta_OI, axis=1))[:, None]
            twin.put(place, first, encode_finite(theta_N, place.dtype, name))
            done += last - first
            progress("fold", done, total, "values")
    files.close()
    twin.close()


def _values(place: StoredTensor, files: Files) -> NDArray[np.float64]:
    return decode(files.read(place, 0, place.numbers), place.dtype).astype(np.float64)
