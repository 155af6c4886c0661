"""Members who lie, copy, climb by verdicts, come as many, or share one key: what the hub gives them, and what nobody gets to see."""

import asyncio
import json
import logging

import numpy as np
import pytest
from sqlalchemy import func, select

from elmwood.evaluate.admission import Evidence, Policy, judge_evidence
from elmwood.evaluate.sequential.decision import StoppingRule, decide, population
from elmwood.evaluate.sequential.error_budget import budget_share, commitment, derive_key, open_slice, random_order, slices_key
from elmwood.hub.actions.submissions import public_checks
from elmwood.hub.messages import Gate, Limits, Terms
from elmwood.hub.tables import credit, expert, lease
from elmwood.records import Expert
from tests.hub.server.conftest import asynchronous
from tests.hub.server.people import Person
from tests.hub.server.test_hub_races import Slow
from tests.hub.server.world import adapter, keys

ONE = pytest.mark.parametrize("make_hub", ["embedded"], indirect=True)  # nothing in it depends on the kind of database
LIMITS = Limits(accounts_per_hour=10_000, requests_per_minute=100_000)


def verifiers(hub, client, count):
    """A verifier with so many machines."""
    return [(Person(client, keys(hub)["verifier"]), f"{n:08x}") for n in range(count)]


def test_one_key_on_two_machines_has_one_lease(make_hub, started):
    """H5: however both ask, also at once; the second machine goes on with it where the first falls silent."""
    hub = make_hub(4, terms=Terms(beat_s=10, progress_s=600), limits=LIMITS)
    client = started(hub)
    member = Person(client).enter()

    async def claim():
        async with asynchronous(hub) as many:
            one = Slow(many, member)
            bodies = [{"tier": "cpu", "boot_id": boot * 8} for boot in "abababab"]
            return await asyncio.gather(*(one.ask("POST", "/v1/leases", body) for body in bodies))

    replies = asyncio.run(claim())
    member.client = client
    grants = [reply.json() for reply in replies if reply.status_code == 201]
    assert len({(grant["lease"], grant["token"]) for grant in grants}) == 1
    assert len(grants) == 4
    assert {reply.json()["code"] for reply in replies if reply.status_code != 201} == {"held-elsewhere"}
    assert hub.read(lambda c: c.value(select(func.count()).select_from(lease))) == 1
    boot = hub.read(lambda c: c.one(select(lease)))["boot_id"]
    other = "b" * 8 if boot == "a" * 8 else "a" * 8
    assert member.claim(409, boot=other).json()["kept"]
    hub.clock._uptime += 16  # a beat and a half
    taken = member.claim(boot=other).json()
    assert (taken["lease"], taken["token"], taken["resumed"]) == (grants[0]["lease"], grants[0]["token"], True)
    assert member.claim(409, boot=boot).json()["code"] == "held-elsewhere"


@ONE
def test_the_first_commitment_wins_although_the_other_uploads_first(make_hub, started):
    """H7: A and B commit to the same delta, B is accepted, then A submits. A stays, B goes, and its credit with it."""
    hub = make_hub(2)
    client = started(hub)
    a, b, verifier = Person(client).enter("a"), Person(client).enter("b"), Person(client, keys(hub)["verifier"])
    data, mine, other = adapter(1), a.claim().json(), b.claim().json()
    a.promise(mine, data)
    b.promise(other, data)
    copy = b.post("/v1/submissions", b.submission(other, data, b.upload(other, data)), status=202).json()
    assert verifier.verify().json()["state"] == "accepted"
    made = a.post("/v1/submissions", a.submission(mine, data, a.upload(mine, data)), status=202).json()
    assert made["order"] < copy["order"]
    job = verifier.take().json()
    assert job["later"] == [copy["expert"]]  # a copy of these is none
    assert verifier.judge(job, copied_by=[copy["expert"]]).json()["state"] == "accepted"
    assert hub.read(lambda c: {row["digest"]: row["status"] for row in c.all(select(expert))}) == {
        made["expert"]: "probation", copy["expert"]: "retired",
    }  # fmt: skip
    credits = {row["id"]: row["credit"] for row in client.get("/v1/members").json()}
    assert (credits[a.account], credits[b.account]) == (0.01, 0.0)
    assert client.get("/v1/domains").json()[other["domain"]]["state"] == "open"


@ONE
def test_of_two_that_were_verified_beside_each_other_the_second_is_judged_again_with_the_first(make_hub, started):
    """16: two that are harmless alone may be harmful together."""
    hub = make_hub(2, gate=Gate(at_once=2, cooldown_s=0))
    client = started(hub)
    a, b = Person(client).enter("a"), Person(client).enter("b")
    made = [one.give(one.claim().json(), adapter(n)).json() for n, one in enumerate((a, b))]
    (first, boot), (second, other) = verifiers(hub, client, 2)
    jobs = [first.take(boot=boot).json(), second.take(boot=other).json()]
    assert jobs[0]["without"] == jobs[1]["without"]  # of no experts: neither is tested with the other
    assert first.judge(jobs[0]).json()["state"] == "accepted"
    assert first.report(jobs[0]).json()["state"] == "accepted"  # sent again
    late = {"token": jobs[0]["token"], "fault": "time"}
    assert first.post(f"/v1/jobs/{jobs[0]['job']}/report", late, status=409).json()["code"] == "stale-token"
    assert second.judge(jobs[1]).json()["state"] == "queued"
    again = second.take(boot=other).json()
    assert client.get(f"/v1/records/{again['forest']}").json()["experts"] == [made[0]["expert"]]
    assert second.judge(again, accepted=False, code="harms").json()["state"] == "rejected"
    assert client.get(f"/v1/submissions/{made[1]['submission']}").json()["credit"] == 0
    snapshot = client.get("/v1/snapshot").json()["body"]
    assert [one["expert"] for one in snapshot["experts"]] == [made[0]["expert"]]
    assert client.get(f"/v1/records/{snapshot['ensemble']}").json()["bounded"] == [made[0]["expert"]]  # itself on probation


@ONE
def test_what_a_member_says_of_itself_changes_nothing(make_hub, started):
    """34: machine, time, tokens and curve decide neither the record nor the credit, and no member can speak for a verifier."""
    hub = make_hub(2)
    client = started(hub)
    liar, verifier = Person(client).enter("liar"), Person(client, keys(hub)["verifier"])
    grant, data = liar.claim(device={"device": "cuda of 999 GB", "memory": 999 << 30, "cores": 4096}).json(), adapter(1)
    liar.beat(grant, 10, loss=1e-9)
    liar.promise(grant, data)
    said = {
        "tokens": 10**15,
        "curve": [{"step": 10**9, "tokens": 10**15, "loss": 0.0}],
        "hardware": {"device": "1000 H100"},
    }
    body = liar.submission(grant, data, liar.upload(grant, data))
    assert liar.post("/v1/submissions", body | {"tokens": -1}).status_code == 422
    assert liar.post("/v1/submissions", body | {"gain": 9.0}).status_code == 422
    made = liar.post("/v1/submissions", body | said, status=202).json()
    honest = Expert(
        seed=grant["seed"], partition=grant["partition"], domain=grant["domain"], data=tuple(one["blob"] for one in grant["shards"]),
        recipe=grant["recipe"], files={"adapter_config.json": hub.read(_config), "adapter_model.safetensors": f"sha256:{body['adapter']}"},
    )  # fmt: skip
    assert made["expert"] == honest.digest
    job = verifier.take().json()
    for target, more in ((f"/v1/jobs/{job['job']}/report", {"token": job["token"], "fault": "time"}), ("/v1/jobs", {"boot_id": "b007b007"}),
                         (f"/v1/experts/{made['expert']}/retire", {"reason": "other"})):  # fmt: skip
        assert liar.post(target, more).json()["code"] == "not-allowed"
    assert verifier.judge(job).json()["state"] == "accepted"
    assert [line["amount"] for line in client.get("/v1/ledger").json()] == [0.01]


def _config(c):
    from elmwood.hub.actions.request import current

    return current(c).tiers["cpu"].config


@ONE
def test_two_hundred_new_keys_that_lease_and_vanish_hold_nothing_for_long(make_hub, started):
    """33: accounts from one address are few in an hour; what they lease is open again three beats later, at the next tick."""
    hub = make_hub(40, limits=Limits(accounts_per_hour=30, requests_per_minute=100_000, leases_per_account=2), terms=Terms(beat_s=20))
    client = started(hub)
    keys_ = [Person(client) for _ in range(200)]
    replies = [one.post("/v1/accounts", {"name": "sybil", "recovery": "0" * 64}).status_code for one in keys_]
    assert replies == [201] * 30 + [429] * 170
    manifest = client.get("/v1/run").json()["manifest"]["body"]
    for one in keys_[:30]:
        one.post("/v1/consents", {"licences": manifest["licences"], "manifest": 1}, status=200)
        one.claim()
    assert keys_[70].claim(403).json()["code"] == "unknown-key"

    def states():
        return [row["state"] for row in client.get("/v1/domains?many=100").json()]

    assert states().count("leased") == 30
    hub.clock._uptime += 61
    hub.tick()
    assert states().count("open") == 40
    assert hub.read(lambda c: c.value(select(func.count()).select_from(credit))) == 0


# ---- secrets --------------------------------------------------------------------------------------------------------


@ONE
def test_no_secret_is_in_any_answer_page_or_log(make_hub, started, caplog):
    """35: held-out text, keys, codes, exact scores of what was refused; and the sealed orders of blocks open with their verdicts."""
    caplog.set_level(logging.DEBUG)
    hub = make_hub(6, gate=Gate(at_once=3, cooldown_s=0))
    client = started(hub)
    people = [Person(client).enter(f"member {n}") for n in range(4)]
    (first, boot), (second, other) = verifiers(hub, client, 2)
    made = [one.give(one.claim().json(), adapter(n)).json() for n, one in enumerate(people)]
    assert first.verify().json()["state"] == "accepted"
    secret_value = 0.00123456789
    job = first.take(boot=boot).json()
    trial = first.post(f"/v1/jobs/{job['job']}/trial", {"token": job["token"]}).json()
    verdict = judge_evidence(
        Evidence(expert=made[1]["expert"], finite=True, cosine=0.1, novelty=0.9, own_low=secret_value, secret_gain=secret_value), Policy()
    )
    report = {
        "token": job["token"],
        "verdict": json.loads(verdict.model_dump_json()),
        "code": "no-gain",
        "evidence": {"own_low": secret_value},
    }
    first.post(f"/v1/jobs/{job['job']}/report", report, status=200)
    open_job = second.take(boot=other).json()  # is being verified
    open_trial = second.post(f"/v1/jobs/{open_job['job']}/trial", {"token": open_job["token"]}).json()
    state = client.get(f"/v1/submissions/{made[1]['submission']}").json()
    assert [check["value"] for check in state["checks"] if "own domain" in check["name"]] == [0.001]
    assert client.get(f"/v1/records/{state['verdict']}").status_code == 404
    private = keys(hub) | {f"member {n}": one.key for n, one in enumerate(people)}
    hidden = {f"key of {name}": key.private_bytes_raw().hex() for name, key in private.items()}
    hidden |= {f"code of member {n}": one.code for n, one in enumerate(people)}
    hidden |= {"held-out text": "held out", "exact score": str(secret_value)[:7], "slices": trial["slices_key"]}
    hidden |= {"an open order": open_trial["key"], "sealed secret": hub.home.secret.hex(), "salt": people[0].salt}
    found = {path: client.get(path) for path in everything(client, made, people, open_job)}
    assert len(found) > 40
    assert {"/", "/queue", "/metrics", "/openapi.json", "/v1/events?many=1000"} <= set(found)
    shown = {path: reply.text for path, reply in found.items()} | {"log": caplog.text}
    for name, value in hidden.items():
        assert [path for path, text in shown.items() if value in text] == [], name
    assert "Traceback" not in caplog.text
    with pytest.raises(AssertionError):  # the scan finds what is there
        assert [path for path, text in shown.items() if made[0]["expert"] in text] == []
    log = client.get("/v1/events?many=1000").json()
    sealed = {row["subject"]: row["facts"]["sealed"] for row in log if row["kind"] == "trial.begun"}
    opened = {row["subject"]: row["facts"]["key"] for row in log if row["kind"] == "trial.closed"}
    assert set(opened) == {one["submission"] for one in made[:2]}
    assert opened[made[1]["submission"]] == trial["key"]
    assert {name: commitment(bytes.fromhex(key)) for name, key in opened.items()} == {name: sealed[name] for name in opened}


def everything(client, made, people, job):
    """Every address that can be read without a key, with every name that a reader could know."""
    names = {"sha": ["0" * 64], "digest": [one["expert"] for one in made] + [job["without"], job["forest"]], "upload": ["0" * 32]}
    names |= {"submission": [one["submission"] for one in made], "account": [one.account for one in people]}
    manifest = client.get("/v1/run").json()["manifest"]["body"]
    names["digest"] += [manifest["seed"], manifest["partition"], job["expert"]["partition"]]
    paths = ["/", "/domains", "/members", "/queue", "/attacks", "/join", "/openapi.json", *(f"/domains/{n}" for n in range(6))]
    paths += [f"/experts/{digest}" for digest in names["digest"]] + [f"/members/{account}" for account in names["account"]]
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        if "get" in methods:
            name = path.partition("{")[2].partition("}")[0]
            paths += [path.replace(f"{{{name}}}", value) for value in names[name]] if name else [path]
    paths += ["/v1/events?many=1000", "/v1/snapshot?version=0"]
    partition = client.get(f"/v1/records/{manifest['partition']}").json()
    shards = [shard for one in partition["domains"] for kind in ("train", "holdout") for shard in one.get(kind, ())]
    paths += [f"/v1/blobs/{shard['blob'][7:]}" for shard in shards]
    return list(dict.fromkeys(paths))


# ---- climbing by verdicts -------------------------------------------------------------------------------------------

SLICES, USES, BLOCKS = 2, 20, 250  # slices of the held-out text, submissions that each serves, blocks of each
WORDS, WAYS, TOKENS, BYTES = 64, 40, 500, 2048  # in the vocabulary, that an expert can differ in, of a block


def gains(count_BV, feature_VW, way_W):
    """Bits per byte of blocks that an expert gains over a seed that knows the text's distribution: p(v) exp(w f(v)) / Z against p(v)."""
    tilt_V = feature_VW @ way_W
    return (count_BV @ tilt_V - TOKENS * np.log(np.exp(tilt_V).mean())) / (np.log(2) * BYTES)


def climb(answer, tries, chance):
    """Change an expert a little again and again, and keep what has a better answer."""
    way_W, best = np.zeros(WAYS), -np.inf
    for number in range(tries):
        tried_W = way_W + 2.5e-4 * chance.standard_normal(WAYS)
        if (said := answer(number, tried_W)) is not None and said > best:
            way_W, best = tried_W, said
    return way_W


def attack(chance, secret):
    """Whether exact scores on blocks that stay lead to an expert that is "significantly" better on them; verdicts of the hub on others."""
    feature_VW = chance.standard_normal((WORDS, WAYS))
    count_BV = chance.multinomial(TOKENS, np.full(WORDS, 1 / WORDS), BLOCKS * SLICES)
    way_W = climb(lambda _, tried_W: gains(count_BV[:BLOCKS], feature_VW, tried_W).mean(), 1500, chance)
    gain_B, accepted = gains(count_BV[:BLOCKS], feature_VW, way_W), []

    def verdict(number, tried_W):
        shown, passed = ask(gains(count_BV, feature_VW, tried_W), number, secret)
        accepted.append(passed)
        return shown

    climb(verdict, SLICES * USES, chance)
    return gain_B.mean() > 2.33 * gain_B.std() / np.sqrt(BLOCKS), accepted


def test_nobody_climbs_by_verdicts():
    """10: an expert of a seed that nobody can better. The hub's answers lead nowhere: they have one digit, their blocks are retired after
    twenty uses, and a gain has to be worth having."""
    chance = np.random.default_rng(0)
    attacks = [attack(chance, bytes([number]) * 32) for number in range(2)]
    assert [fooled for fooled, _ in attacks] == [True, True]
    assert [(len(accepted), sum(accepted)) for _, accepted in attacks] == [(SLICES * USES, 0)] * 2


def ask(gain_B, number, secret):
    """What the hub says of a candidate with these gains: the value of its first check on secret text, as everybody sees it."""
    policy, key = Policy(), derive_key(secret, str(number))
    gain_G = gain_B[open_slice(slices_key(secret), len(gain_B), SLICES, number)]
    blocks = population(np.full(len(gain_G), -np.inf), np.full(len(gain_G), np.inf), len(gain_G))
    rule = StoppingRule(alpha=policy.alpha, beta=policy.beta, better=policy.min_effect, worthless=policy.min_effect)
    alone = decide(lambda place_T: gain_G[place_T], random_order(derive_key(key, "own"), len(gain_G)), blocks, rule)
    evidence = Evidence(expert="0" * 64, finite=True, cosine=0.1, novelty=0.9, own_low=alone.low, secret_gain=alone.effect)
    level = Gate().budget * budget_share(number + 1)
    if alone.outcome == "better":
        rule = StoppingRule(alpha=level, beta=policy.beta, better=policy.ensemble_effect, worthless=policy.min_effect)
        both = decide(lambda place_T: gain_G[place_T], random_order(derive_key(key, "ensemble"), len(gain_G)), blocks, rule)
        evidence = evidence.model_copy(
            update={"level": level, "ensemble_low": both.low, "ensemble_wealth": float(both.for_T.max()), "public_gain": alone.effect,
                    "domain_low": {"own": both.low}}
        )  # fmt: skip
    verdict = judge_evidence(evidence, policy)
    (shown,) = [check.value for check in public_checks(json.loads(verdict.model_dump_json())["checks"]) if "own domain" in check.name]
    assert shown is None or shown == float(f"{shown:.0e}")
    return shown, verdict.accepted
