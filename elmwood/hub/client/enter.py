"""Entering a run: its signed manifest, an account for this device's key, and the volunteer's consent."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from elmwood import __version__
from elmwood.errors import BadInput
from elmwood.hub.client.http import Hub
from elmwood.hub.client.state import Folder, Options, Told, new_code, once
from elmwood.hub.client.transfer import fetch_blob
from elmwood.hub.messages import AccountReply, Consent, NewAccount, NewDevice, RunManifest, RunReply
from elmwood.hub.rules import older_client
from elmwood.hub.signing import open_manifest, public, secret_hash
from elmwood.store import Store
from elmwood.store.disk import write_whole

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def enter(
    hub: Hub, key: "Ed25519PrivateKey", folder: Folder, options: Options, store: Store, tell: Callable[[Told], None]
) -> RunManifest:  # fmt: skip
    """Everything before a lease; what was done before is not done again. Raises BadInput, Forged, Problem."""
    manifest = fetch_manifest(hub, folder)
    if options.dry_run:
        return manifest
    state = folder.read()
    if not state.account:
        state = folder.change(account=register(hub, key, folder, options))
        tell(Told("entered", f"account {state.account}; its recovery code is in {folder.recovery}: copy it to another place"))
    if state.consent != manifest.licences:
        texts = {name: fetch_blob(blob, hub, store).read_text(encoding="utf-8") for name, blob in manifest.licences.model_dump().items()}
        if not options.agree(texts):
            raise BadInput("the licences were not agreed to: nothing was leased; read them with `elmwood join URL`, and agree with --agree")
        consent = Consent(licences=manifest.licences, manifest=manifest.version)
        hub.post("/v1/consents", consent, once("consent", public(key), manifest.licences.model_dump()))
        folder.change(consent=manifest.licences.model_dump())
    return manifest


def fetch_manifest(hub: Hub, folder: Folder, now: Callable[[], float] = time.time) -> RunManifest:
    """The run's manifest: signed by the key that signed the first one seen here, not older than the last, and for this version of the
    client. Raises BadInput, Forged, BadRecord.
    """
    state, offered = folder.read(), RunReply.model_validate_json(hub.get("/v1/run").body).manifest
    manifest = open_manifest(offered, now() + hub.skew, state.root_key or None, state.manifest)
    if older_client(__version__, manifest.minimum_client):
        raise BadInput(f"this is elmwood {__version__}, and the hub needs {manifest.minimum_client}: pip install -U elmwood")
    folder.change(root_key=manifest.root_key, manifest=manifest.version)
    return manifest


def register(hub: Hub, key: "Ed25519PrivateKey", folder: Folder, options: Options) -> str:
    """An account for this key: a new one, or one of other devices; its id."""
    body: Any
    if options.account:
        if not options.recovery_code:
            raise BadInput("a further device of an account needs its recovery code: give it with --recovery-code")
        body, target = NewDevice(account=options.account, recovery_code=options.recovery_code), "/v1/devices"
    else:
        if not folder.recovery.exists():
            write_whole(folder.recovery, f"{new_code()}\n".encode())
            folder.recovery.chmod(0o600)
        code = folder.recovery.read_text(encoding="ascii").strip()
        body, target = NewAccount(name=options.name, recovery=secret_hash(code)), "/v1/accounts"
    reply = hub.post(target, body, once("register", public(key), options.account))
    return AccountReply.model_validate_json(reply.body).account
