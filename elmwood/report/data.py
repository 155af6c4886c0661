"""What a report shows. Whoever writes one fills these in; nothing here reads a store."""

from pydantic import Field

from elmwood.records import Contest, Frozen, Row


class Area(Frozen):
    """A domain, as a reader meets it."""

    name: str
    terms: tuple[str, ...] = ()
    fitted: int | None = None  # documents at the fit, where balance holds
    documents: int = 0  # documents assigned
    bytes: int = 0  # of text
    snippets: tuple[str, ...] = ()  # how some of its documents begin


class MapPoint(Frozen):
    """A document on the map; x and y from 0 to 1, y upward."""

    x: float
    y: float
    domain: int  # index of its Area
    text: str = ""  # how it begins


class Curve(Frozen):
    """Training loss against tokens. Curves of one role share a panel."""

    name: str
    role: str  # seed | control | expert
    points: tuple[tuple[float, float], ...]  # (tokens, nats per token)
    domain: int | None = None  # index of its Area


class Ancestor(Frozen):
    """One record of the lineage, in depth-first order; what was drawn before is only pointed to."""

    depth: int = Field(ge=0)
    kind: str
    digest: str
    summary: str = ""


class Report(Frozen):
    """A whole page. Sections without content are left out."""

    title: str
    summary: str = ""  # the result in a sentence or two
    domains: tuple[Area, ...] = ()
    places: tuple[MapPoint, ...] = ()
    curves: tuple[Curve, ...] = ()
    rows: tuple[Row, ...] = ()  # of a Comparison
    chosen: str = ""  # the row that stands for the result
    routing: tuple[tuple[float, ...], ...] = ()  # [domain of the document][expert, the seed last] mean weight
    growth: tuple[tuple[float, float], ...] = ()  # bits per byte and its standard error with 1, 2, ... experts
    contests: tuple[Contest, ...] = ()
    lineage: tuple[Ancestor, ...] = ()
    facts: dict[str, str] = Field(default_factory=dict)  # what else one must know: versions, machine, time, settings
