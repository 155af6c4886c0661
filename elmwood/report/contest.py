"""The result of a sequential test of two models in words, for the command line and the page."""

from elmwood.records import Contest
from elmwood.report.formats import MINUS

WEALTH = 9.0  # powers of ten beyond which wealth is not given as a number


def headline(found: Contest) -> str:
    """The answer in a sentence."""
    a, b = found.names
    if found.outcome == "better":
        return f"{b} is better than {a}"
    if found.outcome == "not better":
        return f"{b} is not better than {a} by {found.min_effect:g} bits per byte"
    return f"undecided after {found.drawn:,} blocks: raise --cap, or ask for a larger --min-effect"


def lines(found: Contest) -> list[tuple[str, str]]:
    """The effect and its interval, the blocks, the wealth, the data and what was not tested: (word, text)."""
    part = found.touched < found.blocks
    exact = found.drawn == found.touched
    interval = f"from {number(found.low)} to {number(found.high)}, wrong below {found.alpha:.0%} and above {found.beta:.0%} of the time"
    interval = "exact for these blocks" if exact else f"{interval}, at any look"
    value = found.effect if found.estimand == "mean" else found.effect - found.clip_effect  # what the interval is of
    effect = f"{number(value)} bits per byte {'where it can differ' if part else 'over all blocks'} ({interval})"
    if part:
        effect += f"; {number(value * found.touched / found.blocks, 5)} over all blocks"
    blocks = f"{found.drawn:,} of {found.touched:,} drawn"
    if found.moved < 1 and not exact:
        blocks += f" by the weight that moves, {found.moved:.0%} of it on average"
    if part:
        blocks += f"; the other {found.blocks - found.touched:,} of {found.blocks:,} cannot differ"
    judged = f"the {found.estimand} over the {found.split} split of {found.holdout[:24]}… ({found.protocol})"
    if found.estimand != "mean":
        judged += f", clipped at {found.clip:g} where all weight moves: {found.clipped} drawn blocks beyond"
        judged += f", {number(found.effect)} as they are" if found.clipped else ""
    found_lines = [("effect", effect), ("blocks", blocks)]
    if found.wealth and not exact:
        _, above, below = found.wealth[-1]
        found_lines.append(("wealth", f"{power(above)} of 1 for “better” ({1 / found.alpha:g} decide), {power(below)} for “not better by "
                               f"{found.min_effect:g}” ({1 / found.beta:g} decide)"))  # fmt: skip
    return [
        *found_lines,
        ("judged", judged),
        ("order", f"{found.order[:16]}…, fixed by the two models and the text; no error budget was charged"),
        ("not run", "text generation, benchmarks, the audit split"),
    ]


def number(value: float, digits: int = 4) -> str:
    """Signed, with a true minus."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def power(log10: float) -> str:
    """A wealth in words or digits."""
    if abs(log10) >= WEALTH:
        return "more than 10⁹" if log10 > 0 else "less than 10⁻⁹"
    return f"{10**log10:,.3g}"
