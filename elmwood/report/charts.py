"""The drawings on the page, as pure functions to SVG. Positions are in per cent of the width, so text has the same size on any screen.

Colours, fonts and dark mode are in the style sheet.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from elmwood.records import Contest
from elmwood.report.data import Curve
from elmwood.report.domain_map import COLOURS
from elmwood.report.formats import tick_labels, ticks, with_prefix

TALL = 30  # height of a row in pixels
SHADES = 8  # of the image of many weights
LIGHTEST = 1 / 64  # weight of a cell that is drawn there
LIKELY = 1.96  # standard errors on each side of a mean that cover 95 % of a normal distribution


class Scale(NamedTuple):
    """Values -> per cent of the width or height of a drawing."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        """The position, rounded to 0.01."""
        return round(100 * (value - self.low) / (self.high - self.low), 2) if self.high > self.low else 50.0


def scale_over(values: Sequence[float], margin: float = 0.05) -> Scale:
    """A scale that covers these values, with a margin."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    air = margin * (high - low) or 0.01
    return Scale(low - air, high + air)


def draw_axis(scale: Scale) -> Markup:
    """The numbers above a column of rows."""
    chosen = [value for value in ticks(scale.low, scale.high, 3) if 4 < scale(value) < 96]
    words = (
        Markup('<text x="{}%" y="15">{}</text>').format(scale(value), text) for value, text in zip(chosen, tick_labels(chosen), strict=True)
    )
    return Markup('<svg class="axis" width="100%" height="20" aria-hidden="true">{}</svg>').format(Markup("").join(words))


def draw_estimate(value: float, error: float | None, scale: Scale, *, role: str, mark: float | None = None, label: str = "") -> Markup:
    """A dot with error bars: the thick line is one standard error, the thin line covers 95 %. `mark` is a value to compare with."""
    lines = _grid([value for value in ticks(scale.low, scale.high, 3) if 4 < scale(value) < 96], scale)
    if mark is not None:
        lines += Markup('<line class="mark" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(scale(mark))
    if error:
        for name, wide in (("thin", LIKELY * error), ("thick", error)):
            lines += Markup('<line class="{}" x1="{}%" x2="{}%" y1="50%" y2="50%"/>').format(name, scale(value - wide), scale(value + wide))
    dot = Markup('<circle cx="{}%" cy="50%" r="4"/>').format(scale(value))
    return Markup('<svg class="row {}" width="100%" height="{}" role="img" aria-label="{}">{}{}</svg>').format(
        role, TALL, label, lines, dot
    )


def draw_reference(scale: Scale, role: str) -> Markup:
    """The row that others are compared with: a circle at zero."""
    return Markup(
        '<svg class="row {} ring" width="100%" height="{}" role="img" aria-label="the reference">{}<line class="mark" x1="{x}%" x2="{x}%" '
        'y1="0" y2="100%"/><circle cx="{x}%" cy="50%" r="4"/></svg>'
    ).format(role, TALL, _grid([value for value in ticks(scale.low, scale.high, 3) if 4 < scale(value) < 96], scale), x=scale(0))


def draw_bar(value: float, most: float, *, domain: int, mark: float | None = None, label: str = "") -> Markup:
    """A bar in the colour of a domain, with a tick at another value."""
    scale = Scale(0, most or 1)
    tick = (
        ""
        if mark is None
        else Markup(
            '<line class="halo" x1="{0}%" x2="{0}%" y1="5" y2="17"/><line class="mark" x1="{0}%" x2="{0}%" y1="3" y2="19"/>'
        ).format(scale(mark))
    )
    return Markup(
        '<svg class="bar c{}" width="100%" height="22" role="img" aria-label="{}"><rect y="5" height="12" width="{}%" rx="1.5"/>{}</svg>'
    ).format(domain % COLOURS, label, scale(value), tick)


def draw_cell(weight: float, *, digits: bool = True, own: bool = False, label: str = "") -> Markup:
    """One cell of the routing matrix: darker for more weight."""
    share = round(min(1.0, max(0.0, weight)), 3)
    words = f"{round(100 * share)}" if digits and share >= 0.005 else ""
    return Markup(
        '<svg class="heat{}{}" width="100%" height="30" role="img" aria-label="{}"><title>{}</title>'
        '<rect width="100%" height="100%" fill-opacity="{}"/><text x="50%" y="19.5">{}</text></svg>'
    ).format(" own" if own else "", " full" if share > 0.55 else "", label, label, share, words)


def draw_heat(weight_KC: Sequence[Sequence[float]], about: str) -> Markup:
    """The routing matrix of many experts as one image: a path for each of SHADES, of the cells that are at least as dark as the lightest.
    A row of weights sums to one, so the size grows with the rows alone."""
    cells: list[list[str]] = [[] for _ in range(SHADES)]
    for row, weight_C in enumerate(weight_KC):
        for column, weight in enumerate(weight_C):
            if weight >= LIGHTEST:
                cells[min(SHADES - 1, int(SHADES * weight))].append(f"M{column} {row}h1v1h-1z")
    paths = Markup("").join(
        Markup('<path fill-opacity="{}" d="{}"/>').format(round((level + 1) / SHADES, 3), "".join(some))
        for level, some in enumerate(cells)
        if some
    )
    return Markup(
        '<svg class="matrix" width="100%" viewBox="0 0 {} {}" preserveAspectRatio="none" shape-rendering="crispEdges" role="img" '
        'aria-label="{}">{}</svg>'
    ).format(max(map(len, weight_KC)), len(weight_KC), about, paths)


def draw_losses(found: Sequence[Curve], about: str) -> Markup:
    """Loss against tokens. The axis ends above most of the points, since the loss at the start of training is much higher."""
    losses = sorted(loss for curve in found for _, loss in curve.points)
    top = losses[-1] if len(losses) < 20 else min(losses[-1], losses[0] + 1.6 * (losses[int(0.9 * len(losses))] - losses[0]))
    return _panel(found, about, scale_over([losses[0], top] if losses else [0, 1]))


def draw_growth(losses: Sequence[tuple[float, float]], levels: Sequence[tuple[float, str]], about: str) -> Markup:
    """Loss and its standard error against the number of experts, with named levels such as that of the seed."""
    line = Curve(name="with so many experts", role="result", points=tuple((n + 1, loss) for n, (loss, _) in enumerate(losses)))
    ends = [loss + sign * error for loss, error in losses for sign in (-1, 1)]
    y_scale = scale_over([*ends, *(level for level, _ in levels)])
    x_scale = Scale(0, len(losses))
    spots = Markup("").join(
        Markup('<line x1="{0}%" x2="{0}%" y1="{1}%" y2="{2}%"/><circle cx="{0}%" cy="{3}%" r="3.5"/>').format(
            x_scale(n + 1), *(round(100 - y_scale(value), 2) for value in (loss - error, loss + error, loss))
        )
        for n, (loss, error) in enumerate(losses)
    )
    return _panel([line], about, y_scale, marks=levels, over=spots, whole=True)


def draw_wealth(found: Contest, about: str) -> Markup:
    """Log wealth of both bettors against blocks drawn, and the level that each has to reach."""
    paths = [tuple((float(look[0]), look[place]) for look in found.wealth) for place in (1, 2)]
    goals = [(-math.log10(error), text) for error, text in ((found.alpha, "better"), (found.beta, "not better"))]
    top, floor = max(goal for goal, _ in goals) + 0.8, max(-4.0, min(-0.5, *(point[1] for path in paths for point in path)))
    lines = [
        Curve(name=name, role="result", points=((0.0, 0.0), *path)) for name, path in zip(("better", "not better"), paths, strict=True)
    ]
    return _panel(lines, about, Scale(floor, top), marks=[(goal, f"{text} is decided") for goal, text in goals], words=_tens, whole=True)


def _tens(levels: list[float]) -> list[str]:
    return [f"{10**level:g}" if level == int(level) else "" for level in levels]


def _panel(
    found: Sequence[Curve], about: str, y_scale: Scale, *, marks: Sequence[tuple[float, str]] = (), over: Markup | str = "",
    words: Callable[[list[float]], list[str]] = tick_labels, whole: bool = False,
) -> Markup:  # fmt: skip
    """Lines on a grid. `marks` are named levels, `over` is drawn above the lines, `whole`: ticks of the x axis are whole numbers only."""
    x_scale = Scale(0, max((x for curve in found for x, _ in curve.points), default=1) or 1)
    lines = Markup("").join(_line(curve, dress, x_scale, y_scale) for curve, dress in zip(found, line_classes(found), strict=True))
    levels = [level for level in ticks(y_scale.low, y_scale.high, 4) if words is tick_labels or level == int(level)]
    steps = [value for value in ticks(0, x_scale.high, 4) if value and not (whole and value != int(value))]
    across = Markup("").join(
        Markup('<line class="grid" x1="0" x2="100%" y1="{0}%" y2="{0}%"/><text class="level" x="-8" y="{0}%" dy="4">{1}</text>').format(
            round(100 - y_scale(value), 2), text
        )
        for value, text in zip(levels, words(levels), strict=True)
    )
    across += Markup("").join(
        Markup('<line class="goal" x1="0" x2="100%" y1="{0}%" y2="{0}%"/><text class="named" x="4" y="{0}%" dy="-5">{1}</text>').format(
            round(100 - y_scale(value), 2), text
        )
        for value, text in marks
    )
    along = Markup("").join(
        Markup('<text class="{}" x="{}%" y="100%" dy="16">{}</text>').format(
            "last" if x_scale(value) > 93 else "step", x_scale(value), with_prefix(value)
        )
        for value in steps
    )
    return Markup(
        '<svg class="curves" width="100%" height="240" role="img" aria-label="{}">{}<svg viewBox="0 0 100 100" preserveAspectRatio="none" '
        'width="100%" height="100%">{}</svg>{}{}</svg>'
    ).format(about, across, lines, over, along)


def line_classes(found: Sequence[Curve]) -> list[str]:
    """The CSS class of each line: the colour of its domain, or a dash pattern."""
    return [f"line-{place % 4}" if curve.domain is None else f"c{curve.domain % COLOURS}" for place, curve in enumerate(found)]


def _line(curve: Curve, dress: str, x_scale: Scale, y_scale: Scale) -> Markup:
    spots = " ".join(f"{x_scale(tokens):g},{round(100 - y_scale(loss), 2):g}" for tokens, loss in curve.points)
    return Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(dress, spots, curve.name)


def _grid(values: Sequence[float], scale: Scale) -> Markup:
    return Markup("").join(Markup('<line class="grid" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(scale(value)) for value in values)
