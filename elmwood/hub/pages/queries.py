"""What each page shows, read from the database in one transaction. Every function takes a connection and the clock, and changes nothing."""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from elmwood.hub.database import Connection
from elmwood.hub.messages import Measurement, RunManifest, Signed, Snapshot
from elmwood.hub.pages import draw, statements
from elmwood.hub.pages.atlas import Atlas
from elmwood.hub.pages.words import CODES, DOMAINS, LEASES, REASONS, SUBMISSIONS, State, state, tell
from elmwood.hub.rules import MISSED
from elmwood.report.formats import spell_time


class Clock(NamedTuple):
    """Now, for people (unix seconds) and for deadlines (the hub's uptime, seconds)."""

    unix: float
    uptime: float


class Person(NamedTuple):
    """A member; no name where it was erased."""

    account: str
    name: str | None


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


class Head(NamedTuple):
    """What every page says of the run."""

    name: str
    version: int
    faults: int
    manifest: RunManifest
    atlas: Atlas | None


class DomainLine(NamedTuple):
    """A domain and who has it."""

    number: int
    name: str
    terms: tuple[str, ...]
    shards: int
    bytes: int  # of text; 0: volunteers bring their own
    state: State
    token: int  # of the last grant
    expert: str | None
    gain: float | None
    member: Person | None
    share: float | None  # of the steps that were trained, while it is leased


class Totals(NamedTuple):
    """Counts of a run."""

    domains: int
    filled: int
    leased: int
    open: int
    members: int
    contributors: int
    tokens: int


# ---- rows -----------------------------------------------------------------------------------------------------------


def head(c: Connection) -> Head:
    """The run. Raises LookupError where none was published."""
    row = c.one(statements.RUN)
    if row is None:
        raise LookupError("no run was published here yet")
    return Head(row["name"], row["version"], row["faults"], _manifest(row["signed"]), _atlas(row["atlas"]))


@lru_cache(4)
def _manifest(text: str) -> RunManifest:
    return RunManifest.model_validate(Signed.model_validate_json(text).body)


@lru_cache(4)
def _atlas(text: str | None) -> Atlas | None:
    return Atlas.model_validate_json(text) if text else None


def _steps(manifest: RunManifest, tier: str | None) -> int:
    found = next((one for name, one in manifest.tiers.items() if name == tier), None)
    return found.recipe.steps if found else 0


def domains(c: Connection, manifest: RunManifest) -> list[DomainLine]:
    """All domains, in order."""
    return [_domain(row, manifest) for row in c.all(statements.DOMAINS)]


def _domain(row: Mapping[str, Any], manifest: RunManifest) -> DomainLine:
    shards = json.loads(row["shards"])
    held = row["state"] != "open" and row["account"] is not None
    steps = _steps(manifest, row["tier"])
    return DomainLine(
        number=row["number"],
        name=row["name"],
        terms=tuple(json.loads(row["terms"])),
        shards=len(shards),
        bytes=sum(shard["bytes"] for shard in shards),
        state=state(DOMAINS, row["state"]),
        token=row["token"],
        expert=row["expert"],
        gain=row["gain"],
        member=Person(row["account"], row["member"]) if held else None,
        share=min(1.0, row["step"] / steps) if row["state"] == "leased" and steps else None,
    )


def totals(c: Connection, lines: Iterable[DomainLine], manifest: RunManifest) -> Totals:
    """Counts of the run."""
    lines = list(lines)
    accepted = c.all(statements.ACCEPTED)
    tokens = sum(row["count"] * manifest.tiers[row["tier"]].recipe.tokens for row in accepted if row["tier"] in manifest.tiers)
    words = [line.state.word for line in lines]
    return Totals(
        domains=len(lines),
        filled=sum(line.expert is not None for line in lines),
        leased=words.count(DOMAINS["leased"].word),
        open=words.count(DOMAINS["open"].word),
        members=len(c.all(statements.MEMBERS)),
        contributors=len({row["account"] for row in accepted if row["status"] != "retired"}),
        tokens=tokens,
    )


def _leases(rows: Iterable[Mapping[str, Any]], manifest: RunManifest, clock: Clock) -> list[dict[str, Any]]:
    return [
        {
            "token": row["token"], "domain": row["domain"], "domain_name": row["domain_name"], "tier": row["tier"],
            "member": Person(row["account"], row["member"]), "state": _lease_state(row), "step": row["step"],
            "steps": _steps(manifest, row["tier"]), "open": row["state"] in ("running", "paused", "uploading"),
            "age_s": clock.unix - row["at"],
            "beat_age_s": None if row["paused_at"] else clock.uptime - (row["beat_due"] - MISSED * manifest.terms.beat_s),
        }
        for row in rows
    ]  # fmt: skip


def _lease_state(row: Mapping[str, Any]) -> State:
    found = state(LEASES, row["state"])
    return State(f"{found.word}: {REASONS[row['why']]}", found.tone) if row["why"] in REASONS else found


def _submissions(rows: Iterable[Mapping[str, Any]], clock: Clock) -> list[dict[str, Any]]:
    return [
        {
            "submission": row["id"], "expert": row["accepted"], "domain": row["domain"], "domain_name": row["domain_name"],
            "member": Person(row["account"], row["member"]), "state": state(SUBMISSIONS, row["state"]), "gain": row["gain"],
            "why": CODES.get(row["code"], row["code"] or ""), "tries": row["tries"], "age_s": clock.unix - row["at"],
        }
        for row in rows
    ]  # fmt: skip


def _ledger(rows: Iterable[Mapping[str, Any]], clock: Clock) -> list[dict[str, Any]]:
    words = {"gain": "accepted for", "compensation": "taken back, retired from"}
    return [
        {
            "number": row["number"], "member": Person(row["account"], row["member"]), "reason": words.get(row["kind"], row["kind"]),
            "domain": row["domain"], "domain_name": row["domain_name"], "amount": row["amount"], "balance": row["balance"],
            "expert": row["expert"], "age_s": None if row["at"] is None else clock.unix - row["at"],
        }
        for row in rows
    ]  # fmt: skip


# ---- pages ----------------------------------------------------------------------------------------------------------


def overview(c: Connection, clock: Clock, run: Head) -> dict[str, Any]:
    lines = domains(c, run.manifest)
    counts = totals(c, lines, run.manifest)
    points = _growth(c)
    last = points[-1]["measured"] if points else None
    return {
        "lede": _lede(counts, last),
        "standing": _standing(last),
        "totals": counts,
        "growth": {
            "svg": draw.growth([point["loss"] for point in points], _levels(last)),
            "points": points,
            "dense": bool(last and last.control_bits_per_byte),
        },
        "domains": lines,
        "events": tell(c.all(statements.EVENTS), subjects(c), clock.unix)[:14],
    }


def _lede(counts: Totals, last: Measurement | None) -> str:
    filled, members = f"{counts.filled} of {counts.domains} domains", counts.contributors
    said = f"{filled} {'has' if counts.filled == 1 else 'have'} an expert, trained by {members} member{'' if members == 1 else 's'}."
    if counts.filled == 0:
        said = f"{counts.domains} domains wait for their experts."
    if last:
        said += f" Together they need {last.bits_per_byte:.3f} bits for each byte of held-out text, the seed alone"
        said += f" {last.seed_bits_per_byte:.3f}."
    return said


def _growth(c: Connection) -> list[dict[str, Any]]:
    """The measured snapshots, in order. Their error is that of the gain over the seed, as far as it is known."""
    names = {row["number"]: row["name"] for row in c.all(statements.NAMES)}
    places = {row["digest"]: row["domain"] for row in c.all(statements.EXPERTS)}
    points: list[dict[str, Any]] = []
    for row in c.all(statements.SNAPSHOTS):
        if not row["measured"]:
            continue
        found, made = Measurement.model_validate_json(row["measured"]), Snapshot.model_validate(json.loads(row["signed"])["body"])
        if points and not (made.added or made.removed):
            continue  # the same experts: one left its probation
        changed = places.get(made.added or next(iter(made.removed), ""))
        points.append(
            {
                "version": made.version, "experts": len(made.experts), "measured": found, "domain": changed,
                "domain_name": names.get(changed), "change": "accepted:" if made.added else "retired:" if made.removed else "the first",
                "loss": Estimate(found.bits_per_byte, found.standard_error if found.over_seed_error is None else found.over_seed_error),
            }
        )  # fmt: skip
    return points


def _levels(last: Measurement | None) -> list[tuple[float, str]]:
    if last is None:
        return []
    dense = [] if last.control_bits_per_byte is None else [(last.control_bits_per_byte, "one dense model, as many tokens")]
    return [(last.seed_bits_per_byte, "the seed alone"), *dense]


def _standing(last: Measurement | None) -> dict[str, Any]:
    if last is None:
        return {"ensemble": None, "over_seed": None, "over_dense": None}
    over = last.seed_bits_per_byte - last.bits_per_byte if last.over_seed is None else last.over_seed
    return {
        "ensemble": Estimate(last.bits_per_byte, last.standard_error),
        "over_seed": Estimate(over, last.seed_error if last.over_seed_error is None else last.over_seed_error),
        "over_dense": None if last.gain is None else Estimate(last.gain, last.gain_error or 0.0),
    }


def subjects(c: Connection) -> dict[str, dict[str, Any]]:
    """What events speak of, by id: domain and its name, member, expert."""
    names = {row["number"]: row["name"] for row in c.all(statements.NAMES)}
    people = {row["id"]: row["name"] for row in c.all(statements.ACCOUNTS)}
    found: dict[str, dict[str, Any]] = {account: {"member": name} for account, name in people.items()}
    for query in (statements.RECENT_LEASES, statements.RECENT_SUBMISSIONS, statements.RECENT_EXPERTS):
        for row in c.all(query):
            found[row["id"]] = {
                "member": people.get(row["account"]), "domain": row["domain"], "domain_name": names.get(row["domain"]),
                "expert": row["expert"], "code": row["code"],
            }  # fmt: skip
    return found


def domains_page(c: Connection, clock: Clock, run: Head) -> dict[str, Any]:
    lines = domains(c, run.manifest)
    atlas = run.atlas
    return {
        "domains": lines,
        "totals": totals(c, lines, run.manifest),
        "map": draw.atlas(atlas) if atlas else None,
        "dots": len(atlas.places) if atlas and atlas.text else 0,
    }


def domain_page(c: Connection, clock: Clock, run: Head, number: int) -> dict[str, Any] | None:
    line = next((line for line in domains(c, run.manifest) if line.number == number), None)
    if line is None:
        return None
    return {
        "domain": line,
        "terms": line.terms,
        "leases": _leases(c.all(statements.LEASES_OF, number=number), run.manifest, clock),
        "submissions": _submissions(c.all(statements.SUBMISSIONS_OF_DOMAIN, number=number), clock),
    }


def members_page(c: Connection, clock: Clock, run: Head) -> dict[str, Any]:
    lines = _members(c, run.manifest)
    return {
        "members": lines,
        "most": max((line["credit"] for line in lines), default=0) or 1,
        "entries": _ledger(c.all(statements.LEDGER), clock),
    }


def _members(c: Connection, manifest: RunManifest) -> list[dict[str, Any]]:
    """Members by credit, which is folded from the ledger."""
    credit = {row["account"]: row["amount"] for row in c.all(statements.CREDIT)}
    sent = {row["account"]: row["count"] for row in c.all(statements.SENT)}
    lines = {
        row["id"]: {
            "member": Person(row["id"], row["name"]), "credit": credit.get(row["id"], 0.0), "submitted": sent.get(row["id"], 0),
            "accepted": 0, "tokens": 0,
        }
        for row in c.all(statements.MEMBERS)
    }  # fmt: skip
    for row in c.all(statements.ACCEPTED):
        if (line := lines.get(row["account"])) is None:
            continue
        tier = manifest.tiers.get(row["tier"])
        line["tokens"] += row["count"] * (tier.recipe.tokens if tier else 0)
        line["accepted"] += row["count"] if row["status"] != "retired" else 0
    return sorted(lines.values(), key=lambda line: (-line["credit"], -line["submitted"]))


def member_page(c: Connection, clock: Clock, run: Head, account: str) -> dict[str, Any] | None:
    line = next((line for line in _members(c, run.manifest) if line["member"].account == account), None)
    if line is None:
        return None
    return {
        "member": line["member"],
        "line": line,
        "entries": _ledger(c.all(statements.LEDGER_OF, account=account), clock),
        "submissions": _submissions(c.all(statements.SUBMISSIONS_OF_MEMBER, account=account), clock),
    }


def queue_page(c: Connection, clock: Clock, run: Head) -> dict[str, Any]:
    waiting = _submissions(c.all(statements.WAITING), clock)
    leases = _leases(c.all(statements.LIVE_LEASES), run.manifest, clock)
    done = {row["submission"]: row["done"] for row in c.all(statements.DONE_OF_JOBS)}
    for one in waiting:
        one["done"] = done.get(one["submission"])
    floors = [json.loads(row["report"]).get("noise_floor") for row in c.all(statements.REPORTS)]
    known = [floor for floor in floors if floor is not None]
    health = [
        ("uptime", spell_time(clock.uptime), ""),
        ("in training", f"{len(leases)}", ""),
        ("waiting for a verdict", f"{len(waiting)}", ""),
        ("verifications that failed", f"{run.faults:,}", ""),
        ("noise of a verification", f"{max(known):.2g}" if known else "not measured", "bits/byte" if known else ""),
    ]
    return {"health": health, "leases": leases, "jobs": waiting, "submissions": _submissions(c.all(statements.DECIDED), clock)}


def join_page(c: Connection, clock: Clock, run: Head) -> dict[str, Any]:
    names = {"cpu": "a CPU"}
    tiers = [{"name": names.get(name, f"a GPU of {name} GB"), "recipe": tier.recipe} for name, tier in run.manifest.tiers.items()]
    return {"totals": totals(c, domains(c, run.manifest), run.manifest), "tiers": tiers}
