"""States, times and events in words, each state with a tone: a word, a colour and a shape say the same."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class State(NamedTuple):
    """A state as the pages show it."""

    word: str
    tone: str  # good | busy | warn | bad | idle


DOMAINS = {
    "open": State("open", "idle"),
    "leased": State("in training", "busy"),
    "submitted": State("being verified", "busy"),
    "quarantined": State("waits for a person", "warn"),
    "accepted": State("has an expert", "good"),
}
LEASES = {
    "running": State("training", "busy"),
    "paused": State("paused", "warn"),
    "uploading": State("uploading", "busy"),
    "done": State("submitted", "good"),
    "released": State("released", "idle"),
    "expired": State("expired", "bad"),
}
SUBMISSIONS = {
    "queued": State("waits for a verifier", "busy"),
    "verifying": State("being verified", "busy"),
    "accepted": State("accepted", "good"),
    "rejected": State("refused", "bad"),
    "quarantined": State("waits for a person", "warn"),
}
EXPERTS = {
    "probation": State("on probation", "warn"),
    "full": State("in the ensemble", "good"),
    "retired": State("retired", "idle"),
}
PASSED, FAILED = State("passed", "good"), State("failed", "bad")


def state(table: dict[str, State], name: str) -> State:
    """A state that the table lacks is shown by its own name."""
    return table.get(name, State(name, "idle"))


def ago(seconds: float | None) -> str:
    """A duration until now, in one unit: "now", "40 s ago", "3 h ago"."""
    if seconds is None:
        return "–"
    if seconds < 2:
        return "now"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds / size):,} {unit} ago"
    return f"{int(seconds)} s ago"


# why a lease ended by itself: the deadline that passed
REASONS = {"beat": "no sign of life", "progress": "no further step", "final": "not in time"}
# why a submission was refused
CODES = {
    "not-safetensors": "not a safetensors file",
    "wrong-tensors": "other tensors than the recipe’s",
    "not-finite": "NaN or infinity in the weights",
    "duplicate": "a copy of an earlier expert",
    "not-novel": "a blend of experts that are there",
    "norm": "its length is far from the others’",
    "no-gain": "no better than the seed on its own domain",
    "no-ensemble-gain": "the ensemble is no better with it",
    "harms": "another domain became worse",
    "overfit-public": "trained on published held-out text",
    "not-finite-scores": "the model with it gives NaN",
    "other-probe": "it does not say what it said when it was trained",
}


# kind of an event -> its words and its tone; other kinds are not shown
EVENTS: dict[str, tuple[str, str]] = {
    "account.made": ("{member} joined", "idle"),
    "account.erased": ("a member’s name was erased", "idle"),
    "device.blocked": ("a device was blocked", "bad"),
    "lease.granted": ("{member} began to train", "busy"),
    "lease.revived": ("{member} came back to", "busy"),
    "lease.released": ("{member} gave back", "idle"),
    "lease.expired": ("{member} was not heard of any more, and no longer has", "warn"),
    "submission.queued": ("{member} submitted an expert for", "busy"),
    "submission.again": ("the ensemble changed, so a submission is verified again:", "idle"),
    "submission.rejected": ("{member}’s submission was refused ({why}) for", "bad"),
    "submission.quarantined": ("a submission of {member} waits for a person:", "warn"),
    "expert.accepted": ("{member}’s expert was accepted for", "good"),
    "expert.retired": ("{member}’s expert was retired ({reason}) from", "warn"),
}


class Told(NamedTuple):
    """An event in words."""

    age_s: float
    text: str
    tone: str
    domain: int | None
    domain_name: str | None
    expert: str | None


def tell(rows: Iterable[Mapping[str, Any]], subjects: Mapping[str, Mapping[str, Any]], now: float) -> list[Told]:
    """Events in words, as far as they are of a kind that is shown."""
    told = []
    for row in rows:
        if row["kind"] in EVENTS:
            about, (text, tone) = subjects.get(row["subject"], {}), EVENTS[row["kind"]]
            facts, code = json.loads(row["facts"]), about.get("code") or ""
            words = text.format(member=about.get("member") or "somebody", why=CODES.get(code, code), reason=facts.get("reason", ""))
            shown = about.get("expert") if row["kind"].startswith("expert.") else None
            told.append(Told(now - row["at"], words, tone, about.get("domain"), about.get("domain_name"), shown))
    return told
