"""Models -> losses. Every held-out token is scored once per model; everything else is arithmetic on these columns.

holdout      the held-out text as windows of tokens, with bytes, domains, the two halves and blocks of 2 KiB
columns      scores a model on some of it, and stores the result: two bytes per token
partial      columns that grow window by window; columns of other stores
losses       columns -> bits per byte, mixtures, differences, each with its standard error
calibration  the settings of a router, chosen on the tune half
comparison   the result and every control beside it, on the test half
subsets      static weights, choice of experts, the value of each, ranking of many candidates
surrogate    merges ranked without running them
admission    what an expert must show to join a forest
harness      standard benchmarks; every answer is stored
"""

from elmwood.evaluate.calibration import Calibration, calibrate
from elmwood.evaluate.columns import Scorer, column
from elmwood.evaluate.comparison import Compared, Control, Cost, Side, compare
from elmwood.evaluate.holdout import Holdout, HoldoutSpec, distances, open_holdout
from elmwood.evaluate.losses import Estimate, bits_per_byte, block_nats, difference, mix, perplexity, row
from elmwood.evaluate.partial import Partial, bring, score

__all__ = [
    "Calibration",
    "Compared",
    "Control",
    "Cost",
    "Estimate",
    "Holdout",
    "HoldoutSpec",
    "Partial",
    "Scorer",
    "Side",
    "bits_per_byte",
    "block_nats",
    "bring",
    "calibrate",
    "column",
    "compare",
    "difference",
    "distances",
    "mix",
    "open_holdout",
    "perplexity",
    "row",
    "score",
]
