"""The drawings of the pages, as pure functions to SVG: those of the report, and three of the hub's own."""

from collections.abc import Sequence
from functools import lru_cache

from markupsafe import Markup

from elmwood.hub.messages import CheckReply
from elmwood.hub.pages.atlas import Atlas
from elmwood.records import Point
from elmwood.report.charts import Scale, draw_growth, draw_losses
from elmwood.report.data import Curve
from elmwood.report.domain_map import domain_map


def growth(losses: Sequence[tuple[float, float]], levels: Sequence[tuple[float, str]]) -> Markup:
    """Bits per byte and standard error of one snapshot after the other, with named levels. Empty without losses."""
    if not losses:
        return Markup()
    about = "Bits per byte: " + ", ".join(f"snapshot {n + 1}: {loss:.3f}" for n, (loss, _) in enumerate(losses))
    about += "".join(f"; {text}: {level:.3f}" for level, text in levels)
    return draw_growth(losses, levels, about)


def curve(points: Sequence[Point], domain: int) -> Markup:
    """Training loss against tokens. Empty without points."""
    if not points:
        return Markup()
    line = Curve(name="training loss", role="expert", points=tuple((point.tokens, point.loss) for point in points), domain=domain)
    return draw_losses([line], f"Training loss against tokens: from {points[0].loss:.3f} to {points[-1].loss:.3f} nats per token")


def gauge(check: CheckReply) -> Markup:
    """The value of a check against its threshold, on a scale of its own: right of the dashed line is more. Empty if not measured."""
    if check.value is None or check.threshold is None:
        return Markup()
    low, high = sorted((check.value, check.threshold))
    air = max(high - low, 0.05 * abs(check.threshold), 1e-4)
    scale = Scale(low - air, high + air)
    return Markup(
        '<svg class="row" width="100%" height="22" aria-hidden="true"><line class="rail" x1="0" x2="100%" y1="50%" y2="50%"/>'
        '<line class="limit" x1="{0}%" x2="{0}%" y1="2" y2="20"/><circle cx="{1}%" cy="50%" r="4.5"/></svg>'
    ).format(scale(check.threshold), scale(check.value))


@lru_cache(4)
def atlas(found: Atlas) -> Markup:
    """The map of the domains."""
    return domain_map(found.areas, found.places) if found.places else Markup()
