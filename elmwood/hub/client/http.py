"""A connection to a hub: signed requests, one back-off with jitter, replies that say why there is nothing to do.

Only outbound HTTPS; plain HTTP is for a hub on this machine. Redirects are not followed, and bodies have a largest size.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from elmwood import __version__
from elmwood.errors import BadInput, ElmwoodError
from elmwood.hub.signing import sign_request
from elmwood.records import Frozen, canonical
from elmwood.records.plain_json import parse_json
from elmwood.registry import require

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

LARGEST = 16 << 20  # bytes of a JSON reply
TIMEOUT = 30.0  # seconds without a byte
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries
PATIENCE = 600.0  # seconds that a request is tried again
LOCAL = ("localhost", "127.0.0.1", "::1")
NOT_NOW = (429, 500, 502, 503, 504, 507)  # states of the hub, or of what stands before it, that end by themselves


class Unreachable(ElmwoodError):
    """Nothing answers at the hub's address."""


class Problem(ElmwoodError):
    """A refusal of the hub, in the fields of its problem+json."""

    def __init__(self, status: int, fields: Mapping[str, Any]):
        said = {name: str(fields.get(name) or "")[:500] for name in ("code", "detail", "kept", "do")}
        self.status, self.code, self.kept, self.do = status, said["code"] or f"http-{status}", said["kept"], said["do"]
        self.retryable = status in NOT_NOW and fields.get("retryable") is not False
        more = fields.get("fields")
        self.fields: dict[str, Any] = more if isinstance(more, dict) else {}
        super().__init__("; ".join(part for part in (f"the hub refuses ({self.code}): {said['detail'] or 'no reason given'}",
                                                     said["kept"] and f"kept: {said['kept']}", said["do"]) if part))  # fmt: skip

    @classmethod
    def of(cls, reply: "Reply") -> "Problem":
        return cls(reply.status, _fields(reply))


class Reply(NamedTuple):
    """What a hub answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def of(cls, answer: Any) -> "Reply":
        """From a response of httpx2, whose body is read here."""
        return cls(answer.status_code, answer.headers, _read(answer.iter_bytes(), LARGEST))

    def json(self) -> Any:
        """Raises BadInput where it is none."""
        try:
            return parse_json(self.body, LARGEST) if self.body else None
        except ValueError as error:
            raise BadInput(f"the hub's reply is no JSON ({error}): is this the address of a hub?") from error


class Hub:
    """A hub at an address. Requests are signed where there is a key.

    `sleep` waits some seconds, and may raise to stop; `clock` is wall time, corrected by what the hub says of its own; `transport` is one
    of httpx2.
    """

    def __init__(
        self, url: str, key: "Ed25519PrivateKey | None" = None, *, sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.time, patience: float = PATIENCE, transport: Any = None,
        on_wait: Callable[[str, float], None] = lambda why, seconds: None,
    ):  # fmt: skip
        self.url, self.key, self.sleep, self.clock, self.patience, self.on_wait = check_url(url), key, sleep, clock, patience, on_wait
        self.httpx = require("httpx2", "hub")
        self.client = self.httpx.Client(
            base_url=self.url, timeout=TIMEOUT, transport=transport, follow_redirects=False,
            headers={"User-Agent": f"elmwood/{__version__}", "Elmwood-Client": __version__, "Accept-Encoding": "identity"},
        )  # fmt: skip
        self.skew = 0.0  # seconds that the hub's clock is ahead

    def close(self) -> None:
        self.client.close()

    def get(self, target: str, **headers: str) -> Reply:
        """Read something."""
        return self.request("GET", target, headers=headers)

    def post(self, target: str, body: Frozen | Mapping[str, Any], idempotency: str) -> Reply:
        """Do something, once for this idempotency key however often it is sent."""
        raw = canonical(body) if isinstance(body, Frozen) else json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        return self.request("POST", target, raw, {"Content-Type": "application/json", "Idempotency-Key": idempotency})

    def request(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None, *, patience: float | None = None,
    ) -> Reply:  # fmt: skip
        """One request, tried again with longer and longer pauses while the hub cannot be reached or asks for it.

        Raises Unreachable, Problem.
        """
        patience = self.patience if patience is None else patience
        waited, pause = 0.0, FIRST_PAUSE
        while True:
            asked = None
            try:
                reply = self._once(method, target, body, headers or {})
            except (self.httpx.TransportError, OSError) as error:
                failure: Unreachable | Problem = Unreachable(
                    f"{self.url} cannot be reached ({_words(error)}): check the address and the network"
                )
            else:
                if reply.status < 400:
                    return reply
                failure, asked = Problem.of(reply), retry_after(reply.headers)
                if not failure.retryable:
                    raise failure
            wait = max(asked or 0.0, random.uniform(0.5, 1) * pause)
            if waited + wait > patience:
                raise failure
            self.on_wait(str(failure), wait)
            self.sleep(wait)
            waited, pause = waited + wait, min(2 * pause, LONGEST_PAUSE)

    def _once(self, method: str, target: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        for _ in range(2):
            with self.stream(method, target, body, headers) as answer:
                reply = Reply.of(answer)
            there = Problem.of(reply).fields.get("time") if reply.status == 401 else None
            if not isinstance(there, int | float):
                break
            self.skew = float(there) - self.clock()  # its clock decides; ask once more
        return reply

    def problem(self, answer: Any) -> Problem:
        """The refusal in a response whose body is not yet read."""
        return Problem.of(Reply.of(answer))

    @contextmanager
    def stream(self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Iterator[Any]:
        """The response of httpx2 to one signed request, its body not yet read."""
        signed = dict(headers or {})
        if self.key:
            signed |= sign_request(method, target, body, self.clock() + self.skew, self.key)
        with self.client.stream(method, target, content=body or None, headers=signed) as answer:
            yield answer


def check_url(url: str) -> str:
    """The address of a hub without a slash at its end. Raises BadInput."""
    parts = urlsplit(url if "//" in url else f"https://{url}")
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise BadInput(f"{url} is no address of a hub: write https://HOST, or http://localhost:PORT for one on this machine")
    if parts.scheme == "http" and parts.hostname not in LOCAL:
        raise BadInput(f"{url} is plain HTTP, which is used on this machine only: write https://{parts.netloc}")
    return parts.geturl().rstrip("/")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply asks to wait; at most an hour."""
    try:
        return min(max(float(headers.get("retry-after", "")), 0.0), 3600.0)
    except ValueError:
        return None


def _fields(reply: Reply) -> dict[str, Any]:
    try:
        found = reply.json()
    except BadInput:
        return {}
    return found if isinstance(found, dict) else {}


def _read(pieces: Iterator[bytes], most: int) -> bytes:
    found = bytearray()
    for piece in pieces:
        found += piece
        if len(found) > most:
            raise BadInput(f"the hub's reply has more than {most} bytes: is this the address of a hub?")
    return bytes(found)


def _words(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:200]
