"""What was asked of a hub and what it acknowledged, as lines of JSON; and the check of it against the hub's final state.

Every acknowledged write is in the final state; the tokens of a domain grow by one with each grant and by nothing else; a domain's epoch has
one grant and one acceptance at most; the ledger's sums hold at every prefix; the log's chain holds.
"""

import json
import threading
from collections import defaultdict
from pathlib import Path

from sqlalchemy import select

from elmwood.hub import care, events
from elmwood.hub.database import Connection
from elmwood.hub.tables import commitment, credit, event, expert, lease, submission, upload


class History:
    """Acknowledged replies, kept as they come; a line is written before the next thing is done."""

    def __init__(self, path: Path):
        self.file, self.lock = path.open("a", encoding="utf-8"), threading.Lock()

    def add(self, what: str, **facts) -> None:
        with self.lock:
            self.file.write(json.dumps({"what": what} | facts) + "\n")
            self.file.flush()

    def close(self) -> None:
        self.file.close()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check(c: Connection, lines: list[dict]) -> dict[str, int]:
    """Compare what was acknowledged with what is there; counts. Raises AssertionError, Damaged."""
    leases = {row["id"]: row for row in c.all(select(lease))}
    given = {row["id"]: row for row in c.all(select(submission))}
    promised = {row["number"]: row for row in c.all(select(commitment))}
    uploads = {row["id"]: row for row in c.all(select(upload))}
    for line in lines:
        match line["what"]:
            case "grant":
                row = leases[line["lease"]]
                assert (row["domain"], row["token"], row["key"]) == (line["domain"], line["token"], line["key"]), line
            case "beat":
                assert leases[line["lease"]]["step"] >= line["step"], line
            case "commitment":
                assert promised[line["order"]]["lease"] == line["lease"], line
            case "part":
                assert uploads[line["upload"]]["offset"] >= line["offset"], line
            case "submission":
                row = given[line["submission"]]
                assert (row["lease"], row["adapter"], row["expert"]) == (line["lease"], line["adapter"], line["expert"]), line
            case "report":
                assert given[line["submission"]]["state"] == line["state"] or line["state"] == "queued", line
            case "release":
                assert leases[line["lease"]]["state"] == "released", line
    counts = check_events(c)
    check_ledger(c)
    care.check_domains(c)
    return counts | {"acknowledged": len(lines)}


def check_events(c: Connection) -> dict[str, int]:
    """Tokens, grants and acceptances of each domain as the log tells them, against the tables. Raises AssertionError, Damaged."""
    events.check_log(c)
    token, accepted, last = defaultdict(int), set(), {}
    for row in c.all(select(event).order_by(event.c.number)):
        facts = json.loads(row["facts"])
        match row["kind"]:
            case "lease.granted":
                number = facts["domain"]
                assert facts["token"] == token[number] + 1, f"domain {number}: token {facts['token']} after {token[number]}"
                assert last.get(number) in (None, "free"), f"domain {number} was granted while it was {last[number]}"
                token[number], last[number] = facts["token"], "held"
            case "lease.revived":
                assert (last[facts["domain"]], token[facts["domain"]]) == ("free", facts["token"])
                last[facts["domain"]] = "held"
            case "lease.expired" | "lease.released":
                assert (last[facts["domain"]], token[facts["domain"]]) == ("held", facts["token"])
                last[facts["domain"]] = "free"
            case "submission.queued":
                assert token[facts["domain"]] == facts["token"], "a stale holder submitted"
                last[facts["domain"]] = "given"
            case "submission.rejected":
                last[facts["domain"]] = "free"
            case "expert.accepted":
                epoch = facts["domain"], facts["token"]
                assert epoch not in accepted, f"domain {epoch[0]} has two acceptances at token {epoch[1]}"
                accepted.add(epoch)
            case "expert.retired":
                last[facts["domain"]] = "free"
    assert len(accepted) == len(c.all(select(expert.c.digest)))
    return {"events": c.value(select(event.c.number).order_by(event.c.number.desc()).limit(1)), "acceptances": len(accepted)}


def check_ledger(c: Connection) -> None:
    """Each acceptance is paid once; no account is below zero at any prefix. Raises AssertionError."""
    total, paid = defaultdict(float), set()
    for number, row in enumerate(c.all(select(credit).order_by(credit.c.number)), 1):
        assert row["number"] == number, f"line {number} of the ledger is missing"
        key = row["submission"], row["kind"]
        assert key not in paid, f"paid twice: {key}"
        paid.add(key)
        total[row["account"]] += row["amount"]
        assert total[row["account"]] > -1e-9, f"line {number} leaves an account below zero"
    accepted = {row["submission"] for row in c.all(select(expert.c.submission))}
    assert {name for name, kind in paid if kind == "gain"} == accepted
