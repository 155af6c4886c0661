"""What an adapter says after a few fixed tokens: part of an expert's record from the end of its training on, compared by who verifies it,
and when a server first loads it. For experts whose record has none it is kept beside the store's records where they are scored.

So an expert that a server lets answer is what was verified, by another path through the code: a file that was read in part, scaled in
another way or laid over other weights says something else.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from math import isfinite, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from elmwood.errors import BadInput
from elmwood.lm.experts import Experts, Text
from elmwood.lm.interface import LM
from elmwood.records import Expert, Merged, Mixture, Seed, fingerprint
from elmwood.store import Store
from elmwood.store.disk import write_whole

TOKENS, NUMBERS = 8, 32
NATS, SHARE = 0.07, 0.1  # that numbers may differ by, and a part of their distance from the seed's: either side may compute in bf16


def text(vocabulary: int, context: int) -> list[int]:
    return [31 * n % vocabulary for n in range(1, min(TOKENS, context - 1) + 1)]


def sample(logp_V: Tensor) -> list[float]:
    """Evenly spaced log-probabilities."""
    return logp_V.float().cpu()[:: -(-len(logp_V) // NUMBERS)].tolist()


@torch.inference_mode()
def say(model: Any, vocabulary: int, context: int, rows: int = 1) -> list[tuple[float, ...]]:
    """What a trained model says after the text, to two decimals, in each of so many equal rows; nothing where that is not finite."""
    training = model.training
    model.eval()
    tokens_BT = torch.tensor([text(vocabulary, context)] * rows, device=model.device)
    logp_BV = torch.log_softmax(model(input_ids=tokens_BT, use_cache=False).logits[:, -1].float(), -1)
    model.train(training)
    found = [tuple(round(number, 2) for number in sample(logp_V)) for logp_V in logp_BV]
    return [said if all(map(isfinite, said)) else () for said in found]


def note(lm: LM, branch: Expert, store: Store) -> None:
    """Keep what an open expert says, unless it is known. A disk that cannot be written to costs the check alone."""
    path = _path(branch, store)
    if branch.probe or path.exists():
        return
    logp_V, _ = lm.extend(text(lm.vocabulary, lm.context), lm.start())
    with suppress(OSError):
        write_whole(path, json.dumps(sample(logp_V)).encode(), durable=False)


def known(branch: Expert | Merged | Mixture, store: Store) -> list[float] | None:
    """What was recorded; None where nothing was, or it cannot be read."""
    if isinstance(branch, Expert) and branch.probe:
        return list(branch.probe)
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
    bound, far = NATS + SHARE * _distance(recorded, seed), _distance(said, recorded)
    if not far <= bound:
        raise BadInput(
            f"it does not say what it said when it was trained or scored: log-probabilities differ by {far:.3g} nats, {bound:.3g} are "
            "allowed; its files, its seed or the record of its probe are not what they were"
        )


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Root mean square of the differences."""
    return sqrt(fmean((a - b) ** 2 for a, b in zip(one, other, strict=True)))


def check(expert: Expert, store: Store) -> None:
    """Whether an expert says what its record has. Raises BadInput, Damaged."""
    experts = Experts(store.load(expert.seed, Seed), [expert], store)
    tokens_T = text(experts.seed.vocabulary, experts.seed.context)
    logp_2V, _ = experts.extend([0, 1], tokens_T, Text())
    said, seed = map(sample, logp_2V)
    if len(expert.probe) != len(said):
        raise BadInput(f"its record has {len(expert.probe)} log-probabilities of its probe, and {len(said)} are compared: train it again")
    compare(said, seed, expert.probe)


def _path(branch: Expert | Merged | Mixture, store: Store) -> Path:
    """Named by what is read: the seed and the two files."""
    files = (branch.files.get("adapter_config.json", ""), branch.files.get("adapter_model.safetensors", ""))
    name = fingerprint("probe", branch.seed, *files)
    return store.root / "work" / "probes" / name[:2] / f"{name}.json"
