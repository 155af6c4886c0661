"""Ed25519 signatures over canonical JSON and over HTTP requests, and keys on disk.

A request is signed over "METHOD\\nTARGET\\nsha256(body)\\ntime\\nnonce" and carries its key, time (unix seconds), nonce and signature in
headers. The nonce is good once, and the time within `SKEW` seconds of the hub's.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from elmwood.errors import BadInput, BadRecord, Damaged
from elmwood.hub.messages import RunManifest, Signed
from elmwood.records import Frozen, canonical

SKEW = 300.0  # seconds
AHEAD = 2 * 86400.0  # seconds that a manifest may be issued in the future: by so much a volunteer's clock may be slow
KEY, TIME, NONCE, SIGNATURE = "Elmwood-Key", "Elmwood-Time", "Elmwood-Nonce", "Elmwood-Signature"
V = TypeVar("V", bound=Frozen)


class Forged(BadInput):
    """A signature that does not hold, or of another key than the one that should have signed."""


class Office(NamedTuple):
    """What a hub signs with, and the secret that orders the held-out blocks."""

    key: Ed25519PrivateKey
    secret: bytes

    def hide(self, value: str) -> str:
        """The same for the same value, and no way back without the secret."""
        return hmac.digest(self.secret, b"hidden " + value.encode(), "sha256").hex()


# ---- keys -----------------------------------------------------------------------------------------------------------


def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def public(key: Ed25519PrivateKey) -> str:
    """The public key, 64 hex digits."""
    return key.public_key().public_bytes_raw().hex()


def save_key(key: Ed25519PrivateKey, path: Path) -> None:
    """Write a new file that only its owner can read. Raises FileExistsError: a key is never overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(key.private_bytes_raw().hex() + "\n")
        file.flush()
        os.fsync(file.fileno())


def load_key(path: Path) -> Ed25519PrivateKey:
    """Raises Damaged."""
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text(encoding="ascii").strip()))
    except (OSError, ValueError) as error:
        raise Damaged(
            f"{path} holds no key (64 hex digits): restore it from a backup, or register a new key with the recovery code"
        ) from error


def load_or_make_key(path: Path) -> Ed25519PrivateKey:
    """The key in a file, which is made where there is none."""
    if not path.exists():
        save_key(new_key(), path)
    return load_key(path)


def verify(key: str, signature: str, data: bytes) -> bool:
    """Whether this key made this signature of these bytes. Malformed keys and signatures made none."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), data)
    except (InvalidSignature, ValueError):
        return False
    return True


# ---- values ---------------------------------------------------------------------------------------------------------


def sign(value: Frozen, key: Ed25519PrivateKey) -> Signed:
    """The value's canonical JSON, with a signature of these bytes."""
    data = canonical(value)
    return Signed(body=json.loads(data), key=public(key), signature=key.sign(data).hex())


def open_signed(signed: Signed, kind: type[V], by: str | None = None) -> V:
    """The signed value, checked. `by`: the public key that must have signed. Raises Forged, BadRecord."""
    if by is not None and signed.key != by:
        raise Forged(f"a {kind.__name__} is signed by key {signed.key[:8]}, but only {by[:8]} may: do not use it")
    try:
        data = json.dumps(signed.body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise BadRecord(f"a signed {kind.__name__} is no JSON: do not use it") from error
    if not verify(signed.key, signed.signature, data):
        raise Forged(
            f"the signature of a {kind.__name__} does not hold: it was changed after key {signed.key[:8]} signed it; do not use it"
        )
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRecord(f"a signed {kind.__name__}: {'.'.join(map(str, first['loc']))}: {first['msg']}; upgrade elmwood") from error


def open_manifest(signed: Signed, now: float, root: str | None = None, newest: int = 0) -> RunManifest:
    """A manifest, checked. `root`: the root key that this machine knows of the run; `newest`: the latest version it saw; `now`: unix
    seconds, which may be wrong by `AHEAD`. Raises Forged, BadRecord."""
    made = open_signed(signed, RunManifest, root)
    if signed.key != made.root_key:
        raise Forged(f"the manifest is signed by key {signed.key[:8]}, and names {made.root_key[:8]} as its root key: do not use it")
    if made.version < newest:
        raise Forged(
            f"the hub offers version {made.version} of run {made.run!r}, this machine has seen version {newest}: it was rolled back"
        )
    if made.issued > now + AHEAD:
        days = (made.issued - now) / 86400
        raise Forged(f"version {made.version} of run {made.run!r} was issued {days:.1f} days in the future: set this machine's clock")
    if now > made.issued + made.expires_s:
        days = (now - made.issued - made.expires_s) / 86400
        raise Forged(f"version {made.version} of run {made.run!r} expired {days:.1f} days ago: the maintainer publishes it again")
    return made


def digest(value: Frozen) -> str:
    """sha256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


# ---- requests -------------------------------------------------------------------------------------------------------


class Caller(NamedTuple):
    """Who signed a request."""

    key: str
    time: int  # unix seconds
    nonce: str


def sign_request(method: str, target: str, body: bytes | str, time: float, key: Ed25519PrivateKey) -> dict[str, str]:
    """Headers of a signed request. `target`: path and query as sent. `body`: its bytes, or their sha256 in hex."""
    nonce, stamp = secrets.token_hex(16), str(int(time))
    signature = key.sign(_message(method, target, body, stamp, nonce)).hex()
    return {KEY: public(key), TIME: stamp, NONCE: nonce, SIGNATURE: signature}


def check_request(method: str, target: str, body: bytes | str, headers: Mapping[str, str], time: float) -> Caller:
    """Who signed a request; `headers` are looked up without regard to case by the server's mapping. Raises Forged.

    Whether the nonce is new is for the database to say.
    """
    key, stamp, nonce, signature = (headers.get(name, "") for name in (KEY, TIME, NONCE, SIGNATURE))
    if not key or not signature:
        raise Forged("the request is not signed: sign it with the device's key")
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12 and len(nonce) == 32 and nonce.isascii() and nonce.isalnum()):
        raise Forged(f"the headers {TIME} and {NONCE} need whole unix seconds and 32 letters and digits")
    if abs(int(stamp) - time) > SKEW:
        raise Forged(
            f"the request was signed {int(stamp) - time:+.0f} s from the hub's time, {SKEW:.0f} s are allowed: set this machine's clock"
        )
    if not verify(key, signature, _message(method, target, body, stamp, nonce)):
        raise Forged("the signature does not hold: sign method, target, sha256 of the body, time and nonce as sent")
    return Caller(key, int(stamp), nonce)


def _message(method: str, target: str, body: bytes | str, stamp: str, nonce: str) -> bytes:
    seen = body if isinstance(body, str) else hashlib.sha256(body).hexdigest()
    return f"{method}\n{target}\n{seen}\n{stamp}\n{nonce}".encode()


def commit(adapter: str, key: str, salt: str) -> str:
    """The commitment to an adapter: sha256 over its sha256, the device's key and the salt, each in hex, as one string."""
    return hashlib.sha256(f"{adapter}{key}{salt}".encode("ascii")).hexdigest()


def secret_hash(code: str) -> str:
    """What a hub keeps of a recovery code."""
    return hashlib.sha256(code.encode()).hexdigest()


def as_json(value: Frozen) -> dict[str, Any]:
    """The value as plain JSON, defaults included."""
    return value.model_dump(mode="json")
