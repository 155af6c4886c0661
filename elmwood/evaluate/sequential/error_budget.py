"""Errors are a budget, and held-out blocks wear out. Who submits often must not win by chance, nor by learning what is asked.

Each submission, and each retry, is one entry of the project's single sequence. Its level is fixed before anything is drawn (e-LOND:
Xu & Ramdas, arXiv:2311.06412): of everything ever accepted, the expected share accepted wrongly is at most the budget, however
submissions depend on one another or reuse the same blocks.

Each draws its own secret order from a key that only the gate has, known by its digest beforehand and shown afterwards. A slice of the
blocks serves some submissions and is retired: what has been asked often has been answered often.
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


def portion(number: int) -> float:
    """The share of the budget that submission 1, 2, ... has: 1/log2(n + 1) - 1/log2(n + 2), which add up to one."""
    return float(1 / np.log2(number + 1) - 1 / np.log2(number + 2))


def level(ledger: Ledger) -> float:
    """The error the next submission is allowed; it is accepted when its wealth reaches one over this."""
    return ledger.budget * portion(len(ledger.entries) + 1) * (1 + sum(entry.accepted is True for entry in ledger.entries))


def begin(ledger: Ledger, expert: Digest, **facts: str) -> Ledger:
    """The ledger with one more submission: its level is fixed, nothing is decided. Facts are fields of the entry."""
    entry = Entry(expert=expert, level=level(ledger), **facts)
    return ledger.model_copy(update={"entries": (*ledger.entries, entry)})


def finish(ledger: Ledger, number: int, accepted: bool, **facts: str) -> Ledger:
    """The ledger with submission `number` (from 0) decided."""
    entries = list(ledger.entries)
    entries[number] = entries[number].model_copy(update={"accepted": accepted} | facts)
    return ledger.model_copy(update={"entries": tuple(entries)})


# ---- which blocks, in which order -----------------------------------------------------------------------------------


def seal(secret: bytes, submission: str) -> bytes:
    """The key of one submission's order. Its sha256 may be published before, and it itself afterwards."""
    return hmac.digest(secret, submission.encode(), "sha256")


def sealed(key: bytes) -> str:
    """What is said of a key before it is shown."""
    return "key-" + hashlib.sha256(key).hexdigest()


def order(key: bytes, size: int, weight_B: Floats | None = None) -> Ints:
    """The places 0 ... size - 1 in the random order of a key. With weights, each next place is drawn with a chance in proportion to its
    weight among those that are left: whoever waits least, when each waits an exponential time of that rate (Efraimidis & Spirakis 2006)."""
    seed = int.from_bytes(hashlib.sha256(key).digest(), "big")
    chance = np.random.Generator(np.random.PCG64(seed))
    return chance.permutation(size) if weight_B is None else np.argsort(chance.exponential(size=size) / weight_B, kind="stable")


def serving(secret: bytes, blocks: int, slices: int, submission: int, uses: int = USES) -> Ints:
    """Places of the blocks that submission 0, 1, ... may be tested on, ascending; slices differ and serve one after another.

    Raises BadInput when all are retired.
    """
    now = submission // uses
    if not 0 <= now < slices:
        raise BadInput(f"submission {submission} finds all {slices} slices of {uses} submissions retired: hold out new documents")
    return np.sort(np.array_split(order(seal(secret, "slices"), blocks), slices)[now])
