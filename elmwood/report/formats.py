"""Numbers as the report shows them."""

import math
from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"


def with_prefix(value: float) -> str:
    """1234567 -> 1.23 M: three digits and an SI prefix after a no-break space."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return (
                f"{value / size:.3g}\N{NO-BREAK SPACE}{unit}"
                if abs(value) < 999.5 * size
                else f"{value / size:,.0f}\N{NO-BREAK SPACE}{unit}"
            )
    return f"{value:.3g}" if value != int(value) else f"{int(value)}"


def spell_time(seconds: float) -> str:
    """Seconds in at most two units: 3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def signed(value: float, digits: int) -> str:
    """+0.012, −0.012, and 0.000 without a sign."""
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else ("+" if value > 0 else MINUS) + text


def digits(errors: Iterable[float | None], fewest: int = 2, most: int = 4) -> int:
    """Number of decimals that shows two significant digits of the smallest error."""
    known = [error for error in errors if error and math.isfinite(error)]
    return min(most, max(fewest, 1 - math.floor(math.log10(min(known))))) if known else most - 1


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a range, about as many as asked for."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def tick_labels(values: list[float]) -> list[str]:
    """Tick labels with the same number of decimals, as many as needed, and true minus signs."""
    decimals = max((len(f"{value:.10f}".rstrip("0").partition(".")[2]) for value in values), default=0)
    return [f"{value:.{decimals}f}".replace("-", MINUS) for value in values]
