"""schemathesis makes requests from the OpenAPI document: nothing that is sent, signed by a member or an admin, makes a 5xx."""

import json
from urllib.parse import urlencode

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from elmwood.hub.app import create_app
from elmwood.hub.messages import Limits
from tests.hub.server.people import Person
from tests.hub.server.world import adapter, keys


def test_no_request_makes_the_hub_fail(make_hub, started):
    import schemathesis  # takes seconds, in the one process that needs it

    hub = make_hub(3, limits=Limits(requests_per_minute=10**6, accounts_per_hour=10**6))
    client = started(hub)
    schema = schemathesis.openapi.from_dict(create_app(hub).openapi())
    member, admin = Person(client).enter(), Person(client, keys(hub)["admin"])
    grant = member.claim().json()
    made = member.give(grant, adapter(1)).json()
    known = {
        "lease": grant["lease"],
        "submission": made["submission"],
        "account": member.account,
        "key": member.public,
        "digest": made["expert"],
    }
    seen, statuses = set(), set()

    def send(operation, case, person, real):
        path = operation.path
        for name, value in (case.path_parameters or {}).items():
            path = path.replace(f"{{{name}}}", str(known.get(name, value) if real else value).replace("/", "%2F"))
        query = urlencode(dict(case.query or {}), doseq=True)
        body = case.body if isinstance(case.body, dict | list | str | int | float | bool) else None
        headers = {
            str(name): str(value) for name, value in (case.headers or {}).items() if str(value).isascii() and str(value).isprintable()
        }
        data = json.dumps(body).encode() if body is not None else b""
        target = f"{path}?{query}" if query else path
        if not target.isascii() or any(ord(one) < 33 for one in target):
            return
        reply = person.ask(operation.method.upper(), target, data, headers={"Content-Type": "application/json"} | headers)
        assert reply.status_code < 500, (operation.label, target, body, reply.text)
        seen.add(operation.label)
        statuses.add(reply.status_code)

    def check(operation):
        @settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate])
        @given(operation.as_strategy(), st.sampled_from([member, admin]), st.booleans())
        def one(case, person, real):
            send(operation, case, person, real)

        one()

    for found in schema.get_all_operations():
        check(found.ok())
    assert len(seen) > 25
    assert {200, 422, 404} <= statuses
