"""Leases, submissions, jobs and the ledger as a state machine: any order of what people do, and a clock that the test holds.

The model beside it is a few dictionaries. What it says must be what the hub answers: who holds a domain, which token counts, who is paid.
"""

import hashlib
import itertools
import json
import sqlite3

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import bindparam, select, update

from elmwood.hub import care, events, signing
from elmwood.hub.actions import experts, jobs, leases, members, submissions
from elmwood.hub.actions.request import Caller, Moment, Request, perform
from elmwood.hub.database import Connection, _open_sqlite
from elmwood.hub.home import upkeep
from elmwood.hub.messages import (
    Beat,
    Claim,
    Commitment,
    Consent,
    Gate,
    JobBeat,
    NewAccount,
    Report,
    Retirement,
    SubmissionRequest,
    TakeJob,
    Terms,
)  # fmt: skip
from elmwood.hub.rules import LIVE, Refusal
from elmwood.hub.tables import account, credit, domain, event, lease, submission
from elmwood.records import Check, Expert, Verdict
from tests.hub.server.people import BOOT
from tests.hub.server.world import open_run

TERMS = Terms(beat_s=10, progress_s=60, final_s=600, pause_s=100)
GATE = Gate(tries=3, job_s=300, job_beat_s=10, cooldown_s=20, probation_s=200)
PEOPLE, DOMAINS = 4, 2
SALT = "5a" * 16
_number = itertools.count()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A published run with some members: its database, which each example copies, its keys and the members' keys."""
    hub = open_run(tmp_path_factory.mktemp("machine"), DOMAINS, terms=TERMS, gate=GATE)
    made = hub.read(lambda c: members.current(c))
    people = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(PEOPLE)]
    for key in people:
        who = hub.database.write(
            lambda c, key=key: members.register(c, Caller(key, "", ""), NewAccount(name="x", recovery=key), hub.moment())
        )
        caller, consent = Caller(key, who.account, "member"), Consent(licences=made.licences, manifest=1)
        hub.database.write(lambda c, caller=caller, consent=consent: members.agree(c, caller, consent, hub.moment(), "{}"))
    path, office, roles = (
        hub.database.path,
        hub.office,
        {n: signing.public(signing.load_key(hub.home.key_path(n))) for n in ("admin", "verifier")},
    )
    hub.close()
    return path, office, people, roles


class Machine(RuleBasedStateMachine):
    template = None

    @initialize()
    def begin(self):
        path, self.office, self.people, self.roles = self.template
        raw = _open_sqlite(None)
        source = sqlite3.connect(path)
        source.backup(raw)
        source.close()
        self.c = Connection(raw, "sqlite")
        self.up, self.unix = 0.0, 1.8e9
        self.held = {}  # person -> (lease, token, domain), the last grant
        self.jobs = []  # every job taken
        self.token = dict.fromkeys(range(DOMAINS), 0)
        self.paid = {}  # submission -> amount
        self.sent = {}  # submission -> request and reply
        self.events = 0

    def teardown(self):
        if hasattr(self, "c"):
            self.c.raw.close()

    # ---- how the hub is asked

    @property
    def now(self):
        return Moment(self.up, self.unix)

    def write(self, fn):
        """A write as the writer does it; a Refusal is its answer."""
        c = self.c
        c.end = None
        c.run("BEGIN")
        c.run("SAVEPOINT one")
        try:
            answer = fn(c)
        except Refusal as refusal:
            c.run("ROLLBACK TO SAVEPOINT one")
            c.end, answer = None, refusal
        if c.end:
            c.run("UPDATE chain SET number = %d, hash = '%s'" % c.end)  # noqa: UP031
        c.run("COMMIT")
        return answer

    def who(self, key):
        return self.c.one(select(members.device).where(members.device.c.key == key))

    def caller(self, key):
        row = self.who(key)
        return Caller(key, row["account"], row["role"])

    def ask(self, key, fn, name=""):
        """A signed request with an Idempotency-Key, as the routes make it."""
        sha = hashlib.sha256(name.encode()).hexdigest()
        known = Request(key, f"{next(_number):032x}", int(self.unix), sha, name)
        return self.write(lambda c: perform(c, known, fn, self.now))

    def state(self, number):
        return self.c.one(select(domain).where(domain.c.number == number))

    def row(self, name):
        return self.c.one(select(lease).where(lease.c.id == name))

    # ---- time

    @rule(seconds=st.sampled_from([1, 9, 21, 31, 59, 101]))
    def pass_time(self, seconds):
        self.up += seconds
        self.unix += seconds

    @rule()
    def tick(self):
        self.write(lambda c: upkeep(c, self.now, self.office))

    @rule()
    def restart(self):
        """The hub is down for a month: no deadline moves, and nobody loses a lease by it."""
        before = [(r["id"], r["state"]) for r in self.c.all(select(lease.c.id, lease.c.state).order_by(lease.c.id))]
        due = {r["id"]: r["due"] for r in self.c.all(select(lease).where(lease.c.state.in_(LIVE)))}
        self.unix += 30 * 86400
        self.write(lambda c: leases.reap(c, self.now))
        after = {r["id"]: r["state"] for r in self.c.all(select(lease.c.id, lease.c.state))}
        for name, state in before:
            assert after[name] == state or due[name] < self.up

    # ---- volunteers

    @rule(n=st.integers(0, PEOPLE - 1), other=st.booleans())
    def claim(self, n, other):
        key = self.people[n]
        held = self.held.get(n)
        live = held and self.row(held[0])["state"] in LIVE
        open_ = [d for d in range(DOMAINS) if self.state(d)["state"] == "open" and self.state(d)["open_at"] <= self.up]
        message = Claim(tier="cpu", boot_id="c0" * 8 if other else BOOT)
        answer = self.write(lambda c: leases.claim(c, self.caller(key), message, self.now))
        if live:
            assert isinstance(answer, Refusal) or (answer.lease, answer.token, answer.resumed) == (held[0], held[1], True)
            assert not isinstance(answer, Refusal) or (answer.code == "held-elsewhere" and self.row(held[0])["boot_id"] != message.boot_id)
        elif not open_:
            assert isinstance(answer, Refusal)
            assert (answer.status, answer.code) == (204, "no-open-domain")
        else:
            assert answer.domain in open_
            assert answer.token == self.token[answer.domain] + 1
            self.token[answer.domain] = answer.token
            self.held[n] = (answer.lease, answer.token, answer.domain)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=st.integers(0, 1))
    def beat(self, data, more):
        n = data.draw(st.sampled_from(sorted(self.held)))
        name, token, number = self.held[n]
        before, owner = self.row(name), self.state(number)
        step = before["step"] + more
        answer = self.write(lambda c: leases.beat(c, self.caller(self.people[n]), name, Beat(token=token, step=step), self.now))
        if before["state"] in LIVE:
            assert answer.alive
            after = self.row(name)
            if before["state"] != "paused":
                assert after["beat_due"] == self.up + 3 * TERMS.beat_s
                assert after["progress_due"] == (self.up + TERMS.progress_s if more else before["progress_due"])  # a beat is not progress
        elif isinstance(answer, Refusal):
            assert answer.status in (409, 410)
            assert (answer.status == 409) == (before["state"] == "expired" and self.token[number] != token)
        else:  # it goes on, because nobody else has the domain
            assert before["state"] == "expired"
            assert (owner["state"], owner["token"]) == ("open", token)
            assert answer.state == "running"

    @precondition(lambda self: self.held)
    @rule(data=st.data(), what=st.sampled_from(["pause", "resume", "release"]))
    def other_words(self, data, what):
        n = data.draw(st.sampled_from(sorted(self.held)))
        name, token, number = self.held[n]
        before = self.row(name)["state"]
        answer = self.write(lambda c: getattr(leases, what)(c, self.caller(self.people[n]), name, token, self.now))
        if before not in LIVE and not (what == "release" and before == "released"):
            assert isinstance(answer, Refusal)
        if what == "release" and not isinstance(answer, Refusal):
            assert self.row(name)["state"] == "released"
            assert self.state(number)["token"] != token or self.state(number)["state"] != "leased"

    @precondition(lambda self: self.held)
    @rule(data=st.data(), times=st.integers(1, 3))
    def submit(self, data, times):
        """Commit, upload and submit; the same submission several times."""
        n = data.draw(st.sampled_from(sorted(self.held)))
        key = self.people[n]
        name, token, number = self.held[n]
        before, owner = self.row(name)["state"], self.state(number)
        sha = hashlib.sha256(f"{name}".encode()).hexdigest()
        caller = self.caller(key)
        promised = Commitment(lease=name, token=token, commitment=signing.commit(sha, key, SALT))
        answer = self.write(lambda c: submissions.promise(c, caller, promised, self.now))
        if before not in LIVE:
            assert isinstance(answer, Refusal)
            return
        assert owner["token"] == token
        upload = self.write(lambda c: submissions.open_upload(c, caller, name, token, 10, self.now)).upload
        assert self.write(lambda c: submissions.advance(c, caller, upload, 0, 10, sha, self.now)) == 10
        message = SubmissionRequest(lease=name, token=token, upload=upload, adapter=sha, bytes=10, salt=SALT)
        prepared, _ = submissions.prepare(self.c, caller, message)
        ask = lambda: self.ask(key, lambda c, who: submissions.submit(c, who, message, prepared, self.now), f"submit {name}")  # noqa: E731
        replies = [ask() for _ in range(times)]
        assert len(set(replies)) == 1
        made = json.loads(replies[0].body)["submission"]
        self.sent[made] = (n, message, prepared, replies[0])
        assert self.state(number)["state"] == "submitted"

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def submit_again(self, data):
        """An old submission, sent again with its key: the first reply. With another key: the same submission, as it is now."""
        name = data.draw(st.sampled_from(sorted(self.sent)))
        n, message, prepared, reply = self.sent[name]
        fn = lambda c, who: submissions.submit(c, who, message, prepared, self.now)  # noqa: E731
        assert self.ask(self.people[n], fn, f"submit {message.lease}") == reply
        assert json.loads(self.ask(self.people[n], fn, f"again {next(_number)}").body)["submission"] == name

    # ---- verifiers

    @rule(boot=st.sampled_from([BOOT, "c0" * 8]))
    def take(self, boot):
        verifier = self.caller(self.roles["verifier"])
        queue = self.c.all(select(submission).where(submission.c.state == "queued").order_by(submission.c.order))
        answer = self.write(lambda c: jobs.take(c, verifier, TakeJob(boot_id=boot), self.now))
        if not isinstance(answer, Refusal):
            known = [one for one in self.jobs if one.job == answer.job]
            assert known or answer.submission == queue[0]["id"]
            if not known:
                self.jobs.append(answer)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), how=st.sampled_from(["accept", "reject", "fault", "beat", "trial"]))
    def work(self, data, how):
        """What a verifier says of any job it ever took; only the one that runs counts."""
        job = data.draw(st.sampled_from(self.jobs))
        verifier = self.caller(self.roles["verifier"])
        before = self.c.one(select(submission).where(submission.c.id == job.submission))
        running = before["state"] == "verifying" and before["job_token"] == job.token
        who = self.c.one(select(account).where(account.c.id == before["account"]))
        if how == "beat":
            answer = self.write(lambda c: jobs.beat(c, verifier, job.job, JobBeat(token=job.token), self.now))
        elif how == "trial":
            answer = self.write(lambda c: jobs.begin_trial(c, verifier, job.job, job.token, self.now, self.office))
            if running:
                assert answer == self.write(lambda c: jobs.begin_trial(c, verifier, job.job, job.token, self.now, self.office))
        else:
            digest = Expert.model_validate(job.expert.model_dump()).digest
            verdict = Verdict(
                expert=digest, accepted=how == "accept", checks=(Check(name="x", value=1, threshold=0, side="at least", passed=True),)
            )
            said = (
                {"fault": "killed"} if how == "fault" else {"verdict": verdict, "gain": 0.5, "code": None if how == "accept" else "no-gain"}
            )
            answer = self.write(lambda c: jobs.report(c, verifier, job.job, Report(token=job.token, **said), self.now, self.office))
            after = self.c.one(select(submission).where(submission.c.id == job.submission))
            if running and how == "accept" and after["state"] == "accepted":
                self.paid[job.submission] = 0.5
            if running and how == "fault":
                assert after["state"] == ("quarantined" if before["tries"] + 1 >= GATE.tries else "queued")
                changed = {name for name in dict(before) if dict(before)[name] != dict(after)[name]}
                assert changed == {"state", "tries"}  # no field of the member
            if not running:
                assert dict(after) == dict(before)
        assert dict(who) == dict(self.c.one(select(account).where(account.c.id == before["account"])))
        if not running and how not in ("accept", "reject"):  # a verdict that is sent again is told the state
            assert isinstance(answer, Refusal)

    @rule(data=st.data(), compensate=st.booleans())
    def retire(self, data, compensate):
        active = self.c.all(select(experts.expert).where(experts.expert.c.status != "retired"))
        if active:
            one = data.draw(st.sampled_from([(row["digest"], row["submission"]) for row in active]))
            admin = self.caller(self.roles["admin"])
            message = Retirement(reason="regression", compensate=compensate)
            self.write(lambda c: experts.retire(c, admin, one[0], message, self.now, self.office))
            if compensate:
                self.paid[one[1]] = 0.0

    # ---- what always holds

    @invariant()
    def holds(self):
        if not hasattr(self, "c"):
            return
        care.check_domains(self.c)  # one lease, submission or expert for each domain, with its token
        for number, token in self.token.items():
            assert self.state(number)["token"] == token
        rows = self.c.all(select(credit).order_by(credit.c.number))
        total = {}
        for row in rows:  # at every prefix
            total[row["submission"]] = total.get(row["submission"], 0.0) + row["amount"]
            assert total[row["submission"]] >= 0
        assert {name: amount for name, amount in total.items() if amount} == {name: amount for name, amount in self.paid.items() if amount}
        new = self.c.all(select(event).where(event.c.number > self.events).order_by(event.c.number))
        if new:
            events.check_chain(new, new[0]["previous"], self.events)
            self.events = new[-1]["number"]


def run(template, **more):
    case = type("Leases", (Machine,), {"template": template})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(case, settings=settings(deadline=None, derandomize=True, suppress_health_check=checks, **more))


def test_any_order_of_what_people_do(template):
    run(template, max_examples=25, stateful_step_count=40)  # the same ones each time


def test_without_the_fence_the_machine_finds_the_fault(template, monkeypatch):
    """The machine is worth something: where a stale token is as good as a new one, it finds what goes wrong."""
    fenced = leases.mine

    def mine(c, caller, name, token):
        try:
            return fenced(c, caller, name, token)
        except Refusal as refusal:
            if refusal.code != "stale-token":
                raise
            return c.one(select(lease).where(lease.c.id == name))

    for module in (leases, submissions):
        monkeypatch.setattr(module, "mine", mine)
    monkeypatch.setattr(leases, "_revive", update(domain).where(domain.c.number == bindparam("number_")).values(state="leased"))
    with pytest.raises(AssertionError):
        run(template, max_examples=200, stateful_step_count=40, phases=[Phase.generate], database=None)
