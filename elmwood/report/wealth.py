"""Two drawings that stand in files of their own: wealth over blocks, and loss against the number of experts. Pure functions to SVG."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from elmwood.report.domains import LIGHT
from elmwood.report.formats import MINUS, shared, short, ticks

DOTS = 32  # points of a line without whiskers that are drawn one by one
WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 150, 46, 56  # around the panel; names stand on the right
POINTS = 600  # of a line, at most
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#6d6860}.title{font-size:15px;font-weight:600;fill:#1d1c1a}.grid{stroke:#e3ded4}"
    ".mark{stroke:#6d6860;stroke-dasharray:3 4}polyline{fill:none;stroke-width:2;stroke-linejoin:round}.whisker{stroke-width:1.2}"
    ".name{font-weight:600}"
)


class Line(NamedTuple):
    """What is drawn in one colour, with its name at the right end."""

    name: str
    x: Sequence[float] | NDArray[np.number]
    y: Sequence[float] | NDArray[np.floating]
    error: Sequence[float] | None = None  # one standard error each, drawn as whiskers on dots


class Ruler(NamedTuple):
    """Values -> places along one side, and where its ticks stand."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str

    def share(self, value: float) -> float:
        return (min(max(value, self.low), self.high) - self.low) / (self.high - self.low or 1)


def wealth_plot(for_T: NDArray[np.floating], against_T: NDArray[np.floating], *, alpha: float, beta: float, names: tuple[str, str]) -> str:
    """How the two gamblers' wealth grew: the first over its line says "better", the second over its own says "not better".

    `for_T` and `against_T` are natural logarithms; the axis is in powers of ten, and what is beyond it lies on its edge.
    """
    goals = (-math.log10(alpha), -math.log10(beta))
    paths = [np.asarray(path, np.float64) / math.log(10) for path in (for_T, against_T)]
    top = max(goals) + 1.0
    bottom = max(-4.0, min(-1.0, *(float(path.min(initial=0.0)) for path in paths)))
    levels = [level for level in range(math.floor(bottom), math.ceil(top) + 1) if bottom <= level <= top]
    y = Ruler(bottom, top, [(level, _power(level)) for level in levels], "wealth, of 1 at the start")
    x = _linear([0.0, max(1, len(for_T))], "blocks drawn", 0.0)
    lines = [Line(name, np.arange(len(path) + 1), np.concatenate([[0.0], path])) for name, path in zip(names, paths, strict=True)]
    marks = [(goal, f"{error:g} wrong") for goal, error in zip(goals, (alpha, beta), strict=True)]
    return _draw("Wealth over blocks", lines, x, y, marks)


def experts_plot(lines: Sequence[Line], *, reference: tuple[str, float] | None = None, by: str = "number of experts") -> str:
    """Bits per byte against the number of experts, or what `by` names, a line for each way. `reference` is a level to compare with.

    Numbers of which the largest is sixteen times the smallest stand at equal distances where one is twice the other."""
    ends = [(value, error) for line in lines for value, error in zip(line.y, line.error or [0.0] * len(line.y), strict=True)]
    levels = [value + sign * error for value, error in ends for sign in (-1, 1)] + ([reference[1]] if reference else [])
    numbers = [value for line in lines for value in line.x]
    y = _linear(levels, "bits per byte", 0.08)
    if 0 < 16 * min(numbers, default=0) <= max(numbers, default=0):
        lines = [line._replace(x=[math.log2(value) for value in line.x]) for line in lines]
        low, high = math.log2(min(numbers)), math.log2(max(numbers))
        x = Ruler(low, high, [(power, f"{2**power}") for power in range(math.ceil(low), math.floor(high) + 1)], by)
    else:
        x = _linear(numbers, by, 0.04)
        x = x._replace(ticks=[tick for tick in x.ticks if tick[0] == int(tick[0])])
    return _draw(f"Loss against the {by}", lines, x, y, [(reference[1], reference[0])] if reference else [])


def _linear(values: Sequence[float], title: str, margin: float) -> Ruler:
    low, high = min(values, default=0.0), max(values, default=1.0)
    air = margin * (high - low) or (0.5 if high == low else 0.0)
    chosen = ticks(low - air, high + air, 5)
    words = [short(value) for value in chosen] if high >= 1000 else shared(chosen)
    return Ruler(low - air, high + air, list(zip(chosen, words, strict=True)), title)


def _power(level: int) -> str:
    return (
        f"{10**level:,}"
        if 0 <= level <= 4
        else "10" + f"{level}".replace("-", MINUS).translate(str.maketrans("0123456789−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    )


def _draw(title: str, lines: Sequence[Line], x: Ruler, y: Ruler, marks: Sequence[tuple[float, str]]) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(value: float) -> float:
        return round(LEFT + x.share(value) * (right - LEFT), 1)

    def down(value: float) -> float:
        return round(bottom - y.share(value) * (bottom - TOP), 1)

    grid = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text x="{}" y="{y}" dy="4" text-anchor="end">{}</text>').format(
            LEFT, right, LEFT - 8, text, y=down(value)
        )
        for value, text in y.ticks
    ]
    grid += [
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(across(value), bottom + 20, text) for value, text in x.ticks
    ]
    grid += [
        Markup('<line class="mark" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text x="{}" y="{y}" dy="-5">{}</text>').format(
            LEFT, right, LEFT + 6, text, y=down(value)
        )
        for value, text in marks
    ]
    names = _apart([down(line.y[-1]) for line in lines])
    drawn = [_line(line, LIGHT[n % len(LIGHT)], across, down, (right + 10, names[n])) for n, line in enumerate(lines)]
    words = Markup('<text class="title" x="{}" y="24">{}</text><text x="{}" y="{}" text-anchor="middle">{}</text>').format(
        LEFT, title, (LEFT + right) / 2, HEIGHT - 12, x.title
    )
    words += Markup('<text transform="translate(18 {}) rotate(-90)" text-anchor="middle">{}</text>').format((TOP + bottom) / 2, y.title)
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{}">'
            '<style>{}</style><rect width="{w}" height="{h}" fill="#fffdf9"/>{}{}{}</svg>'
        ).format(title, Markup(STYLE), Markup("").join(grid), words, Markup("").join(drawn), w=WIDTH, h=HEIGHT)
    )


def _line(line: Line, colour: str, across, down, name: tuple[float, float]) -> Markup:
    chosen = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), POINTS)).astype(int))
    spots = " ".join(f"{across(line.x[n])},{down(line.y[n])}" for n in chosen)
    made = Markup('<polyline stroke="{}" points="{}"/>').format(colour, spots)
    for n, error in enumerate(line.error or ()):
        made += Markup('<line class="whisker" stroke="{}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(
            colour, down(line.y[n] - error), down(line.y[n] + error), x=across(line.x[n])
        )
    for x, y in zip(line.x, line.y, strict=True) if line.error or len(line.x) <= DOTS else ():
        made += Markup('<circle cx="{}" cy="{}" r="3.5" fill="{}"/>').format(across(x), down(y), colour)
    return made + Markup('<text class="name" x="{}" y="{}" dy="4" style="fill:{}">{}</text>').format(*name, colour, line.name)


def _apart(height_L: Sequence[float], least: float = 17) -> list[float]:
    """Heights of names, moved down where they would cover one another."""
    placed = list(height_L)
    last = -math.inf
    for n in sorted(range(len(placed)), key=lambda n: placed[n]):
        placed[n] = last = max(placed[n], last + least)
    return placed
