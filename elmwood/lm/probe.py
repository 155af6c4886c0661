"""What an adapter says after a few fixed tokens: recorded where the expert is scored, compared when a server first loads it.

So an expert that a server lets answer is what was verified, by another path through the code: a file that was read in part, scaled in
another way or laid over other weights says something else.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from elmwood.errors import BadInput
from elmwood.lm.interface import LM
from elmwood.records import Expert, Merged, Mixture, fingerprint
from elmwood.store import Store
from elmwood.store.disk import write_whole

TOKENS, NUMBERS = 8, 32
NATS, SHARE = 0.05, 0.1  # that a number may differ by, and a part of the largest distance from the seed: scores may be made in bf16


def text(vocabulary: int, context: int) -> list[int]:
    return [31 * n % vocabulary for n in range(1, min(TOKENS, context - 1) + 1)]


def sample(logp_V: Tensor) -> list[float]:
    """Evenly spaced log-probabilities."""
    return logp_V.float().cpu()[:: -(-len(logp_V) // NUMBERS)].tolist()


def note(lm: LM, branch: Expert, store: Store) -> None:
    """Record what an open expert says, unless it is known. A disk that cannot be written to costs the check alone."""
    path = _path(branch, store)
    if path.exists():
        return
    logp_V, _ = lm.extend(text(lm.vocabulary, lm.context), lm.start())
    with suppress(OSError):
        write_whole(path, json.dumps(sample(logp_V)).encode(), durable=False)


def known(branch: Expert | Merged | Mixture, store: Store) -> list[float] | None:
    """What was recorded; None where nothing was, or it cannot be read."""
    try:
        found = json.loads(_path(branch, store).read_text(encoding="utf-8"))
        return [float(number) for number in found]
    except (OSError, ValueError, TypeError):
        return None


def compare(said: Sequence[float], seed: Sequence[float], recorded: Sequence[float] | None) -> None:
    """Raises BadInput where an adapter says what the seed says, or not what was recorded."""
    if list(said) == list(seed):
        raise BadInput("with it the model says what the seed says: it was never trained, or is not what was trained")
    if recorded is None or len(recorded) != len(said):
        return
    bound = NATS + SHARE * max(abs(one - base) for one, base in zip(recorded, seed, strict=True))
    far = max(abs(one - other) for one, other in zip(said, recorded, strict=True))
    if not far <= bound:
        raise BadInput(
            f"it does not say what it said when it was scored: log-probabilities differ by {far:.3g} nats, {bound:.3g} are allowed; "
            "its files, its seed or the record of its probe in the store's work/probes are not what they were"
        )


def _path(branch: Expert | Merged | Mixture, store: Store) -> Path:
    """Named by what is read: the seed and the two files."""
    files = (branch.files.get("adapter_config.json", ""), branch.files.get("adapter_model.safetensors", ""))
    name = fingerprint("probe", branch.seed, *files)
    return store.root / "work" / "probes" / name[:2] / f"{name}.json"
