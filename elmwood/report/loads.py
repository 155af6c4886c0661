"""Who does the work in a mixture of experts: a drawing that stands in a file of its own. A pure function to SVG.

L layers, D domains, E experts
"""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from elmwood.report.domains import LIGHT

Floats = NDArray[np.floating]

LEFT, TOP, CELL, TALL, GAP = 210, 58, 46, 22, 44  # pixels; names stand on the left
SHOWN = 3  # layers whose domains are drawn: the first, the middle, the last
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#6d6860}.title{font-size:15px;font-weight:600;fill:#1d1c1a}"
    ".head{font-weight:600;fill:#1d1c1a}"
    ".in{fill:#fffdf9}.dead{fill:none;stroke:#b3261e;stroke-width:1.5}"
)


def loads_plot(share_LDE: Floats, layers: Sequence[str], domains: Sequence[str], experts: Sequence[str], dead: float) -> str:
    """The share of the weight that each expert has, in per cent: in each layer over all domains alike, and by domain in three layers.
    The more ink, the more weight; an expert with less than `dead` of an even share is framed."""
    chosen = sorted({0, len(layers) // 2, len(layers) - 1}) if len(layers) > SHOWN else range(len(layers))
    panels = [
        ("all text", [f"layer {layer}" for layer in layers], share_LDE.mean(1)),
        *((f"layer {layers[n]}", list(domains), share_LDE[n]) for n in chosen),
    ]
    rows = sum(len(names) for _, names, _ in panels)
    width, height = LEFT + CELL * len(experts) + 24, TOP + rows * TALL + GAP * len(panels)
    drawn, top = [], TOP
    for title, names, share_RE in panels:
        drawn.append(_panel(title, names, share_RE, experts, dead / len(experts), top))
        top += TALL * len(names) + GAP
    title = "Load of the experts, per cent of the weight"
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{title}">'
            '<style>{}</style><rect width="{w}" height="{h}" fill="#fffdf9"/><text class="title" x="12" y="24">{title}</text>{}</svg>'
        ).format(Markup(STYLE), Markup("").join(drawn), w=width, h=height, title=title)
    )


def _panel(title: str, names: Sequence[str], share_RE: Floats, experts: Sequence[str], dead: float, top: int) -> Markup:
    made = Markup('<text class="head" x="12" y="{}">{}</text>').format(top - 8, title)
    for e, expert in enumerate(experts):
        made += Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(LEFT + CELL * (e + 0.5), top - 8, expert)
    for r, name in enumerate(names):
        y = top + r * TALL
        made += Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 10, y + 15, name)
        for e, share in enumerate(share_RE[r]):
            made += _cell(float(share), LEFT + CELL * e, y, share < dead)
    return made


def _cell(share: float, x: int, y: int, dead: bool) -> Markup:
    ink = round(min(1.0, share**0.5), 3)  # small differences show
    box = Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2" fill="{}" fill-opacity="{}"/>').format(
        x + 1, y + 1, CELL - 2, TALL - 2, LIGHT[0], ink
    )
    box += Markup('<text{} x="{}" y="{}" text-anchor="middle">{}</text>').format(
        Markup(' class="in"') if ink > 0.6 else "", x + CELL / 2, y + 15, round(100 * share)
    )
    if dead:
        box += Markup('<rect class="dead" x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(x + 2, y + 2, CELL - 4, TALL - 4)
    return box
