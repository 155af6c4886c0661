"""The content of a report, as plain records. Nothing here reads a store."""

from pydantic import Field

from elmwood.records import Contest, Frozen, Row


class Area(Frozen):
    """A domain."""

    name: str
    terms: tuple[str, ...] = ()
    fitted: int | None = None  # documents that were clustered
    documents: int = 0  # documents assigned
    bytes: int = 0  # of text
    snippets: tuple[str, ...] = ()  # beginnings of typical documents


class MapPoint(Frozen):
    """A document on the map; x and y from 0 to 1, y upward."""

    x: float
    y: float
    domain: int  # index of its Area
    text: str = ""  # its beginning


class Curve(Frozen):
    """Training loss against tokens. Curves of one role are drawn together."""

    name: str
    role: str  # seed | control | expert
    points: tuple[tuple[float, float], ...]  # (tokens, nats per token)
    domain: int | None = None  # index of its Area


class Ancestor(Frozen):
    """One record of the lineage, in depth-first order."""

    depth: int = Field(ge=0)
    kind: str
    digest: str
    summary: str = ""


class Report(Frozen):
    """A page. Sections without content are left out."""

    title: str
    summary: str = ""  # the result in a sentence or two
    domains: tuple[Area, ...] = ()
    places: tuple[MapPoint, ...] = ()
    curves: tuple[Curve, ...] = ()
    rows: tuple[Row, ...] = ()  # of a Comparison
    chosen: str = ""  # name of the row that is the result
    routing: tuple[tuple[float, ...], ...] = ()  # mean weight [domain of the document][expert, the seed last]
    growth: tuple[tuple[float, float], ...] = ()  # bits per byte and standard error with 1, 2, ... experts
    contests: tuple[Contest, ...] = ()
    claims: tuple[Contest, ...] = ()  # contests that another held; nobody checked them
    lineage: tuple[Ancestor, ...] = ()
    facts: dict[str, str] = Field(default_factory=dict)  # versions, machine, time, settings; "row: setting" is a setting of a row
