"""The log of events, a hash chain of ids, and the ledger of credit; and the check of both.

Names of people stand in neither, so they can be erased while the chain still verifies.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import func, select

from elmwood.errors import Damaged
from elmwood.hub.database import Connection
from elmwood.hub.tables import chain, credit, event

START = "0" * 64  # before the first event

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_end = select(chain.c.number, chain.c.hash).where(chain.c.id == 1)
_credits = select(func.coalesce(func.max(credit.c.number), 0))


def hash_event(number: int, kind: str, subject: str, facts: Mapping[str, Any], at: int, previous: str) -> str:
    """sha256 (hex) of the canonical JSON of an event's fields."""
    plain = {"number": number, "kind": kind, "subject": subject, "facts": dict(facts), "at": at, "previous": previous}
    return hashlib.sha256(_encode(plain).encode()).hexdigest()


def log(c: Connection, kind: str, subject: str, at: float, **facts: str | int | float | None) -> int:
    """Append an event, inside a write; its number."""
    if c.end is None:
        row = c.one(_end)
        c.end = row["number"], row["hash"]
    last, previous = c.end
    number, when = last + 1, int(at)
    mark = hash_event(number, kind, subject, facts, when, previous)
    c.insert(event, number=number, kind=kind, subject=subject, facts=_encode(facts), at=when, previous=previous, hash=mark)
    c.end = number, mark
    return number


def pay(c: Connection, account: str, amount: float, kind: str, submission: str, verdict: str) -> int:
    """Append a line to the ledger, once for each submission and kind; how many lines were added."""
    number = c.value(_credits) + 1
    return c.insert(credit, ignore=True, number=number, account=account, amount=amount, kind=kind, submission=submission, verdict=verdict)


def check_chain(rows: Iterable[Mapping[str, Any]], start: str = START, after: int = 0) -> tuple[int, str]:
    """Check events in order; number and hash of the last. Raises Damaged, naming the first that is wrong."""
    previous, number = start, after
    for row in rows:
        number += 1
        facts = json.loads(row["facts"]) if isinstance(row["facts"], str) else row["facts"]
        mark = hash_event(row["number"], row["kind"], row["subject"], facts, row["at"], row["previous"])
        if row["number"] != number or row["previous"] != previous or row["hash"] != mark:
            raise Damaged(f"event {number} of the log was changed, or one before it is missing: restore the hub from a backup")
        previous = row["hash"]
    return number, previous


def check_log(c: Connection) -> int:
    """Check the whole chain against its end; the number of events. Raises Damaged."""
    end = c.one(_end)
    found = check_chain(c.all(select(event).order_by(event.c.number)))
    if found != (end["number"], end["hash"]):
        raise Damaged(f"the log has {found[0]} events, and its end is number {end['number']}: restore the hub from a backup")
    return found[0]
