"""What the pages of every server share: the headers of each answer, static files and the templates' settings. Nothing is fetched from
elsewhere, and no page holds a script or a style of its own."""

import hashlib
from typing import NamedTuple

from jinja2 import BaseLoader, Environment, StrictUndefined

HOUR = 3600  # seconds that a browser keeps a static file without asking
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

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer that holds it, or that says that the browser has it."""
        return HEADERS | {"etag": self.etag, "cache-control": f"public, max-age={HOUR}"}


def make_asset(body: bytes, kind: str) -> Asset:
    """A static file of a MIME type, its tag by its content."""
    return Asset(body, kind, f'"{hashlib.sha256(body).hexdigest()[:20]}"')


def environment(loader: BaseLoader) -> Environment:
    """Jinja with everything escaped and nothing undefined."""
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
