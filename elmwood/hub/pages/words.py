"""States, times and events in words, each state with a tone: a word, a colour and a shape say the same."""

from typing import NamedTuple


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
