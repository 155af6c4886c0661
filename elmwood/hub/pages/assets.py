"""The templates and the static files of the pages. Nothing is fetched from elsewhere, and no page holds a script or a style of its own."""

import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from elmwood import __version__
from elmwood.hub.pages.words import ago
from elmwood.report.charts import draw_bar
from elmwood.report.domain_map import clip, swatch
from elmwood.report.formats import signed, with_prefix
from elmwood.report.page import css

PAGES = (
    ("/", "Overview"),
    ("/domains", "Domains"),
    ("/members", "Members"),
    ("/queue", "Queue"),
    ("/attacks", "Attacks"),
    ("/join", "Join"),
)
KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


class Asset(NamedTuple):
    """A static file."""

    body: bytes
    kind: str
    etag: str


@cache
def asset(name: str) -> Asset | None:
    """A static file by its name; None where there is none."""
    folder = files("elmwood.hub.pages") / "static"
    known = {path.name for path in folder.iterdir()} - {"hub.css"} | {"style.css"}
    ending = name.rpartition(".")[2]
    if name not in known or ending not in KINDS:
        return None
    body = (css() + (folder / "hub.css").read_text(encoding="utf-8")).encode() if name == "style.css" else (folder / name).read_bytes()
    return Asset(body, KINDS[ending], f'"{hashlib.sha256(body).hexdigest()[:20]}"')


@cache
def environment() -> Environment:
    """Jinja with everything escaped and nothing undefined."""
    made = Environment(
        loader=PackageLoader("elmwood.hub.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.globals |= {
        "version": __version__, "pages": PAGES, "ago": ago, "swatch": swatch, "clip": clip, "signed": signed,
        "with_prefix": with_prefix, "bar": draw_bar,
    }  # fmt: skip
    return made
