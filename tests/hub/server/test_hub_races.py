"""Many at once, on both databases: one grant, one row, one credit; and a history that an offline check reads."""

import asyncio
import random

import pytest
from sqlalchemy import func, select

from benches.hub import history
from elmwood.hub.messages import Gate, Limits
from elmwood.hub.tables import credit, lease, submission
from tests.hub.server.conftest import asynchronous
from tests.hub.server.people import Person
from tests.hub.server.world import adapter, keys

LIMITS = Limits(accounts_per_hour=10_000, requests_per_minute=100_000)


class Slow:
    """A person whose client is asynchronous: every method of `Person` that asks once can be awaited."""

    def __init__(self, client, person: Person):
        self.client, self.person = client, person

    async def ask(self, method: str, target: str, body=None, **more):
        sent = {}

        class Keep:
            @staticmethod
            def request(method, target, **rest):
                sent.update(method=method, url=target, **rest)

        self.person.client = Keep
        self.person.ask(method, target, body, **more)
        return await self.client.request(**sent)


def people(client, count: int) -> list[Person]:
    return [Person(client).enter(f"member {n}") for n in range(count)]


def test_64_clients_claim_one_domain_and_one_gets_it(make_hub, started):
    hub = make_hub(1, limits=LIMITS)
    members = people(started(hub), 64)

    async def claim():
        async with asynchronous(hub) as client:
            body = {"tier": "cpu", "boot_id": "b007b007"}
            return await asyncio.gather(*(Slow(client, one).ask("POST", "/v1/leases", body, name="claim") for one in members))

    replies = asyncio.run(claim())
    assert sorted(reply.status_code for reply in replies) == [201] + [204] * 63
    assert {reply.headers["Elmwood-Reason"] for reply in replies if reply.status_code == 204} == {"no-open-domain"}
    assert all(float(reply.headers["Retry-After"]) > 0 for reply in replies if reply.status_code == 204)
    assert hub.read(lambda c: c.value(select(func.count()).select_from(lease))) == 1
    hub.read(history.check_events)


@pytest.mark.parametrize("same_name", [True, False])
def test_the_same_submission_ten_times_at_once_is_one(make_hub, started, same_name):
    hub = make_hub(1, limits=LIMITS)
    client = started(hub)
    (member,) = people(client, 1)
    grant, data = member.claim().json(), adapter(1)
    member.promise(grant, data)
    body = member.submission(grant, data, member.upload(grant, data))

    async def submit():
        async with asynchronous(hub) as many:
            one = Slow(many, member)
            return await asyncio.gather(
                *(one.ask("POST", "/v1/submissions", body, name="submit" if same_name else f"{n}") for n in range(10))
            )

    replies = asyncio.run(submit())
    assert {(reply.status_code, reply.text) for reply in replies} == {(202, replies[0].text)}
    member.client = client
    verifier = Person(client, keys(hub)["verifier"])
    assert verifier.verify().json()["state"] == "accepted"
    assert hub.read(lambda c: c.value(select(func.count()).select_from(submission))) == 1
    assert hub.read(lambda c: c.value(select(func.count()).select_from(credit))) == 1


def test_a_history_of_many_members_agrees_with_the_final_state(make_hub, started, tmp_path):
    """Eight members and a verifier do what they like, all at once; every acknowledged write is there at the end."""
    hub = make_hub(8, limits=LIMITS, gate=Gate(cooldown_s=0, at_once=4))
    client = started(hub)
    members, verifier = people(client, 8), Person(client, keys(hub)["verifier"])
    kept = history.History(tmp_path / "history.jsonl")

    async def live(one: Person, many, chance: random.Random):
        me = Slow(many, one)
        for turn in range(5):
            reply = await me.ask("POST", "/v1/leases", {"tier": "cpu", "boot_id": "b007b007"}, name=f"claim {turn}")
            if reply.status_code != 201:
                continue
            grant = reply.json()
            about = {"lease": grant["lease"], "token": grant["token"]}
            kept.add("grant", domain=grant["domain"], key=one.public, **about)
            for step in range(1, chance.randrange(1, 4)):
                if (await me.ask("POST", f"/v1/leases/{grant['lease']}/beat", {"token": grant["token"], "step": step})).status_code == 200:
                    kept.add("beat", step=step, **about)
            if chance.random() < 0.4:
                if (await me.ask("POST", f"/v1/leases/{grant['lease']}/release", {"token": grant["token"]})).status_code == 200:
                    kept.add("release", **about)
                continue
            await asyncio.to_thread(give, one, grant, chance.randrange(1 << 30))

    def give(one: Person, grant, number: int):
        me = Person(client, one.key)
        data = adapter(number)
        made = me.give(grant, data).json()
        kept.add("submission", lease=grant["lease"], submission=made["submission"], adapter=me.submission(grant, data, "")["adapter"],
                 expert=made["expert"])  # fmt: skip

    def judge():
        for _ in range(60):
            job = verifier.post("/v1/jobs", {"boot_id": "b007b007"})
            if job.status_code == 201:
                made = verifier.judge(job.json(), accepted=random.Random(job.text).random() < 0.5)
                if made.status_code == 200:
                    kept.add("report", submission=job.json()["submission"], state=made.json()["state"])

    async def all_of_them():
        async with asynchronous(hub) as many:
            lives = (live(one, many, random.Random(n)) for n, one in enumerate(members))
            await asyncio.gather(*lives, asyncio.to_thread(judge))

    asyncio.run(all_of_them())
    kept.close()
    counts = hub.read(lambda c: history.check(c, history.read(tmp_path / "history.jsonl")))
    assert counts["acknowledged"] > 8
    assert counts["acceptances"] > 0
