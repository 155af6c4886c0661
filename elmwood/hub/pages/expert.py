"""The page of an expert: its verdict, its training as the member reported it, its card, and what it was made from."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from elmwood.errors import ElmwoodError
from elmwood.hub.actions.submissions import public_checks
from elmwood.hub.database import Connection
from elmwood.hub.messages import CheckReply
from elmwood.hub.pages import draw, statements
from elmwood.hub.pages.queries import Clock, Head, Person
from elmwood.hub.pages.words import EXPERTS, FAILED, PASSED, State, ago, state
from elmwood.records import Corpus, Expert, Partition, Point, Record, Seed, parse
from elmwood.report import lineage
from elmwood.report.data import Ancestor
from elmwood.report.formats import with_prefix
from elmwood.study.page import summary

POINTS = TypeAdapter(tuple[Point, ...])


def expert_page(c: Connection, clock: Clock, run: Head, digest: str) -> dict[str, Any] | None:
    row = c.one(statements.EXPERT, digest=digest)
    found = read_record(c, digest)
    if row is None or not isinstance(found, Expert):
        return None
    facts, member = json.loads(row["facts"]), Person(row["account"], row["member"])
    points = POINTS.validate_python(facts.get("curve") or ())
    verdict = c.one(statements.RECORD, digest=row["verdict"]) if row["verdict"] else None
    status = state(EXPERTS, row["status"])
    return {
        "expert": {
            "digest": digest, "domain": row["domain"], "domain_name": row["domain_name"], "state": status, "member": member,
            "gain": row["gain"], "tokens": found.recipe.tokens, "verdict": row["verdict"],
        },
        "lede": _lede(row, member, status, clock),
        "checks": [show_check(check) for check in public_checks(json.loads(verdict["body"])["checks"])] if verdict else [],
        "curve": draw.curve(points, row["domain"]),
        "points": points,
        "facts": list(_card(row, found, facts)),
        "tree": lineage.draw(lineage.tree(list(_ancestors(found, c)))),
        "derived": c.all(statements.DERIVED_OF, digest=digest),
    }  # fmt: skip


def read_record(c: Connection, digest: str) -> Record | None:
    """A record of the run; None where it is not there."""
    row = c.one(statements.RECORD, digest=digest)
    return parse(row["body"].encode()) if row else None


def show_check(check: CheckReply) -> dict[str, Any]:
    """A check as a row."""
    return {
        "name": check.name,
        "value": "–" if check.value is None else f"{check.value:.4g}",
        "threshold": "–" if check.threshold is None else f"{check.side} {check.threshold:.4g}",
        "passed": check.passed,
        "svg": draw.gauge(check),
        "state": PASSED if check.passed else FAILED,
    }


def _lede(row: Any, member: Person, status: State, clock: Clock) -> str:
    said = f"An adapter by {member.name or 'an erased account'} for {row['domain_name']}, accepted {ago(clock.unix - row['at'])}."
    if row["status"] == "probation":
        return f"{said} It is on probation: its influence on every token is bounded."
    if row["status"] == "retired":
        return f"{said} It was retired ({row['reason']}): the ensemble is as if it had never been there."
    return said


def _card(row: Any, found: Expert, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    recipe, hardware = found.recipe, facts.get("hardware") or {}
    yield "method", f"{recipe.method}, rank {recipe.rank}"
    yield "tier", row["tier"]
    yield "steps", f"{recipe.steps:,} of {recipe.batch} × {recipe.length} tokens"
    yield "learning rate", f"{recipe.learning_rate:g}, {recipe.schedule}"
    yield "init seed", f"{recipe.rng_seed}"
    yield "tokens, as reported", with_prefix(facts.get("tokens") or 0)
    yield "client, as reported", str(facts.get("client") or "–")
    yield "machine, as reported", str(hardware.get("device") or "–")
    yield "in the ensemble", f"since version {row['since']}" + (f", until {row['until']}" if row["until"] is not None else "")
    yield "adapter", row["adapter"]
    yield "record", found.digest


def _ancestors(found: Expert, c: Connection) -> Iterator[Ancestor]:
    """The expert, and what it was made from, as far as the hub has the records."""

    def line(depth: int, record: Record) -> Ancestor:
        return Ancestor(depth=depth, kind=record.kind, digest=record.digest, summary=summary(record))

    yield line(0, found)
    for digest in filter(None, (found.seed, found.partition)):
        try:
            one = read_record(c, digest)
        except ElmwoodError:
            continue
        if one is None:
            continue
        yield line(1, one)
        corpus = one.corpus if isinstance(one, Seed | Partition) and one.corpus else None
        below = read_record(c, corpus) if corpus else None
        if isinstance(below, Corpus):
            yield line(2, below)
