"""The page at /: text from the model in a browser, each word marked by the expert that spoke. It is one client of the same endpoints as
others; nothing is fetched from elsewhere, and no script or style is inline."""

from functools import cache
from importlib.resources import files

from jinja2 import PackageLoader
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from elmwood import __version__
from elmwood.report.page import css
from elmwood.report.web import HEADERS, Asset, environment, make_asset
from elmwood.serve.live import Live

KINDS = {"page.css": "text/css", "page.js": "text/javascript", "leaf.svg": "image/svg+xml"}


@cache
def asset(name: str) -> Asset | None:
    """A static file by its name; None where there is none. The style begins with that of reports."""
    if name not in KINDS:
        return None
    body = (files(__name__) / "static" / name).read_bytes()
    body = css().encode() + body if name == "page.css" else body
    return make_asset(body, KINDS[name])


def routes(live: Live) -> list[Route]:
    """The page and its static files."""
    template = environment(PackageLoader(__name__, "")).get_template("page.jinja")

    def page(request: Request) -> Response:
        served, root = live.now, request.scope.get("root_path", "").rstrip("/")
        html = template.render(
            name=served.name, digest=served.record.digest, kind=served.record.kind, experts=len(served.cards), seed=served.seed.name,
            chats=served.template is not None, routed=served.guide is not None, root=root, version=__version__,
            context=served.engine.context,
        )  # fmt: skip
        return HTMLResponse(html, headers=HEADERS | {"cache-control": "no-cache"})

    def static(request: Request) -> Response:
        found = asset(request.path_params["name"])
        if found is None:
            return Response(status_code=404, headers=HEADERS)
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers=found.headers)
        return Response(found.body, media_type=found.kind, headers=found.headers)

    return [Route("/", page, methods=["GET"]), Route("/static/{name}", static, methods=["GET"])]
