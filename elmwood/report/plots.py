"""Drawings in files of their own, as pure functions to SVG: the wealth of a sequential test, loss against the number of experts or over
hours, and the load of the experts of a mixture.

L layers, D domains, E experts
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from elmwood.report.domain_map import LIGHT
from elmwood.report.formats import MINUS, tick_labels, ticks, with_prefix
from elmwood.units import printable

DOTS = 32  # a line without error bars and with at most so many points has dots
WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 150, 46, 56  # margins of the panel; names are on the right
POINTS = 600  # points of a line, at most
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#6d6860}.title{font-size:15px;font-weight:600;fill:#1d1c1a}.grid{stroke:#e3ded4}"
    ".mark{stroke:#6d6860;stroke-dasharray:3 4}polyline{fill:none;stroke-width:2;stroke-linejoin:round}.whisker{stroke-width:1.2}"
    ".name{font-weight:600}"
)


Floats = NDArray[np.floating]


class Series(NamedTuple):
    """A line in one colour, with its name at the right end."""

    name: str
    x: Sequence[float] | NDArray[np.number]
    y: Sequence[float] | NDArray[np.floating]
    error: Sequence[float] | None = None  # standard errors, drawn as bars


class Ruler(NamedTuple):
    """An axis: its range, ticks and title."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str

    def share(self, value: float) -> float:
        return (min(max(value, self.low), self.high) - self.low) / (self.high - self.low or 1)


def wealth_plot(for_T: NDArray[np.floating], against_T: NDArray[np.floating], *, alpha: float, beta: float, names: tuple[str, str]) -> str:
    """The wealth of the two bettors of a sequential test. "Better" is decided when the first crosses its line, "not better" when the
    second does.

    `for_T` and `against_T` are natural logarithms. The axis is in powers of ten; values beyond it are drawn on its edge.
    """
    goals = (-math.log10(alpha), -math.log10(beta))
    paths = [np.asarray(path, np.float64) / math.log(10) for path in (for_T, against_T)]
    top = max(goals) + 1.0
    bottom = max(-4.0, min(-1.0, *(float(path.min(initial=0.0)) for path in paths)))
    levels = [level for level in range(math.floor(bottom), math.ceil(top) + 1) if bottom <= level <= top]
    y = Ruler(bottom, top, [(level, _power(level)) for level in levels], "wealth, of 1 at the start")
    x = _linear([0.0, max(1, len(for_T))], "blocks drawn", 0.0)
    lines = [Series(name, np.arange(len(path) + 1), np.concatenate([[0.0], path])) for name, path in zip(names, paths, strict=True)]
    marks = [(goal, f"{error:g} wrong") for goal, error in zip(goals, (alpha, beta), strict=True)]
    return _draw("Wealth over blocks", lines, x, y, marks)


def experts_plot(lines: Sequence[Series], *, reference: tuple[str, float] | None = None, by: str = "number of experts") -> str:
    """Bits per byte against the number of experts, or what `by` names. `reference` is a level to compare with.

    The axis is logarithmic if the largest number is at least sixteen times the smallest."""
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


def hours_plot(lines: Sequence[Series], title: str) -> str:
    """Loss relative to another run's, over hours on a logarithmic axis."""
    logs = [line._replace(x=[math.log10(value) for value in line.x]) for line in lines]
    ends = [value for line in logs for value in line.x]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    x = Ruler(low, high, [(power, _power(power)) for power in range(math.ceil(low), math.floor(high) + 1)], "hours")
    return _draw(
        title, logs, x, _linear([value for line in lines for value in line.y], "loss, relative to that of ddp at the end", 0.06), []
    )


def _linear(values: Sequence[float], title: str, margin: float) -> Ruler:
    low, high = min(values, default=0.0), max(values, default=1.0)
    air = margin * (high - low) or (0.5 if high == low else 0.0)
    chosen = ticks(low - air, high + air, 5)
    words = [with_prefix(value) for value in chosen] if high >= 1000 else tick_labels(chosen)
    return Ruler(low - air, high + air, list(zip(chosen, words, strict=True)), title)


def _power(level: int) -> str:
    return (
        f"{10**level:,}"
        if 0 <= level <= 4
        else "10" + f"{level}".replace("-", MINUS).translate(str.maketrans("0123456789−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    )


def _draw(title: str, lines: Sequence[Series], x: Ruler, y: Ruler, marks: Sequence[tuple[float, str]]) -> str:
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
    return printable(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{}">'
            '<style>{}</style><rect width="{w}" height="{h}" fill="#fffdf9"/>{}{}{}</svg>'
        ).format(title, Markup(STYLE), Markup("").join(grid), words, Markup("").join(drawn), w=WIDTH, h=HEIGHT)
    )


def _line(line: Series, colour: str, across, down, name: tuple[float, float]) -> Markup:
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
    """Heights of names, moved down where they would overlap."""
    placed = list(height_L)
    last = -math.inf
    for n in sorted(range(len(placed)), key=lambda n: placed[n]):
        placed[n] = last = max(placed[n], last + least)
    return placed


# ---- the load of the experts of a mixture ------------------------------------------------------------------------------

NAMES, HEAD, CELL, TALL, GAP = 210, 58, 46, 22, 44  # pixels; names are on the left
SHOWN = 3  # layers drawn by domain: the first, the middle, the last
LOADS_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#6d6860}.title{font-size:15px;font-weight:600;fill:#1d1c1a}"
    ".head{font-weight:600;fill:#1d1c1a}"
    ".in{fill:#fffdf9}.dead{fill:none;stroke:#b3261e;stroke-width:1.5}"
)


def loads_plot(share_LDE: Floats, layers: Sequence[str], domains: Sequence[str], experts: Sequence[str], dead: float) -> str:
    """The share of the weight of each expert in per cent: in each layer over all domains, and by domain in three layers. Cells are darker
    for more weight; an expert with less than `dead` times an equal share is framed."""
    chosen = sorted({0, len(layers) // 2, len(layers) - 1}) if len(layers) > SHOWN else range(len(layers))
    panels = [
        ("all text", [f"layer {layer}" for layer in layers], share_LDE.mean(1)),
        *((f"layer {layers[n]}", list(domains), share_LDE[n]) for n in chosen),
    ]
    rows = sum(len(names) for _, names, _ in panels)
    width, height = NAMES + CELL * len(experts) + 24, HEAD + rows * TALL + GAP * len(panels)
    drawn, top = [], HEAD
    for title, names, share_RE in panels:
        drawn.append(_loads_panel(title, names, share_RE, experts, dead / len(experts), top))
        top += TALL * len(names) + GAP
    title = "Load of the experts, per cent of the weight"
    return printable(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{title}">'
            '<style>{}</style><rect width="{w}" height="{h}" fill="#fffdf9"/><text class="title" x="12" y="24">{title}</text>{}</svg>'
        ).format(Markup(LOADS_STYLE), Markup("").join(drawn), w=width, h=height, title=title)
    )


def _loads_panel(title: str, names: Sequence[str], share_RE: Floats, experts: Sequence[str], dead: float, top: int) -> Markup:
    made = Markup('<text class="head" x="12" y="{}">{}</text>').format(top - 8, title)
    for e, expert in enumerate(experts):
        made += Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(NAMES + CELL * (e + 0.5), top - 8, expert)
    for r, name in enumerate(names):
        y = top + r * TALL
        made += Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(NAMES - 10, y + 15, name)
        for e, share in enumerate(share_RE[r]):
            made += _cell(float(share), NAMES + CELL * e, y, share < dead)
    return made


def _cell(share: float, x: int, y: int, dead: bool) -> Markup:
    ink = round(min(1.0, share**0.5), 3)  # the root makes small differences visible
    box = Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2" fill="{}" fill-opacity="{}"/>').format(
        x + 1, y + 1, CELL - 2, TALL - 2, LIGHT[0], ink
    )
    box += Markup('<text{} x="{}" y="{}" text-anchor="middle">{}</text>').format(
        Markup(' class="in"') if ink > 0.6 else "", x + CELL / 2, y + 15, round(100 * share)
    )
    if dead:
        box += Markup('<rect class="dead" x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(x + 2, y + 2, CELL - 4, TALL - 4)
    return box
