"""Servers of one model behind the gateway, in processes here and on Ray: one that is killed is started again."""

import os
import signal

import httpx
import pytest

from elmwood.serve.app import create_app
from elmwood.serve.gateway.opening import add_answers, open_replicas
from tests.serve.conftest import serving

GREEDY = {"prompt": "the captain sailed over the sea", "max_tokens": 4, "temperature": 0}


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_replica_that_is_killed_comes_back(world, http, engine, monkeypatch, request):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    if engine == "ray":
        request.addfinalizer(pytest.importorskip("ray").shutdown)
    opened = open_replicas("forests/small", world.store, 1, engine)
    with (
        serving(create_app(opened, answers=add_answers)) as address,
        httpx.Client(base_url=address, trust_env=False, timeout=120) as client,
    ):
        for body in (GREEDY, GREEDY | {"prompt": ["the sea", "le jardin"], "elmwood": {"provenance": True}}):
            ours, theirs = (one.post("/v1/completions", json=body) for one in (client, http))
            assert ours.json()["choices"] == theirs.json()["choices"]
        (replica,) = opened.engine.upstreams
        before = replica.url
        assert httpx.post(f"{before}/v1/completions", json=GREEDY, trust_env=False).status_code == 401, "only the gateway has its key"
        kill(opened.engine.replicas, 0)
        while (answer := client.post("/v1/completions", json=GREEDY)).status_code != 200:
            assert answer.json()["error"]["code"] in ("upstream_broke", "upstream_down")
        assert answer.json()["choices"] == http.post("/v1/completions", json=GREEDY).json()["choices"]
        assert replica.url != before


def kill(replicas, number):
    if hasattr(replicas, "actors"):
        replicas.ray.kill(replicas.actors[number], no_restart=False)
    else:
        os.kill(replicas._running[number][0].pid, signal.SIGKILL)
