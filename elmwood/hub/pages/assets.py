"""The templates and the static files of the pages. Nothing is fetched from elsewhere, and no page holds a script or a style of its own."""

from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader

from elmwood import __version__
from elmwood.hub.pages.words import ago
from elmwood.report.charts import draw_bar
from elmwood.report.domain_map import clip, swatch
from elmwood.report.formats import signed, with_prefix
from elmwood.report.page import css
from elmwood.report.web import Asset, environment, make_asset

PAGES = (
    ("/", "Overview"),
    ("/domains", "Domains"),
    ("/members", "Members"),
    ("/queue", "Queue"),
    ("/attacks", "Attacks"),
    ("/join", "Join"),
)
KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}


@cache
def asset(name: str) -> Asset | None:
    """A static file by its name; None where there is none."""
    folder = files("elmwood.hub.pages") / "static"
    known = {path.name for path in folder.iterdir()} - {"hub.css"} | {"style.css"}
    ending = name.rpartition(".")[2]
    if name not in known or ending not in KINDS:
        return None
    body = (css() + (folder / "hub.css").read_text(encoding="utf-8")).encode() if name == "style.css" else (folder / name).read_bytes()
    return make_asset(body, KINDS[ending])


@cache
def templates() -> Environment:
    """The pages' templates, and what they call."""
    made = environment(PackageLoader("elmwood.hub.pages"))
    made.globals |= {
        "version": __version__, "pages": PAGES, "ago": ago, "swatch": swatch, "clip": clip, "signed": signed,
        "with_prefix": with_prefix, "bar": draw_bar,
    }  # fmt: skip
    return made
