"""Models -> numbers. Every held-out token is scored once per model; everything else is arithmetic on those columns.

holdout   the held-out text as windows of tokens, with bytes, domains, the two halves and blocks of 2 KiB
columns   run a model over some of it, and what is kept: two bytes a token
partial   columns that grow: the only functions here that need a model; columns of other stores
losses    columns -> bits per byte, mixtures, differences, each with its standard error
subsets   which weights, which experts, what each is worth, many candidates ranked
surrogate merges ranked without running them
calibration  the settings of a router, on the tune half
harness   standard benchmarks, every answer kept
comparison  the result and every control beside it, on the test half
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
