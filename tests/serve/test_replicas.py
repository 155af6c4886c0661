"""Servers of one model behind the gateway, in processes here and on Ray: one that is killed is started again."""

import os
import signal
from functools import partial

import httpx
import pytest

from elmwood.serve.app import create_app
from elmwood.serve.gateway.opening import add_answers, open_newer, open_replicas
from elmwood.serve.gateway.replicas import Plan
from elmwood.serve.live import Source
from tests.serve.conftest import serving

GREEDY = {"prompt": "the captain sailed over the sea", "max_tokens": 4, "temperature": 0}


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_replica_that_is_killed_comes_back_with_the_newest_model(world, http, engine, monkeypatch, request):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    if engine == "ray":
        request.addfinalizer(pytest.importorskip("ray").shutdown)
    world.store.name("forests/moving", world.ensemble.digest)
    plan = Plan.of("forests/moving", world.store, watch=True)
    opened = open_replicas(plan, 1, engine)
    source = Source(plan.resolve, partial(open_newer, plan), 3600.0, world.ensemble.digest)
    app = create_app(opened, answers=add_answers, source=source)
    with (
        serving(app) as address,
        httpx.Client(base_url=address, trust_env=False, timeout=120) as client,
    ):
        for body in (GREEDY, GREEDY | {"prompt": ["the sea", "le jardin"], "elmwood": {"provenance": True}}):
            ours, theirs = (one.post("/v1/completions", json=body) for one in (client, http))
            assert ours.json()["choices"] == theirs.json()["choices"]
        (replica,) = opened.engine.upstreams
        before = replica.url
        assert httpx.post(f"{before}/v1/completions", json=GREEDY, trust_env=False).status_code == 401, "only the gateway has its key"
        wider = world.ensemble.model_copy(update={"temperature": 2.0})
        world.store.name("forests/moving", world.store.add(wider))
        assert app.state.follower.look()
        newer = client.post("/v1/completions", json=GREEDY | {"model": "forests/moving"}).json()
        assert newer["system_fingerprint"] == f"elm_{wider.digest[:16]}" == app.state.live.now.fingerprint
        kill(opened.engine.replicas, 0)
        while (answer := client.post("/v1/completions", json=GREEDY)).status_code != 200:
            assert answer.json()["error"]["code"] in ("upstream_broke", "upstream_down")
        assert (answer.json()["choices"], answer.json()["system_fingerprint"]) == (newer["choices"], newer["system_fingerprint"])
        assert replica.url != before


def kill(replicas, number):
    if hasattr(replicas, "actors"):
        replicas.ray.kill(replicas.actors[number], no_restart=False)
    else:
        os.kill(replicas._running[number][0].pid, signal.SIGKILL)
