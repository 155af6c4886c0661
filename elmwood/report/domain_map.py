"""The domain map: each document a dot, each domain a colour, a shape and a label that overlaps no other label.

Colours repeat after eight domains and shapes then differ; labels serve readers who do not see colours. Only near neighbours
mean anything on the map.

N documents, D dimensions
"""

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from elmwood.report.data import Area, MapPoint

# chosen to maximise the smallest Oklab distance between two colours, for normal, protan, deutan and tritan vision
LIGHT = ("#3f60a7", "#d368a2", "#899d41", "#956135", "#2794fb", "#04510e", "#610c85", "#9f0c54")
DARK = ("#7c85ee", "#d95aa6", "#e3de57", "#a08f4a", "#6fe6e2", "#2abaa4", "#c3a0fe", "#f2943c")
COLOURS = len(LIGHT)
WIDTH, HEIGHT, MARGIN = 1000, 640, 34
SIZES = {"wide": 15.0, "narrow": 31.0}  # font sizes in units of the drawing, which is about 1000 or 360 pixels wide
SHAPES = (
    "M-{r},0a{r},{r} 0 1 0 {d},0a{r},{r} 0 1 0 -{d},0",  # disc
    "M-{r},-{r}h{d}v{d}h-{d}z",  # square
    "M0,-{d}L{d},{r}L-{d},{r}z",  # triangle
    "M0,-{d}L{d},0L0,{d}L-{d},0z",  # diamond
)
COVERED = 0.1  # distance, in heights of a label, that a label moves to cover one dot less
RINGS = sorted(  # positions to try: distance, and offset to the right and down, in heights of the label
    (ring * math.hypot(0.75 * math.cos(angle), 0.5 * math.sin(angle)), 0.75 * ring * math.cos(angle), 0.5 * ring * math.sin(angle))
    for ring in range(25)
    for angle in (turn * math.pi / 3 / max(1, ring) for turn in range(max(1, 6 * ring)))
)
Spot = tuple[float, float]  # in units of the drawing
Floats = NDArray[np.floating]
LABELLED = 80  # domains with a label on the map, the largest: there is no room for more
PLACED = 3000  # documents that t-SNE can place, at most
FEWEST = 12  # documents; below this there are no neighbourhoods to keep


class Box(NamedTuple):
    """A label: its centre and size, in units of the drawing."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: "Box") -> bool:
        return abs(self.x - other.x) * 2 < self.width + other.width and abs(self.y - other.y) * 2 < self.height + other.height

    def inside(self) -> bool:
        across, down = self.width / 2 + 4, self.height / 2 + 4
        return across <= self.x <= WIDTH - across and down <= self.y <= HEIGHT - down

    def covers(self, spot_N2: np.ndarray) -> int:
        """The number of dots it covers."""
        return int((np.abs(spot_N2 - (self.x, self.y)) * 2 < (self.width, self.height)).all(1).sum())


def style(palette: Sequence[str]) -> str:
    """CSS: the colour of each class c0, c1, …"""
    return "".join(f".c{place}{{--c:{colour}}}" for place, colour in enumerate(palette))


def domain_map(domains: Sequence[Area], places: Sequence[MapPoint], *, alone: bool = False) -> Markup:
    """The map as SVG. `alone`: with its own (light) style, for a file of its own."""
    spots = [_on_paper(place) for place in places]
    members: dict[int, list[int]] = {}
    for number, place in enumerate(places):
        members.setdefault(place.domain, []).append(number)
    groups = Markup("").join(_dots(domain, [(spots[n], places[n].text) for n in members[domain]]) for domain in sorted(members))
    labels = Markup("").join(_labels(domains, spots, members, kind) for kind in (["wide"] if alone else SIZES))
    title = f"Map of {len(places):,} documents in {len(domains)} domains; documents with like words lie near each other."
    head = Markup('<svg class="map" viewBox="0 0 {} {}" role="img" aria-label="{}"{}>').format(
        WIDTH, HEIGHT, title, _alone() if alone else ""
    )
    background = Markup('<rect width="{}" height="{}" fill="#fffdf9"/>').format(WIDTH, HEIGHT) if alone else ""
    inner = Markup("<style>{}</style>").format(Markup(STANDALONE)) if alone else ""
    return head + inner + background + Markup('<g class="dots">{}</g>').format(groups) + labels + Markup("</svg>")


def _alone() -> Markup:
    return Markup(' xmlns="{}" width="{}" height="{}"').format("http://www.w3.org/2000/svg", WIDTH, HEIGHT)


# other programs do not support CSS variables, so a map in a file of its own has literal colours
STANDALONE = "".join(f".c{n}{{fill:{colour};stroke:{colour}}}" for n, colour in enumerate(LIGHT)) + (
    ".dots path{stroke-width:0;fill-opacity:.62}.label rect{fill:#fffdf9;fill-opacity:.94;stroke-width:1.4}line{stroke-width:1.4}"
    ".label text{font:600 15px system-ui,sans-serif;fill:#1d1c1a;stroke:none;text-anchor:middle}"
)


def _on_paper(place: MapPoint) -> Spot:
    return MARGIN + place.x * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - place.y * (HEIGHT - 2 * MARGIN)


def shape(domain: int, radius: float) -> str:
    """SVG path of a domain's mark around the origin."""
    return SHAPES[domain // COLOURS % len(SHAPES)].format(r=f"{radius:g}", d=f"{2 * radius:g}" if domain < COLOURS else f"{1.7 * radius:g}")


def _dots(domain: int, found: Sequence[tuple[Spot, str]]) -> Markup:
    mark = shape(domain, 3.4)
    dots = (
        Markup('<path d="{}" transform="translate({:.1f} {:.1f})">{}</path>').format(
            mark, x, y, Markup("<title>{}</title>").format(text) if text else ""
        )
        for (x, y), text in found
    )
    return Markup('<g class="d{} c{}">{}</g>').format(domain, domain % COLOURS, Markup("").join(dots))


def _densest(spot_N2: np.ndarray) -> Spot:
    """The dot in the densest part of a domain, so that a domain in two islands is labelled on one of them."""
    some_N2 = spot_N2[:: -(-len(spot_N2) // 2000)]
    dist2_NN = np.square(some_N2[:, None] - some_N2[None]).sum(2)
    best = int(np.partition(dist2_NN, len(some_N2) // 3, axis=1)[:, len(some_N2) // 3].argmin())
    return float(some_N2[best, 0]), float(some_N2[best, 1])


def caption(area: Area, letters: int = 40) -> str:
    """The name of a domain, cut to a length that is read at a glance."""
    return clip(area.name, letters)


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def text_width(text: str, size: float) -> float:
    """About how wide a line of bold text is. Letters of most scripts are 0.62 of their height, East Asian ones as wide as high."""
    return size * sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.62 for letter in text)


def place_labels(anchors: Sequence[Spot], sizes: Sequence[tuple[float, float]], spot_N2: np.ndarray) -> list[Box | None]:
    """A free position for each label, in this order: near its anchor, covering few dots; None if there is none."""
    placed: list[Box] = []
    found: list[Box | None] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        best, cost = None, math.inf
        for away, right, down in RINGS:
            if away >= cost:  # farther positions can only be worse
                break
            at = Box(x + right * height, y + down * height, width, height)
            if at.inside() and not any(at.meets(other) for other in placed):
                price = away + COVERED * at.covers(spot_N2)
                best, cost = (at, price) if price < cost else (best, cost)
        found.append(best)
        placed += [best] if best else []
    return found


def _labels(domains: Sequence[Area], spots: Sequence[Spot], members: dict[int, list[int]], kind: str) -> Markup:
    size, spot_N2 = SIZES[kind], np.array(spots)
    anchors = {domain: _densest(spot_N2[members[domain]]) for domain in members}
    order = sorted(anchors, key=lambda domain: -len(members[domain]))[:LABELLED]
    texts = [_wording(domains[domain], domain, len(order), kind) for domain in order]
    boxes = place_labels([anchors[domain] for domain in order], [(text_width(text, size) + size, 1.6 * size) for text in texts], spot_N2)
    found = [(domain, text, box) for domain, text, box in zip(order, texts, boxes, strict=True) if box]
    lines = Markup("").join(_leader(domain, box, anchors[domain]) for domain, _, box in found)  # below all labels
    drawn = Markup("").join(_label(domain, text, box, size) for domain, text, box in found)
    return Markup('<g class="{}">{}{}</g>').format(kind, lines, drawn)


def _wording(area: Area, domain: int, of: int, kind: str) -> str:
    """As much of the name as there is room for; on a small screen with many domains, the number in the table."""
    if kind == "narrow":
        return caption(area, 18) if of <= COLOURS else str(domain + 1)
    return caption(area, 34 if of <= 3 * COLOURS else 16)


def _leader(domain: int, box: Box, anchor: Spot) -> Markup:
    """A line from a label to its anchor, unless the label covers it."""
    if abs(box.x - anchor[0]) * 2 < box.width and abs(box.y - anchor[1]) * 2 < box.height:
        return Markup("")
    return Markup('<line class="c{}" x1="{:.0f}" y1="{:.0f}" x2="{:.0f}" y2="{:.0f}"/>').format(domain % COLOURS, box.x, box.y, *anchor)


def _label(domain: int, text: str, box: Box, size: float) -> Markup:
    left, top = box.x - box.width / 2, box.y - box.height / 2
    return Markup(
        '<g class="label c{}" data-domain="{}"><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="{:.1f}"/>'
        '<text x="{:.1f}" y="{:.1f}">{}</text></g>'
    ).format(domain % COLOURS, domain, left, top, box.width, box.height, size * 0.35, box.x, box.y + size * 0.35, text)


def swatch(domain: int) -> Markup:
    """The mark of a domain, for a line of text."""
    return Markup('<svg class="swatch c{}" viewBox="-8 -8 16 16" aria-hidden="true"><path d="{}"/></svg>').format(
        domain % COLOURS, shape(domain, 6 if domain < COLOURS else 4.2)
    )


# ---- embeddings to points of the map ---------------------------------------------------------------------------------


def project(x_ND: Floats, rng_seed: int = 0) -> Floats:
    """Points [N, 2] from 0 to 1: principal components, then t-SNE (van der Maaten & Hinton 2008) for up to 3,000 documents."""
    from sklearn.decomposition import PCA  # takes two seconds, needed only here
    from sklearn.manifold import TSNE

    count = len(x_ND)
    if count < 2 or not np.ptp(x_ND, axis=0).any():
        return np.full((count, 2), 0.5)
    width = min(50, *x_ND.shape)
    point_ND = PCA(width, svd_solver="full", random_state=rng_seed).fit_transform(np.asarray(x_ND, np.float64))
    if FEWEST <= count <= PLACED:
        perplexity = min(30.0, (count - 1) / 3)
        start_N2 = 1e-4 * _first_two(point_ND) / point_ND[:, 0].std()
        point_ND = TSNE(perplexity=perplexity, init=start_N2, learning_rate="auto", random_state=rng_seed).fit_transform(point_ND)
    point_N2 = _first_two(point_ND).astype(np.float64)
    spread_2 = np.ptp(point_N2, axis=0)
    return (point_N2 - point_N2.min(0)) / np.where(spread_2 > 0, spread_2, 1)


def _first_two(point_ND: Floats) -> Floats:
    """The first two columns; a missing one is zero."""
    return np.pad(point_ND[:, :2], ((0, 0), (0, max(0, 2 - point_ND.shape[1]))))
