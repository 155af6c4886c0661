"""The routes of the pages. Each reads the database once and fills a template; none changes anything.

`read(query)` runs `query(connection, clock)` in one read transaction and returns its result.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from elmwood.hub.database import Connection
from elmwood.hub.pages import queries
from elmwood.hub.pages.assets import asset, templates
from elmwood.hub.pages.expert import expert_page
from elmwood.report.web import HEADERS
from elmwood.units import printable

Query = Callable[[Connection, queries.Clock], Any]
Read = Callable[[Query], Any]
POLLED = {"overview.jinja", "queue.jinja"}


def routes(read: Read) -> list[Route]:
    """All pages, and their static files."""

    def page(path: str, template: str, query: Callable[..., Mapping[str, Any] | None], missing: str = "") -> Route:
        def endpoint(request: Request) -> Response:
            words = request.path_params

            def ask(connection: Connection, clock: queries.Clock) -> tuple[queries.Head, Mapping[str, Any] | None]:
                head = queries.head(connection)
                return head, query(connection, clock, head, **words)

            head, found = read(ask)
            if found is None:
                return _render(request, "missing.jinja", {"run": head, "text": missing}, 404)
            return _render(request, template, {"run": head, **found})

        return Route(path, endpoint, methods=["GET"], include_in_schema=False)

    return [
        page("/", "overview.jinja", queries.overview),
        page("/domains", "domains.jinja", queries.domains_page),
        page("/domains/{number:int}", "domain.jinja", queries.domain_page, "This run has no domain of that number."),
        page("/experts/{digest}", "expert.jinja", expert_page, "This run has no expert of that digest, or it has no verdict yet."),
        page("/members", "members.jinja", queries.members_page),
        page("/members/{account}", "member.jinja", queries.member_page, "This run has no member of that number."),
        page("/queue", "queue.jinja", queries.queue_page),
        page("/attacks", "attacks.jinja", lambda connection, clock, run: attacks()),
        page("/join", "join.jinja", queries.join_page),
        Route("/static/{name}", _static, methods=["GET"], include_in_schema=False),
    ]


def _render(request: Request, template: str, words: Mapping[str, Any], status: int = 200) -> HTMLResponse:
    root = request.scope.get("root_path", "").rstrip("/")
    path = "/" + request.url.path.removeprefix(root).strip("/").partition("/")[0]
    here = "/domains" if path == "/experts" else path
    polls = template in POLLED
    url = str(request.base_url).rstrip("/")
    html = printable(templates().get_template(template).render(**words, at=lambda path: root + path, here=here, url=url, polls=polls))
    return HTMLResponse(html, status, headers=HEADERS | {"cache-control": "no-cache"})


def _static(request: Request) -> Response:
    found = asset(request.path_params["name"])
    if found is None:
        return Response(status_code=404)
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=found.headers)
    return Response(found.body, media_type=found.kind, headers=found.headers)


@cache
def attacks() -> dict[str, Any]:
    """The table that `python -m benches.hub.attacks` wrote, as it ships with the package."""
    place = files("elmwood.hub.pages") / "attacks.json"
    known: dict[str, Any] = {"rows": [], "setting": "", "date": "", "commit": ""}
    if place.is_file():
        known = json.loads(place.read_text(encoding="utf-8"))
    rows = [row for row in known["rows"] if not row["honest"]]
    honest = [row for row in known["rows"] if row["honest"]]
    tried, missed = sum(row["tried"] for row in rows), sum(row["missed"] for row in rows)
    wrong, sent = sum(row["caught"] for row in honest), sum(row["tried"] for row in honest)
    lede = f"{tried:,} dishonest submissions of {len(rows)} kinds: {tried - missed:,} were caught, {missed:,} were missed." if rows else ""
    kinds = [row["attack"] for row in rows if row["missed"]]
    lede += f" Missed: {', '.join(kinds)}." if kinds else ""
    lede += f" {wrong:,} of {sent:,} honest experts were wrongly refused." if honest else ""
    return {
        "rows": rows,
        "honest": honest,
        "lede": lede or "Nothing has been measured yet.",
        **{k: known[k] for k in ("setting", "date", "commit")},
    }
