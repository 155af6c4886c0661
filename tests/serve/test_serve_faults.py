"""Memory that runs out in a step, and a server that was killed: the next request is answered as if nothing had been."""

import json
import signal
import threading

import httpx
import pytest
import torch

from elmwood.lm.adapters import packed
from elmwood.serve.app import create_app
from elmwood.serve.model import open_served
from tests.serve.conftest import serving

BODY = {"prompt": "the captain sailed. def path(open)", "max_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def served(world):
    return open_served(world.ensemble, world.store)


@pytest.fixture(scope="module")
def address(served):
    with serving(create_app(served)) as found:
        yield found


class Greedy:
    """Asks for more memory than there is, in the pass with this number from now on; torch's own allocator refuses."""

    def __init__(self, served, at):
        self.left = at
        self.hook = served.engine.steps.reader.model.register_forward_pre_hook(self)

    def __call__(self, module, given):
        self.left -= 1
        if not self.left:
            torch.empty(1 << 60)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("at", [1, 2, 5])
def test_memory_that_runs_out_is_503_and_the_next_request_is_answered(served, address, at, caplog):
    post = f"{address}/v1/completions"
    known = httpx.post(post, json=BODY, trust_env=False, timeout=60).json()["choices"]
    with Greedy(served, at):
        refused = httpx.post(post, json=BODY, trust_env=False, timeout=60)
    assert refused.status_code == 503
    assert "memory ran out" in refused.json()["error"]["message"]
    counts = served.engine.counts()
    assert (counts.waiting, counts.running, counts.rows, counts.mismatches) == (0, 0, 0, 0)
    with Greedy(served, at), httpx.stream("POST", post, json=BODY | {"stream": True}, trust_env=False, timeout=60) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert "memory ran out" in json.loads(lines[-1])["error"]["message"], "no [DONE] after an error"
    again = httpx.post(post, json=BODY, trust_env=False, timeout=60)
    assert again.json()["choices"] == known
    metrics = httpx.get(f"{address}/metrics", trust_env=False).text
    assert "elmwood_generation_mismatches_total{" in metrics


def test_who_was_not_in_the_pass_is_answered(served, address, world, caplog):
    """A request whose expert comes from a slow disk, while another's pass runs out of memory."""
    first, second = ({**BODY, "model": digest, "max_tokens": 8} for digest in sorted(served.cards)[:2])
    known = [httpx.post(f"{address}/v1/completions", json=body, trust_env=False, timeout=60).json()["choices"] for body in (first, second)]
    cold = open_served(world.ensemble, world.store, like=served)
    reached, go, load = threading.Event(), threading.Event(), cold.engine.packed.load
    found = []

    def slow(*given):
        reached.set()
        assert go.wait(60)
        load(*given)

    with serving(create_app(cold)) as there:
        post = f"{there}/v1/completions"
        assert httpx.post(post, json=first, trust_env=False, timeout=60).json()["choices"] == known[0]
        cold.engine.packed.load = slow
        waits = threading.Thread(target=lambda: found.append(httpx.post(post, json=second, trust_env=False, timeout=60)))
        waits.start()
        assert reached.wait(60)
        try:
            with Greedy(cold, 1):
                assert httpx.post(post, json=first, trust_env=False, timeout=60).status_code == 503
        finally:
            go.set()
            waits.join(60)
        assert found[0].json()["choices"] == known[1]


KILLED = """
import os, signal, sys
from elmwood.serve.live import try_out
from elmwood.serve.model import open_served
from elmwood.store import Store
try_out(open_served(sys.argv[1], Store(sys.argv[2]), device="cpu").engine)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_that_was_killed_starts_with_the_adapters_it_had_packed(world, forked, tmp_path, monkeypatch):
    """No adapter is read from its own file again, and a packed one that was cut short is made again."""
    for old in (world.store.root / "work" / "packed").rglob("*"):
        if old.is_file():
            old.unlink()
    assert forked(KILLED, world.experts[0].digest, str(world.store.root), cwd=tmp_path).returncode == -signal.SIGKILL
    (made,) = (path for path in (world.store.root / "work" / "packed").rglob("*") if path.is_file())
    whole = made.read_bytes()

    def first_token():
        served = open_served(world.experts[0], world.store)
        with serving(create_app(served)) as address:
            reply = httpx.post(f"{address}/v1/completions", json={"prompt": "the", "max_tokens": 3, "temperature": 0}, trust_env=False)
        return reply.status_code, reply.json()

    with monkeypatch.context() as patch:
        patch.setattr(packed, "read_record", lambda *given: pytest.fail("it was read from its own file"))
        status, warm = first_token()
        assert status == 200
    made.write_bytes(whole[:-3])
    status, again = first_token()
    assert (status, again["choices"]) == (200, warm["choices"])
    assert made.read_bytes() == whole
