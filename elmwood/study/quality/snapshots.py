"""Losses of several ensembles of one seed and one partition, from the columns of their experts: each model is run once.

N scored tokens, E experts of an ensemble by digest, C = E + 1 candidates (the seed last)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.distances import nearest_place
from elmwood.domains.partition import serving
from elmwood.domains.route import Routing, Signals, places, remember, router_of, weights
from elmwood.engine import Progress, silent
from elmwood.evaluate.holdout import distances
from elmwood.evaluate.losses import Estimate, bits_per_byte, difference, mix
from elmwood.records import Ensemble, Expert, Forest, Partition, Seed
from elmwood.store import AnyStore, Named, Store
from elmwood.study.quality.scoring import Columns, Ensured, ensure, holdout_spec

Floats = NDArray[np.floating]


class Measured(NamedTuple):
    """An ensemble on the test half of the held-out documents; gains are paired. No `over_control` without a control."""

    ensemble: Ensemble
    loss: Estimate  # bits per byte
    over_seed: Estimate
    over_control: Estimate | None


class Measures(NamedTuple):
    """Ensembles, in the order asked for, with the seed and a control beside them."""

    ensembles: tuple[Measured, ...]
    seed: Estimate
    control: Estimate | None
    documents: int


def measure(
    ensembles: Sequence[Named], store: AnyStore = None, *, control: Named | None = None, length: int | None = None,
    documents: int | None = None, workers: int = 1, progress: Progress = silent,
) -> Measures:  # fmt: skip
    """Bits per byte of ensembles, of their seed and of a control. One that is no sum of its experts' probabilities is run as it is.

    Raises BadInput, UnknownName.
    """
    home = Store(store)
    opened = [home.load(one, Ensemble) for one in ensembles]
    forests = [home.load(one.forest, Forest) for one in opened]
    seed, division = home.load(forests[0].seed, Seed), home.load(forests[0].partition, Partition)
    columns = Columns(holdout_spec(division, seed, length, documents), home)
    members = sorted({digest for one, forest in zip(opened, forests, strict=True) if one.is_sum for digest in forest.experts})
    dense = [home.load(control).digest] if control else []
    whole = [one.digest for one in opened if not one.is_sum]
    held, models = columns.held, (seed.digest, *members, *dense, *whole)
    test_D = ~held.tune_D
    test_W = np.unique(held.window_N[test_D[held.document_N]])  # a window without such a document is not run
    found = ensure([("", one) for one in models], columns, windows=dict.fromkeys(models, test_W), workers=workers, progress=progress)
    seed_N = found.columns[seed.digest]
    near = {
        kind: distances(held, division, home, progress, signal=kind) for kind in {router_of(one).distances or "dense" for one in opened}
    }
    rows = []
    for one, forest in zip(opened, forests, strict=True):
        dist2_NK = near[router_of(one).distances or "dense"]
        column_N = _column(one, forest, division, found, dist2_NK, home) if one.is_sum else found.columns[one.digest]
        over = difference(found.columns[dense[0]], column_N, held, test_D) if dense else None
        rows.append(Measured(one, bits_per_byte(column_N, held, test_D), difference(seed_N, column_N, held, test_D), over))
    return Measures(
        tuple(rows), bits_per_byte(seed_N, held, test_D), bits_per_byte(found.columns[dense[0]], held, test_D) if dense else None,
        int(test_D.sum()),
    )  # fmt: skip


def _column(one: Ensemble, forest: Forest, division: Partition, found: Ensured, dist2_NK: Floats, store: Store) -> Floats:
    """The log-likelihoods of an ensemble [N]; those of windows that were not run mean nothing."""
    experts = [store.load(digest, Expert) for digest in forest.experts]
    loglik_NC = np.nan_to_num(np.column_stack([found.columns[digest] for digest in (*forest.experts, forest.seed)]))
    routing = Routing.of(one)
    memory_NC = remember(loglik_NC, routing.fading, found.holdout.document_N) if router_of(routing).memory else None
    dist2_NE = nearest_place(dist2_NK, serving(division, [(expert.partition, expert.domain) for expert in experts], store))
    return mix(loglik_NC, weights(Signals(dist2_NE, memory_NC, places(found.holdout.document_N)), routing))
