"""How soon a sequential comparison answers, and how often wrongly, on simulated differences.

    python -m benches.peers.sequential [--runs 2000]          under five minutes on one core

One JSON line per setting. Simulated blocks have heavy tails (half near zero, half Student's t with three degrees of freedom; a seventh
of the variance between 18 domains), clipped at five standard deviations. r is the standard deviation over the mean. The null with rare
large losses is a little better nearly everywhere and broken on one block in a hundred. Every mean is exact for the population that is
drawn from. Every test may be looked at after each block, unless a line states otherwise. Peers are measured on the same draws: a t-test
after every 10 blocks, the asymptotic confidence sequence (normal mixture, arXiv:2103.06476), and the size of the fixed-size test at 90 %
power by its formula.

S runs, N blocks, T draws
"""

import time
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benches.common import parser, say
from elmwood.evaluate.sequential.betting import Draws, draws_to_reject, wealth
from elmwood.evaluate.sequential.decision import Population, StoppingRule, decide

Floats = NDArray[np.floating]

ALPHA, BETA = 0.05, 0.1
CLIP = 5.0  # standard deviations
DOMAINS, BETWEEN = 18, 0.15
WORST = 30.0  # of rare losses, in the unit of their logarithm's spread; a floor that is known, as a mixture's is
CELLS = 4_000_000  # numbers in one array
RATIOS = (3, 5, 10, 20)
TRUTHS = (-1.0, 0.0, 0.5, 1.0, 2.0)  # effects, in least effects
CAP = 5000
TUNED = 500  # draws at which the asymptotic sequence is tightest


def heavy(rng: np.random.Generator, runs: int, size: int) -> Floats:
    """Differences of spread about one and mean exactly zero, within CLIP."""
    tail_SN = np.where(rng.random((runs, size)) < 0.5, 0.1 * rng.standard_normal((runs, size)), rng.standard_t(3, (runs, size)))
    tail_SN *= np.sqrt(1 - BETWEEN) / tail_SN.std(1, keepdims=True)
    shared_SN = np.take_along_axis(rng.standard_normal((runs, DOMAINS)), rng.integers(DOMAINS, size=(runs, size)), 1)
    value_SN = np.clip(tail_SN + np.sqrt(BETWEEN) * shared_SN, 0.6 - CLIP, CLIP - 0.6)
    value_SN -= value_SN.mean(1, keepdims=True)
    assert np.abs(value_SN).max() <= CLIP  # clipped once more, the mean would not be zero: 0.6 is six deviations of the domains' mean
    return value_SN


def rare(rng: np.random.Generator, runs: int, size: int) -> Floats:
    """A little better nearly everywhere, broken on one block in a hundred; mean exactly zero."""
    loss_SN = np.where(rng.random((runs, size)) < 0.01, np.minimum(rng.lognormal(1, 1, (runs, size)), WORST), 0)
    value_SN = 0.05 * rng.standard_normal((runs, size)) - loss_SN
    return value_SN - value_SN.mean(1, keepdims=True)


def batches(runs: int, size: int) -> Iterator[tuple[np.random.Generator, int]]:
    """Runs in parts that fit into memory, each with its own randomness."""
    most = max(1, CELLS // size)
    for place, start in enumerate(range(0, runs, most)):
        yield np.random.default_rng((17, place)), min(most, runs - start)


# ---- errors ---------------------------------------------------------------------------------------------------------


def accepted(value_SN: Floats, low: float) -> dict[str, NDArray[np.bool_]]:
    """Which tests ever accepted, one-sided, at any look until all blocks were drawn [S]."""
    mean_ST, error_ST, count_T = running(value_SN, np.arange(30, value_SN.shape[1] + 1))
    rho2 = (-2 * np.log(2 * ALPHA) + np.log(1 - 2 * np.log(2 * ALPHA))) / TUNED
    width_T = np.sqrt(2 * (count_T * rho2 + 1) / (count_T * rho2) * np.log(1 + np.sqrt(count_T * rho2 + 1) / (2 * ALPHA)))
    score_ST = mean_ST / error_ST
    asymptotic_ST = score_ST > width_T
    return {
        "betting": draws_to_reject(wealth(Draws(value_SN, value_SN.shape[1], low, -low), np.array(0.0)), ALPHA) > 0,
        "t-test every 10": (score_ST[:, ::10] > stats.t.ppf(1 - ALPHA, count_T[::10] - 1)).any(1),
        **{f"asymptotic from {first}": asymptotic_ST[:, first - 30 :].any(1) for first in (30, 100, 400)},
    }


def running(value_ST: Floats, count_T: NDArray[np.integer]) -> tuple[Floats, Floats, NDArray[np.integer]]:
    """Means and their standard errors after some counts of draws."""
    first_ST, second_ST = np.cumsum(value_ST, 1)[:, count_T - 1], np.cumsum(value_ST**2, 1)[:, count_T - 1]
    mean_ST = first_ST / count_T
    variance_ST = np.maximum(second_ST - count_T * mean_ST**2, 1e-30) / (count_T - 1)
    return mean_ST, np.sqrt(variance_ST / count_T), count_T


def say_errors(null: str, size: int, found: dict[str, Floats]) -> None:
    runs = len(found["betting"])
    error = round(float(np.sqrt(ALPHA * (1 - ALPHA) / runs)), 4)
    say("sequential", setting="false accepts", null=null, N=size, runs=runs, alpha=ALPHA, standard_error=error,
        **{method: round(float(wrong_S.mean()), 4) for method, wrong_S in found.items()})  # fmt: skip


def rare_losses(runs: int) -> None:
    for size in (10_000, 100_000):
        say_errors("rare large losses", size, gather(accepted(rare(rng, some, size), -WORST - 1) for rng, some in batches(runs, size)))


def gather(parts: Iterable[dict]) -> dict:
    """Parts of a table, put together along the runs."""
    rows = list(parts)
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


# ---- blocks ---------------------------------------------------------------------------------------------------------


def fixed(ratio: float, size: int) -> int:
    """Blocks of the fixed-size test with 90 % power, were r known beforehand."""
    plain = (stats.norm.ppf(1 - ALPHA) + stats.norm.ppf(1 - BETA)) ** 2 * ratio**2
    return int(np.ceil(plain / (1 + plain / size)))


def heavy_tails(runs: int) -> None:
    """Errors, blocks to accept a mean of one r-th of the spread, and both bettors, all on the same populations."""
    for size in (10_000, 100_000):
        wrong, sooner, answers = [], [], []
        for rng, some in batches(runs, size):
            value_SN = heavy(rng, some, size)
            wrong.append(accepted(value_SN, -CLIP))
            sooner.append({r: better(value_SN[:, : min(size, 75 * r**2)] + 1 / r, size) for r in RATIOS})
            answers.append({(r, truth): both(value_SN[:, : most(r)] + truth / r, size, 1 / r) for r in RATIOS[1:] for truth in TRUTHS})
        say_errors("heavy tails", size, gather(wrong))
        for r, drawn_S in gather(sooner).items():
            say_power(size, r, drawn_S)
        for (r, truth), answer_S2 in gather(answers).items():
            say_outcomes(size, r, truth, answer_S2)


def most(ratio: int) -> int:
    """Blocks before it stays undecided."""
    return min(CAP, 75 * ratio**2)


def better(value_ST: Floats, size: int, mean: float = 0.0, alpha: float = ALPHA) -> NDArray[np.integer]:
    """Draws it took to reject "at most this mean" [S]; 0: never."""
    return draws_to_reject(wealth(Draws(value_ST, size, -CLIP - 1, CLIP + 1), np.array(mean)), alpha)


def both(value_ST: Floats, size: int, least: float) -> NDArray[np.integer]:
    """Draws that "better" and "not better by the least effect" took [S, 2]; 0: never."""
    return np.stack([better(value_ST, size), better(-value_ST, size, -least, BETA)], 1)


def say_power(size: int, ratio: int, drawn_S: Floats) -> None:
    blocks = np.where(drawn_S > 0, drawn_S, min(size, 75 * ratio**2))
    say("sequential", setting="blocks to accept", N=size, r=ratio, runs=len(drawn_S), power=round(float((drawn_S > 0).mean()), 4),
        mean=round(float(blocks.mean()), 1), p90=round(float(np.quantile(blocks, 0.9))), fixed_size=fixed(ratio, size),
        full_over_mean=round(size / blocks.mean(), 1))  # fmt: skip


def say_outcomes(size: int, ratio: int, truth: float, answer_S2: Floats) -> None:
    """r is the spread over the least effect; the truth is so many of these."""
    for_S, against_S = np.where(answer_S2 > 0, answer_S2, most(ratio) + 1).T
    shares = {"better": for_S < against_S, "not_better": against_S < for_S, "undecided": for_S == against_S}
    say("sequential", setting="three outcomes", N=size, cap=most(ratio), r=ratio, effect_over_least=truth, runs=len(for_S),
        mean=round(float(np.minimum(np.minimum(for_S, against_S), most(ratio)).mean()), 1),
        **{name: round(float(share_S.mean()), 3) for name, share_S in shares.items()})  # fmt: skip


def zeros(runs: int, share: float = 0.05) -> None:
    """A change that touches one block in twenty: drawing from all blocks, or from those it can touch. r is within these."""
    for size in (10_000, 100_000):
        inside = int(share * size)
        for ratio in (2, 3, 5, 10):
            blocks: dict[str, list[Floats]] = {"all": [], "touched": []}
            for rng, some in batches(runs, size):
                value_SN = heavy(rng, some, inside) + 1 / ratio
                padded_SN = np.zeros((some, size))
                padded_SN[:, :inside] = value_SN
                for name, draws_SN in (("touched", value_SN), ("all", rng.permuted(padded_SN, axis=1))):
                    drawn = better(draws_SN, draws_SN.shape[1])
                    blocks[name].append(np.where(drawn > 0, drawn, draws_SN.shape[1]))
            means = {name: round(float(np.concatenate(part).mean()), 1) for name, part in blocks.items()}
            say("sequential", setting="structural zeros", N=size, within=inside, r=ratio, runs=runs, **means,
                saving=round(means["all"] / means["touched"], 1), full_over_touched=round(size / means["touched"], 1))  # fmt: skip


def controls(runs: int, size: int = 20_000) -> None:
    """What predictions from columns already there save, when they explain this share of the variance."""
    for ratio in (5, 10):
        for explained in (0.0, 0.2, 0.5, 0.8):
            drawn: dict[str, list[int]] = {"plain": [], "with features": []}
            for run in range(runs):
                rng = np.random.default_rng((23, run))
                known_B = rng.standard_normal(size)
                value_B = np.clip(np.sqrt(explained) * known_B + np.sqrt(1 - explained) * heavy(rng, 1, size)[0], -CLIP, CLIP)
                value_B += 1 / ratio - value_B.mean()
                feature_BF = np.column_stack([known_B, rng.standard_normal((size, 3))])
                order_B = rng.permutation(size)
                bounds = Population(np.full(size, -CLIP), np.full(size, CLIP + 1), size)
                rule = StoppingRule(alpha=ALPHA, beta=1e-9, worthless=-9.0, cap=size)
                for name, blocks in (("plain", bounds), ("with features", bounds._replace(feature_BF=feature_BF))):
                    found = decide(lambda places, value_B=value_B: value_B[places], order_B, blocks, rule)
                    drawn[name].append(int(draws_to_reject(found.for_T, ALPHA)) or found.drawn)
            means = {name: round(float(np.mean(part)), 1) for name, part in drawn.items()}
            say("sequential", setting="control variates", N=size, r=ratio, explained=explained, runs=runs, **means,
                saving=round(means["plain"] / means["with features"], 2))  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", type=int, default=2000)
    asked = options.parse_args()
    started = time.perf_counter()
    heavy_tails(asked.runs)
    rare_losses(asked.runs)
    zeros(max(1, asked.runs // 4))
    controls(max(1, asked.runs // 50))
    say("sequential", setting="whole run", seconds=round(time.perf_counter() - started))


if __name__ == "__main__":
    main()
