"""The rules of leases, submissions and credit, as functions of their arguments. Time is the hub's uptime in seconds, an argument."""

import hashlib
from typing import NamedTuple

from elmwood.errors import BadInput
from elmwood.hub.messages import Finite, Gate, Terms

MISSED = 3  # beats, after which a lease ends
NEVER = 1e15  # an uptime that does not come

# state of a domain -> what happens -> state then. Everything else is refused.
DOMAIN = {
    "open": {"claim": "leased", "revive": "leased", "adopt": "accepted"},
    "leased": {"submit": "submitted", "expire": "open", "release": "open"},
    "submitted": {"accept": "accepted", "reject": "open", "quarantine": "quarantined"},
    "quarantined": {"queue": "submitted", "accept": "accepted", "reject": "open"},
    "accepted": {"retire": "open"},
}
LEASE = {
    "running": {"beat": "running", "pause": "paused", "upload": "uploading", "submit": "done", "release": "released", "expire": "expired"},
    "paused": {"beat": "paused", "resume": "running", "pause": "paused", "release": "released", "expire": "expired"},
    "uploading": {"beat": "uploading", "upload": "uploading", "submit": "done", "release": "released", "expire": "expired"},
    "expired": {"revive": "running"},
    "done": {},
    "released": {},
}  # fmt: skip
SUBMISSION = {
    "queued": {"take": "verifying", "withdraw": "rejected"},
    "verifying": {"accept": "accepted", "reject": "rejected", "fault": "queued", "expire": "queued", "quarantine": "quarantined"},
    "quarantined": {"verify-again": "queued", "reject": "rejected"},
    "accepted": {},
    "rejected": {},
}
LIVE = ("running", "paused", "uploading")  # leases that hold their domain


class Refusal(BadInput):
    """What the hub does not do, as a problem+json body: `status` of HTTP, a code from a closed list, and what helps."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        do: str = "",
        kept: str = "",
        retryable: bool = False,
        retry_after: float = 0,
        **fields,
    ):  # fmt: skip
        super().__init__(f"{detail}: {do}" if do else detail)
        self.status, self.code, self.detail, self.do, self.kept = status, code, detail, do, kept
        self.retryable, self.retry_after, self.fields = retryable, retry_after, fields


def after(table: dict[str, dict[str, str]], state: str, what: str) -> str:
    """The state after something happens. Raises Refusal."""
    try:
        return table[state][what]
    except KeyError:
        allowed = ", ".join(table.get(state, {})) or "nothing"
        raise Refusal(
            409, "wrong-state", f"{what!r} is not possible in the state {state!r}, only {allowed}", do="ask for its state"
        ) from None


# ---- deadlines of a lease -------------------------------------------------------------------------------------------


class Life(NamedTuple):
    """When a lease ends by itself."""

    beat_due: float
    progress_due: float
    final_due: float
    pause_left: float
    paused_at: float | None = None
    step: int = 0

    @property
    def due(self) -> float:
        """The first deadline that counts: a pause stops the one for progress."""
        return min(self.beat_due, self.final_due, NEVER if self.paused_at is not None else self.progress_due)

    def missed(self, now: float) -> str | None:
        """Which deadline has passed: beat, progress or final."""
        if now > self.final_due:
            return "final"
        if self.paused_at is None and now > self.progress_due:
            return "progress"
        return "beat" if now > self.beat_due else None


def grant(terms: Terms, now: float) -> Life:
    return Life(now + MISSED * terms.beat_s, now + terms.progress_s, now + terms.final_s, terms.pause_s)


def beat(life: Life, terms: Terms, step: int, now: float) -> Life:
    """A beat shows that a machine is there; only a further step is progress."""
    if life.paused_at is not None:
        return life
    moved = step > life.step
    return life._replace(
        beat_due=now + MISSED * terms.beat_s,
        progress_due=now + terms.progress_s if moved else life.progress_due,
        step=max(step, life.step),
    )


def pause(life: Life, terms: Terms, now: float) -> Life:
    """No beats are needed until the time for pauses is used up."""
    if life.paused_at is not None:
        return life
    if not life.pause_left > 0:
        raise Refusal(409, "no-pause-left", f"this lease has paused for all of its {terms.pause_s:.0f} s", do="resume or release it")
    return life._replace(paused_at=now, beat_due=now + life.pause_left)


def resume(life: Life, terms: Terms, now: float) -> Life:
    """The deadline for progress moves by the time paused."""
    if life.paused_at is None:
        return life._replace(beat_due=now + MISSED * terms.beat_s)
    paused = now - life.paused_at
    return life._replace(
        paused_at=None, beat_due=now + MISSED * terms.beat_s, progress_due=life.progress_due + paused,
        pause_left=max(0.0, life.pause_left - paused),
    )  # fmt: skip


def revive(life: Life, terms: Terms, step: int, now: float) -> Life | None:
    """An expired lease whose domain nobody else got goes on at its next beat; after a standstill only with a further step."""
    if life.missed(now) == "final" or (step <= life.step and life.paused_at is None and now > life.progress_due):
        return None
    woken = resume(life, terms, now)
    return woken._replace(progress_due=now + terms.progress_s, step=max(step, life.step))


# ---- claims ---------------------------------------------------------------------------------------------------------


def init_seed(run: str, domain: int, account: str, given: int) -> int:
    """The rng_seed of a lease's recipe. Each member has another, and another one after each submission (`given` are there), else honest
    experts of a domain look like copies of one another. A member who lost a lease and gets the domain again goes on where they were."""
    return int.from_bytes(hashlib.sha256(f"{run}/{domain}/{account}/{given}".encode()).digest()[:4], "big") & 0x7FFFFFFF


def who_resumes(boot_id: str, held_boot: str, life: Life, terms: Terms, now: float) -> bool:
    """Whether a key's second claim gets the lease that it holds: on the same machine, or where the other one is silent for a beat and a
    half."""
    last = life.beat_due - MISSED * terms.beat_s
    return boot_id == held_boot or life.paused_at is not None or now - last > 1.5 * terms.beat_s


# ---- verdicts -------------------------------------------------------------------------------------------------------


def after_fault(tries: int, gate: Gate) -> str:
    """What follows a verification without a verdict: another one, or a person."""
    return "quarantine" if tries >= gate.tries else "fault"


def credit(gain: Finite) -> float:
    """Credit of an acceptance, bits per byte that the ensemble gained; never below zero."""
    return max(0.0, float(gain))


def older_client(client: str, minimum: str) -> bool:
    """Whether a client's version is older than the least one; a development version counts as its release."""
    return _version(client) < _version(minimum)


def _version(text: str) -> tuple[int, ...]:
    digits = (part for part in text.split("+")[0].replace("-", ".").split("."))
    found: list[int] = []
    for part in digits:
        head = ""
        for letter in part[:9]:
            if not letter.isascii() or not letter.isdigit():
                break
            head += letter
        if not head:
            break
        found.append(int(head))
    return tuple(found)
