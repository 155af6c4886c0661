"""An error budget over all submissions to a project, so that nobody gets in by trying often or by learning the held-out blocks.

Each submission, and each retry, is one entry in the project's single sequence. Its error level is fixed before anything is drawn
(e-LOND: Xu & Ramdas, arXiv:2311.06412): among all accepted submissions, the expected share of wrong ones is at most the budget, even
where submissions depend on one another or reuse blocks.

Each submission has its own secret order of blocks, from a key that only the gate knows. The gate publishes a commitment to the key
before drawing and the key itself afterwards. A slice of the blocks serves a number of submissions and is then retired.
"""

import hashlib
import hmac

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput
from elmwood.records import Digest, Entry, Ledger

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

USES = 20  # submissions per slice


def budget_share(number: int) -> float:
    """The share of the budget for submission n = 1, 2, ...: 1/log2(n + 1) - 1/log2(n + 2); all shares sum to one."""
    return float(1 / np.log2(number + 1) - 1 / np.log2(number + 2))


def level(ledger: Ledger) -> float:
    """The error level of the next submission: it is accepted when its wealth reaches one over this."""
    return ledger.budget * budget_share(len(ledger.entries) + 1) * (1 + sum(entry.accepted is True for entry in ledger.entries))


def begin(ledger: Ledger, expert: Digest, **facts: str) -> Ledger:
    """The ledger with one more submission, at a fixed level and undecided. Facts are fields of the entry."""
    entry = Entry(expert=expert, level=level(ledger), **facts)
    return ledger.model_copy(update={"entries": (*ledger.entries, entry)})


def finish(ledger: Ledger, number: int, accepted: bool, **facts: str) -> Ledger:
    """The ledger with submission `number` (from 0) decided."""
    entries = list(ledger.entries)
    entries[number] = entries[number].model_copy(update={"accepted": accepted} | facts)
    return ledger.model_copy(update={"entries": tuple(entries)})


# ---- which blocks, in what order ------------------------------------------------------------------------------------


def derive_key(secret: bytes, submission: str) -> bytes:
    """The key of one submission's order. Publish its commitment before drawing, and the key afterwards."""
    return hmac.digest(secret, submission.encode(), "sha256")


def commitment(key: bytes) -> str:
    """What is published of a key before drawing: "key-" and its sha256."""
    return "key-" + hashlib.sha256(key).hexdigest()


def random_order(key: bytes, size: int, weight_B: Floats | None = None) -> Ints:
    """The places 0 ... size - 1 in the random order of a key.

    With weights, each place is drawn with a probability proportional to its weight among the undrawn places: sort by exponential
    waiting times with these rates (Efraimidis & Spirakis 2006).
    """
    seed = int.from_bytes(hashlib.sha256(key).digest(), "big")
    chance = np.random.Generator(np.random.PCG64(seed))
    return chance.permutation(size) if weight_B is None else np.argsort(chance.exponential(size=size) / weight_B, kind="stable")


def open_slice(key: bytes, blocks: int, slices: int, submission: int, uses: int = USES) -> Ints:
    """Places of the blocks on which submission 0, 1, ... is tested, ascending. Slices are disjoint and are used one after another.

    `key`: `slices_key` of the secret. Raises BadInput when all slices are retired.
    """
    now = submission // uses
    if not 0 <= now < slices:
        raise BadInput(
            f"submission {submission + 1} comes after all {slices} slices of {uses} submissions are retired: hold out new documents"
        )
    return np.sort(np.array_split(random_order(key, blocks), slices)[now])


def slices_key(secret: bytes) -> bytes:
    """The key of the cut into slices, which a gate can hand to who runs the tests, without its secret."""
    return derive_key(secret, "slices")
