"""Ensembles in which no expert moves a token's probability far, and other ways than the sum to make one distribution of several.

A bounded expert says log p~ = log p_seed + clip(log p - log p_seed, -c, c), renormalised. So it moves the odds between any two tokens by a
factor of e^(2c) from the seed's at most, and no token's probability by more: p~ <= e^(2c) p_seed. With c = 2 an installed backdoor loses
its effect where the seed finds the payload unlikely, and honest experts lose little (docs/verification.md). The bound is of one token: text
can still be steered inside it over many.

A of the candidates, B rows, T tokens, L tokens of a window, V vocabulary, W windows
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmwood.corpus.tokens import Windows
from elmwood.engine import Progress, silent
from elmwood.ensemble.forest import score_rows
from elmwood.records import Ensemble

if TYPE_CHECKING:
    from elmwood.ensemble.mixture import EnsembleLM, MixedText

Ints = NDArray[np.integer]


def bound(logp_V: Tensor, seed_V: Tensor, nats: float) -> Tensor:
    """Log-probabilities [..., V] whose ratio to the seed's is clipped, and that sum to one."""
    return torch.log_softmax(seed_V + (logp_V - seed_V).clamp(-nats, nats), -1)


# ---- several distributions -> one: log-probabilities [..., A, V] and weights [..., A] -> [..., V] ----------------------


def arithmetic(logp_AV: Tensor, weight_A: Tensor) -> Tensor:
    """The weighted sum of probabilities (c-BTM, arXiv:2303.14177)."""
    return torch.logsumexp(logp_AV + weight_A.log()[..., None], -2)


def geometric(logp_AV: Tensor, weight_A: Tensor) -> Tensor:
    """The weighted product of experts (Hinton 2002): one that is sure alone is outvoted by those that find a token unlikely."""
    return torch.log_softmax((weight_A[..., None] * logp_AV).sum(-2), -1)


def median(logp_AV: Tensor, weight_A: Tensor) -> Tensor:
    """Token by token the lower weighted median: less than half of the weight moves no token beyond what the others say."""
    sorted_AV, order_AV = logp_AV.sort(-2)
    below_AV = torch.take_along_dim(weight_A[..., None].expand_as(logp_AV), order_AV, -2).cumsum(-2)
    place_1V = (below_AV < 0.5 * weight_A.sum(-1)[..., None, None] - 1e-9).sum(-2, keepdim=True).clamp(max=logp_AV.shape[-2] - 1)
    return torch.log_softmax(torch.take_along_dim(sorted_AV, place_1V, -2).squeeze(-2), -1)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"arithmetic": arithmetic, "geometric": geometric, "median": median}


class BoundedLM:
    """An ensemble with bounded experts or another aggregation, as an LM. Weights are those of the ensemble without bounds."""

    def __init__(self, mixture: "EnsembleLM", ensemble: Ensemble):
        self.mixture, self.aggregate, self.nats = mixture, AGGREGATIONS[ensemble.aggregation], ensemble.bound
        self.bounded = {c for c, expert in enumerate(mixture.experts.experts) if expert.digest in ensemble.bounded}
        self.seed = len(mixture.experts) - 1
        self.stops, self.context, self.vocabulary, self.separator = mixture.stops, mixture.context, mixture.vocabulary, mixture.separator

    def combine(self, active: Sequence[int], logp_AV: Tensor, weight_A: Tensor, seed_V: Tensor) -> Tensor:
        """One distribution [..., V] of those of the active candidates [..., A, V]: the function of echo, table and generation."""
        parts = [
            bound(logp_V, seed_V, self.nats) if c in self.bounded else logp_V for c, logp_V in zip(active, logp_AV.unbind(-2), strict=True)
        ]
        return self.aggregate(torch.stack(parts, -2), weight_A.to(logp_AV.dtype))

    def score(self, tokens_BT: Any) -> Tensor:
        """log p(x_t | x_<t) [B, T], float32 on the CPU; each row is a document of its own."""
        return score_rows(self.score_windows, tokens_BT)

    @torch.inference_mode()
    def score_windows(self, windows: Windows, wanted_W: Ints, progress: Progress = silent) -> Tensor:
        """log p of the scored tokens of some windows (ascending), in order [n] float32 on the CPU: window by window, for all of the
        candidates' distributions are needed."""
        weighed = self.mixture.weigh(windows, wanted_W, progress)
        cut = weighed.windows
        window_n = np.repeat(np.arange(len(cut.length_W)), cut.count_W)
        found = []
        for w, length in enumerate(cut.length_W.tolist()):
            weight_tC = weighed.weight_nC[window_n == w]
            if not len(weight_tC):
                continue
            first, row_L = int(cut.score_from_W[w]), cut.rows_WL[w, :length]
            active = np.flatnonzero((weight_tC > 0).any(0)).tolist()
            said = {c: self.mixture.experts.predict(c, row_L[None, :-1])[0, first - 1 :] for c in {*active, self.seed}}
            logp_tAV = torch.stack([said[c] for c in active], 1)
            weight_tA = torch.from_numpy(weight_tC[:, active]).to(logp_tAV.device)
            logp_tV = self.combine(active, logp_tAV, weight_tA, said[self.seed])
            target_t1 = torch.as_tensor(row_L[first:], dtype=torch.long, device=logp_tV.device)[:, None]
            found.append(logp_tV.gather(1, target_t1)[:, 0].float().cpu())
        return torch.cat(found) if found else torch.zeros(0)

    def start(self) -> "MixedText":
        return self.mixture.start()

    def extend(self, tokens_T: Sequence[int], cache: "MixedText") -> tuple[Tensor, "MixedText"]:
        """Log-probabilities [V] of the token after these."""
        weight, logp = self.mixture.read(tokens_T, cache)
        seed_V = logp[self.seed] if self.seed in logp else self.mixture.experts.extend([self.seed], None, cache)[0][0]
        logp_AV = torch.stack([logp[c] for c in weight])
        weight_A = torch.tensor(list(weight.values()), dtype=torch.float64, device=logp_AV.device)
        return self.combine(list(weight), logp_AV, weight_A, seed_V).float().cpu(), cache
