"""Report -> HTML: one file with everything it needs, without scripts or network access."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from elmwood import __version__
from elmwood.records import Contest, Row
from elmwood.report import charts, lineage
from elmwood.report.contest import headline, lines
from elmwood.report.data import Curve, Report
from elmwood.report.domain_map import COLOURS, DARK, LIGHT, caption, domain_map, style, swatch
from elmwood.report.formats import digits, signed, spell_time, with_prefix
from elmwood.units import printable

PANELS = {"seed": "The seed", "control": "Dense controls", "expert": "Experts"}
GROUPS = {"seed": "", "control": "Controls", "result": "Ensembles of the experts", "bound": "Bound"}
RANDOM = "random clusters"  # how the names of rows begin whose experts were trained on random documents
# what the rows of the summary are
SEED = "the small model that everything here starts from"
CONTROL = "one model trained on all of the text, the strongest of its kind"
RANDOMLY = "the same ensemble of experts, each of which got random documents"
CHOSEN = "experts, each trained alone on one domain, and mixed at every word"
BOUND = "the expert of the document's own domain, which no model can know"


TABLED = 40  # domains whose weights are a table; more are an image
STRAYS = 12  # rows beside that image
CLAIMS = 20  # contests of others on the page, at most
SETTING = ": "  # between a row and its setting, in the name of a fact


class ResultRow(NamedTuple):
    """A row of the result as text and drawings."""

    row: Row
    first: str  # the heading of its group, on the first row of it
    loss: Markup
    loss_text: str
    gain: Markup
    gain_text: str


class Duel(NamedTuple):
    """A comparison of two models, in words and as a drawing."""

    headline: str
    lines: list[tuple[str, str]]
    svg: Markup
    key: tuple[tuple[str, str], ...] = (("line-0", "better"), ("line-1", "not better by the least effect"))


class Panel(NamedTuple):
    """Training curves that share their axes."""

    title: str
    svg: Markup
    key: tuple[tuple[str, str], ...]  # (class, name) of each line, for the legend


def html(report: Report) -> str:
    """The page. All text is escaped; there is no script and no URL in it, and its content policy forbids both."""
    rows = _result_rows(report.rows)
    totals = {"documents": sum(area.documents for area in report.domains), "bytes": sum(area.bytes for area in report.domains)}
    page = _template().render(
        report=report,
        version=__version__,
        css=Markup(css()) + Markup(_hover(len(report.domains))),
        headline=_headline(report),
        totals=totals,
        map=domain_map(report.domains, report.places) if report.places else Markup(),
        most=max((area.documents for area in report.domains), default=1),
        lines=rows,
        summary=_summary(report, rows),
        loss_axis=charts.draw_axis(_loss_scale(report.rows)),
        gain_axis=charts.draw_axis(_gain_scale(report.rows)),
        reference=next((row for row in report.rows if row.gain is None), None),
        gained=len({row.gain is None for row in report.rows}) == 2,  # some over one that has none, the reference
        costed=[row for row in report.rows if row.tokens or row.steps or row.wall_seconds],
        parted=[row for row in report.rows if any(loss is not None for loss in row.domains)],
        panels=_panels(report.curves),
        growth=_growth(report),
        contests=[_duel(one) for one in report.contests],
        claims=[(headline(one), lines(one)[0][1]) for one in report.claims[:CLAIMS]],
        tree=lineage.draw(lineage.tree(report.lineage)),
        bar=charts.draw_bar,
        heat=charts.draw_cell,
        routes=_routes(report),
        caption=caption,
        with_prefix=with_prefix,
        spell_time=spell_time,
        best=_best,
        swatch=swatch,
        colours=COLOURS,
        facts=[(name, value) for name, value in report.facts.items() if SETTING not in name],
        settings=_settings(report.facts),
    )
    return printable(page)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("elmwood.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.jinja")


def css() -> str:
    """The style sheet: colours of domains, light and dark, and page.css."""
    sheet = files("elmwood.report").joinpath("page.css").read_text(encoding="utf-8")
    return f"{style(LIGHT)}@media (prefers-color-scheme:dark){{{style(DARK)}}}{sheet}"


def _hover(domains: int) -> str:
    """Pointing at a domain's row or label leaves only its dots."""
    return "".join(f'.atlas:has([data-domain="{n}"]:hover) .dots>g:not(.d{n}){{opacity:.07}}' for n in range(domains))


def _headline(report: Report) -> Row | None:
    """The row that stands for the result: the chosen one, or else the best of its kind."""
    results = [row for row in report.rows if row.role == "result"]
    return next((row for row in results if row.name == report.chosen), min(results, key=lambda row: row.bits_per_byte, default=None))


def _loss_scale(rows: Sequence[Row]) -> charts.Scale:
    return charts.scale_over([row.bits_per_byte + sign * charts.LIKELY * row.standard_error for row in rows for sign in (-1, 1)])


def _gain_scale(rows: Sequence[Row]) -> charts.Scale:
    ends = [row.gain + sign * charts.LIKELY * (row.gain_error or 0) for row in rows if row.gain is not None for sign in (-1, 1)]
    return charts.scale_over([0.0, *ends])


def _result_rows(rows: Sequence[Row]) -> list[ResultRow]:
    loss_scale, gain_scale = _loss_scale(rows), _gain_scale(rows)
    loss_digits, gain_digits = digits(row.standard_error for row in rows), digits(row.gain_error for row in rows)
    strongest = next((row.bits_per_byte for row in rows if row.gain is None), None)
    found: list[ResultRow] = []
    for row in rows:
        loss = f"{row.bits_per_byte:.{max(3, loss_digits)}f}"
        text = f"{row.name}: {loss} ± {row.standard_error:.{loss_digits}f} bits per byte"
        gain = "" if row.gain is None else f"{signed(row.gain, gain_digits)} ± {row.gain_error or 0:.{gain_digits}f}"
        drawn = (
            charts.draw_reference(gain_scale, row.role)
            if row.gain is None
            else charts.draw_estimate(row.gain, row.gain_error, gain_scale, role=row.role, mark=0, label=f"{row.name}: gain {gain}")
        )
        first = GROUPS[row.role] if not found or found[-1].row.role != row.role else ""
        whisker = charts.draw_estimate(row.bits_per_byte, row.standard_error, loss_scale, role=row.role, mark=strongest, label=text)
        found.append(ResultRow(row, first, whisker, f"{loss} ± {row.standard_error:.{loss_digits}f}", drawn, gain or "reference"))
    return found


def _summary(report: Report, rows: Sequence[ResultRow]) -> list[tuple[ResultRow, str]]:
    """At most five rows, with what each is: the seed, the reference, random clusters, the result and the bound. None of a short table."""
    headline = _headline(report)
    if headline is None or len(rows) <= 5:
        return []
    random = [one for one in rows if one.row.name.startswith(RANDOM)]
    found = [
        (next((one for one in rows if one.row.role == "seed"), None), SEED),
        (next((one for one in rows if one.row.gain is None and one.row.role == "control"), None), CONTROL),
        (min(random, key=lambda one: one.row.bits_per_byte, default=None), RANDOMLY),
        (next(one for one in rows if one.row == headline), CHOSEN),
        (next((one for one in rows if one.row.role == "bound"), None), BOUND),
    ]
    return [(one, text) for one, text in found if one is not None]


def _settings(facts: Mapping[str, str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Facts named "row: setting" as a table: its columns, and the values of each row."""
    named = [(*name.rpartition(SETTING)[::2], value) for name, value in facts.items() if SETTING in name]
    columns = list(dict.fromkeys(setting for _, setting, _ in named))
    rows: dict[str, dict[str, str]] = {}
    for row, setting, value in named:
        rows.setdefault(row, {})[setting] = value
    return columns, [(row, [values.get(column, "–") for column in columns]) for row, values in rows.items()]


def _panels(curves: Sequence[Curve]) -> list[Panel]:
    roles = list(dict.fromkeys(curve.role for curve in curves if curve.points))
    panels = []
    for role in sorted(roles, key=lambda role: list(PANELS).index(role) if role in PANELS else len(PANELS)):
        mine = [curve for curve in curves if curve.role == role and curve.points]
        title = PANELS.get(role, role)
        about = f"{title}: training loss against tokens, " + "; ".join(f"{c.name} ends at {c.points[-1][1]:.3f}" for c in mine)
        key = tuple(zip(charts.line_classes(mine), (curve.name for curve in mine), strict=True))
        panels.append(Panel(title, charts.draw_losses(mine, about), key if 1 < len(mine) <= TABLED else ()))
    return panels


class Routes(NamedTuple):
    """The routing of many experts: an image, and the domains whose own expert gets least."""

    svg: Markup
    own: float  # mean weight of the own expert
    strays: list[tuple[int, str, float, str]]  # domain from 1, its name, weight of its own expert, what else gets most


def _routes(report: Report) -> Routes | None:
    """None where a table has room for every weight."""
    if len(report.routing) <= TABLED:
        return None
    own = [weights[k] if k < len(weights) else 0.0 for k, weights in enumerate(report.routing)]
    strays = []
    for k in sorted(range(len(own)), key=own.__getitem__)[:STRAYS]:
        others = [(weight, c) for c, weight in enumerate(report.routing[k]) if c != k]
        most, c = max(others, default=(0.0, k))
        name = caption(report.domains[k]) if k < len(report.domains) else ""
        strays.append((k + 1, name, own[k], f"{'the seed' if c >= len(report.domains) else f'expert {c + 1}'} {most:.1%}"))
    mean = sum(own) / len(own)
    return Routes(charts.draw_heat(report.routing, f"Weights of {len(own)} experts: {mean:.1%} on the own one"), mean, strays)


def _growth(report: Report) -> Markup:
    if not report.growth:
        return Markup()
    seed = next((row.bits_per_byte for row in report.rows if row.role == "seed"), None)
    about = "Bits per byte with " + ", ".join(f"{n + 1}: {loss:.3f}" for n, (loss, _) in enumerate(report.growth)) + " experts"
    return charts.draw_growth(report.growth, [] if seed is None else [(seed, "the seed")], about)


def _duel(found: Contest) -> Duel:
    svg = charts.draw_wealth(found, f"{headline(found)}: wealth over {found.drawn} blocks") if found.wealth else Markup()
    return Duel(headline(found), lines(found), svg)


def _best(rows: Sequence[Row], domain: int) -> float | None:
    """The least loss in a column, bounds left out."""
    losses = [row.domains[domain] for row in rows if row.role != "bound"]
    return min((loss for loss in losses if loss is not None), default=None)
