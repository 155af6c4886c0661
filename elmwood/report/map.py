"""Embeddings -> places in the plane. Only near neighbours mean anything there.

N documents, D dimensions
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

MOST = 3000  # documents that t-SNE is asked to place
FEWEST = 12  # below this there are no neighbourhoods to keep


def project(x_ND: Floats, rng_seed: int = 0) -> Floats:
    """Places [N, 2] from 0 to 1: principal components, then t-SNE (van der Maaten & Hinton 2008) for up to 3,000 documents."""
    from sklearn.decomposition import PCA  # two seconds that other verbs need not spend
    from sklearn.manifold import TSNE

    count = len(x_ND)
    if count < 2 or not np.ptp(x_ND, axis=0).any():
        return np.full((count, 2), 0.5)
    width = min(50, *x_ND.shape)
    place_ND = PCA(width, svd_solver="full", random_state=rng_seed).fit_transform(np.asarray(x_ND, np.float64))
    if FEWEST <= count <= MOST:
        perplexity = min(30.0, (count - 1) / 3)
        start_N2 = 1e-4 * _two(place_ND) / place_ND[:, 0].std()
        place_ND = TSNE(perplexity=perplexity, init=start_N2, learning_rate="auto", random_state=rng_seed).fit_transform(place_ND)
    place_N2 = _two(place_ND).astype(np.float64)
    spread_2 = np.ptp(place_N2, axis=0)
    return (place_N2 - place_N2.min(0)) / np.where(spread_2 > 0, spread_2, 1)


def _two(place_ND: Floats) -> Floats:
    """The first two columns; a missing one is zero."""
    return np.pad(place_ND[:, :2], ((0, 0), (0, max(0, 2 - place_ND.shape[1]))))
