"""A run with something to see on every page, made through the hub's own actions: members with hostile names, leases in every state,
experts accepted, refused, on probation and retired, a measured snapshot."""

import hashlib
import itertools
import secrets
from typing import NamedTuple

from elmwood.hub import messages, signing
from elmwood.hub.actions import experts, jobs, leases, members, submissions
from elmwood.hub.actions.request import Caller, Moment, current
from elmwood.hub.home import Hub
from elmwood.hub.pages.atlas import Atlas
from elmwood.hub.signing import commit
from elmwood.records import Check, Expert, Point, Verdict, canonical
from elmwood.report.data import Area, MapPoint

EVIL = "<script>alert(1)</script>\"'><img src=x>"  # 40 letters, as many as a name may have
NAMES = ("ada", "grace", EVIL, "linus")
START = 1_780_000_000.0


class Cast(NamedTuple):
    """What the tests look for."""

    callers: tuple[Caller, ...]
    accepted: tuple[str, ...]  # digests of experts that were accepted, the last of them retired


def atlas(domains: int) -> str:
    """A map with a few documents for each domain."""
    places = [MapPoint(x=(n + 0.3 * k % 1) / domains, y=0.1 + 0.08 * k, domain=n, text=EVIL) for n in range(domains) for k in range(9)]
    return Atlas(areas=tuple(Area(name=f"domain {n}") for n in range(domains)), places=tuple(places), text=True).model_dump_json()


def populate(hub: Hub) -> Cast:
    """Fill a run of six domains."""
    ticks = itertools.count()

    def act(fn, *given):
        when = Moment(hub.clock.now(), START + 60 * next(ticks))
        return hub.database.write(lambda c: fn(c, *given, when))

    callers = tuple(join(act, hub, name) for name in NAMES)
    verifier = Caller(signing.public(signing.load_key(hub.home.key_path("verifier"))), "", "verifier")
    admin = verifier._replace(role="admin")
    digests = [
        send(act, hub, caller, verifier, gain, code)
        for caller, gain, code in ((0, 0.0123, None), (1, 0.0081, None), (2, 0.0, "duplicate"), (0, 0.0042, None))
        for caller in (callers[caller],)
    ]
    accepted = tuple(digest for n, digest in enumerate(digests) if n != 2)
    for version, loss in enumerate((2.09, 2.0811, 2.0769), 1):
        made = messages.Measurement(
            version=version, bits_per_byte=loss, standard_error=0.021, seed_bits_per_byte=2.0982, seed_error=0.021, documents=200,
            over_seed=2.0982 - loss, over_seed_error=0.0011, control_bits_per_byte=2.0801, control_error=0.02, gain=2.0801 - loss,
            gain_error=0.002,
        )  # fmt: skip
        act(experts.measure, verifier, made)
    note = messages.Retirement(reason="better-expert", compensate=True)
    hub.database.write(lambda c: experts.retire(c, admin, accepted[-1], note, Moment(hub.clock.now(), START + 3600), hub.office))
    running = claim(act, callers[1])
    act(leases.beat, callers[1], running.lease, messages.Beat(token=running.token, step=4, loss=3.1))
    paused = claim(act, callers[3])
    act(leases.pause, callers[3], paused.lease, paused.token)
    released = claim(act, callers[2])
    act(leases.release, callers[2], released.lease, released.token)
    hand_in(act, hub, callers[0], claim(act, callers[0]))
    return Cast(callers, accepted)


def join(act, hub: Hub, name: str) -> Caller:
    """A member with one device, who agreed to the licences."""
    key = secrets.token_hex(32)
    made = act(members.register, Caller(key, "", ""), messages.NewAccount(name=name, recovery="0" * 64))
    caller = Caller(key, made.account, "member")
    licences = hub.read(current).licences
    hub.database.write(lambda c: members.agree(c, caller, messages.Consent(licences=licences, manifest=1), hub.moment(), "{}"))
    return caller


def claim(act, caller: Caller) -> messages.Grant:
    return act(leases.claim, caller, messages.Claim(tier="cpu", boot_id="00000000-0000"))


def hand_in(act, hub: Hub, caller: Caller, grant: messages.Grant) -> str:
    """Submit an adapter; the digest of the expert that the hub makes of it."""
    data = f"adapter {grant.lease}".encode()
    sha, salt = hashlib.sha256(data).hexdigest(), secrets.token_hex(16)
    act(submissions.promise, caller, messages.Commitment(lease=grant.lease, token=grant.token, commitment=commit(sha, caller.key, salt)))
    upload = act(submissions.open_upload, caller, grant.lease, grant.token, len(data)).upload
    act(submissions.advance, caller, upload, 0, len(data), sha)
    curve = tuple(Point(step=step, tokens=step * 2048, loss=3.0 - 0.05 * step) for step in range(1, 11))
    request = messages.SubmissionRequest(
        lease=grant.lease, token=grant.token, upload=upload, adapter=sha, bytes=len(data), salt=salt, tokens=20480, curve=curve,
        client=EVIL, hardware=messages.DeviceFacts(device=EVIL),
    )  # fmt: skip
    made = Expert(
        seed=grant.seed, partition=grant.partition, domain=grant.domain, data=tuple(shard.blob for shard in grant.shards),
        recipe=grant.recipe, files={"adapter_model.safetensors": f"sha256:{sha}"},
    )  # fmt: skip
    act(submissions.submit, caller, request, submissions.Prepared(made, canonical(made).decode()))
    return made.digest


def send(act, hub: Hub, caller: Caller, verifier: Caller, gain: float, code: str | None) -> str:
    """Lease, submit, and get a verdict."""
    digest = hand_in(act, hub, caller, claim(act, caller))
    job = act(jobs.take, verifier, messages.TakeJob(boot_id="00000000-0001"))
    copy = code == "duplicate"
    rows = (
        ("weights are finite", 1.0, 1.0, "at least", True),
        ("not a copy: cosine with any accepted delta", 0.9999 if copy else 0.21, 0.85, "at most", not copy),
        ("better than the seed on its own domain, bits per byte at least", 0.0121, 0.002, "at least", True),
        ("gain on public over gain on secret text", None, 1.8, "at most", not copy),
    )
    checks = tuple(Check(**dict(zip(("name", "value", "threshold", "side", "passed"), row, strict=True))) for row in rows)
    verdict = Verdict(expert=digest, accepted=code is None, checks=checks)
    report = messages.Report(token=job.token, verdict=verdict, code=code, gain=gain, noise_floor=1.2e-5, seconds=9.0)
    hub.database.write(lambda c: jobs.report(c, verifier, job.job, report, Moment(hub.clock.now(), START + 1800), hub.office))
    return digest
