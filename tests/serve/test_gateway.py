"""The gateway in front of engines that hold experts by name."""

import concurrent.futures
import json
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import httpx
import pytest
from openai import OpenAI

from elmwood.serve.app import create_app
from elmwood.serve.gateway import fleet
from elmwood.serve.gateway.opening import Behind, add_answers, open_gateway
from elmwood.serve.live import Source
from elmwood.study.exporting import export
from tests.serve.conftest import serving
from tests.serve.engine_contract import BASE, ContractEngine

PROMPT = "the captain sailed over the sea"
WORDS = ("the captain sailed toward the harbour", "def read path return open path", "le jardin de la maison")
GREEDY = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    return export(world.seed, tmp_path_factory.mktemp("exported") / "seed", store=world.store)


@pytest.fixture(scope="module")
def vllm(folder):
    return ContractEngine(folder)


@pytest.fixture(scope="module")
def vllm_address(vllm):
    with serving(vllm.app) as found:
        yield found


@contextmanager
def gateway(world, tmp_path, *urls, keys=(), **settings):
    """A client of a gateway before these engines."""
    opened = open_gateway("forests/small", world.store, Behind(urls, tmp_path / "adapters", **settings))
    with (
        serving(create_app(opened, keys=keys, answers=add_answers)) as address,
        httpx.Client(base_url=address, trust_env=False, timeout=60) as client,
    ):
        client.served = opened
        yield client


@pytest.fixture(scope="module")
def client(world, vllm_address, tmp_path_factory):
    with gateway(world, tmp_path_factory.mktemp("gateway"), vllm_address) as found:
        yield found


def text(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_each_expert_says_what_elmwood_says(client, http, world):
    """The engine reads the folders that the gateway wrote, and the prompt as experts were trained to see it."""
    found = []
    for model in ("seed", *(expert.digest for expert in world.experts)):
        answer = client.post("/v1/completions", json=GREEDY | {"model": model})
        assert answer.headers["x-elmwood-expert"] == model
        assert answer.json()["model"] == (BASE if model == "seed" else model)
        found.append(text(answer))
        assert found[-1] == text(http.post("/v1/completions", json=GREEDY | {"model": model}))
    assert len(set(found)) == 4


def test_text_goes_to_the_nearest_expert(client, world):
    for words in WORDS:
        near = min(client.post("/v1/route", json={"prompt": words}).json()["candidates"], key=lambda one: one["distance2"])
        for path, body in (("completions", {"prompt": words}), ("chat/completions", {"messages": [{"role": "user", "content": words}]})):
            answer = client.post(f"/v1/{path}", json=body | {"max_tokens": 2, "temperature": 0})
            assert answer.headers["x-elmwood-expert"] == near["id"]
    others = [expert.digest for expert in world.experts if expert.digest != near["id"]]
    answer = client.post("/v1/completions", json=GREEDY | {"prompt": words, "elmwood": {"only": others}})
    assert answer.headers["x-elmwood-expert"] in others
    answer = client.post("/v1/completions", json=GREEDY | {"prompt": words, "elmwood": {"without": [*others, near["id"]]}})
    assert answer.headers["x-elmwood-expert"] == "seed"


def test_the_seed_answers_what_is_far_from_all(client):
    assert client.post("/v1/completions", json=GREEDY | {"prompt": "123 456"}).headers["x-elmwood-expert"] == "seed"


def test_a_stream_is_passed_on_byte_by_byte(client, vllm_address, world):
    digest = world.experts[0].digest
    tokens = client.served.encode(PROMPT)
    asked = GREEDY | {"model": digest, "stream": True}
    with client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        ours = b"".join(answer.iter_raw())
    assert ours == httpx.post(f"{vllm_address}/v1/completions", json=asked | {"prompt": tokens}, trust_env=False).content
    with client.stream("POST", "/v1/completions", json=asked | {"elmwood": {"provenance": True}}) as answer:
        events = b"".join(answer.iter_raw()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    last = json.loads(events[-3].removeprefix("data: "))
    assert last["choices"] == []
    assert last["elmwood"]["experts"] == [{"id": digest, "name": client.served.expert_name(digest), "weight": 1.0}]
    assert last["elmwood"]["fingerprint"] == client.served.fingerprint


def test_stock_clients(client):
    with OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as stock:
        parts = stock.completions.create(model="auto", prompt=PROMPT, max_tokens=4, temperature=0, stream=True)
        whole = stock.completions.create(model="auto", prompt=PROMPT, max_tokens=4, temperature=0)
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        chat = stock.chat.completions.create(model="auto", messages=[{"role": "user", "content": PROMPT}], max_tokens=2, temperature=0)
        assert chat.choices[0].message.content
        assert "auto" in [model.id for model in stock.models.list()]


def test_provenance_of_a_whole_answer(client, world):
    answer = client.post("/v1/completions", json=GREEDY | {"elmwood": {"provenance": True}}).json()
    (choice,) = answer["choices"]
    assert choice["elmwood"]["experts"][0]["weight"] == 1.0
    assert len(choice["elmwood"]["candidates"]) == 4
    assert answer["elmwood"]["seed"] == world.seed.digest


def test_prompts_of_different_experts_come_back_as_one_answer(client):
    prompts = [WORDS[0], WORDS[1], "the captain and crew"]
    alone = [client.post("/v1/completions", json=GREEDY | {"prompt": prompt}) for prompt in prompts]
    assert len({answer.headers["x-elmwood-expert"] for answer in alone}) == 2
    answer = client.post("/v1/completions", json=GREEDY | {"prompt": prompts, "elmwood": {"provenance": True}}).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(map(text, alone)))
    for one, choice in zip(alone, answer["choices"], strict=True):
        assert choice["elmwood"]["experts"][0]["id"] == one.headers["x-elmwood-expert"]
    assert answer["usage"]["total_tokens"] == sum(one.json()["usage"]["total_tokens"] for one in alone)
    refused = client.post("/v1/completions", json=GREEDY | {"prompt": prompts, "stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


def test_an_engine_holds_few_adapters_and_loads_each_once(world, vllm, vllm_address, tmp_path):
    digests = [expert.digest for expert in world.experts]
    vllm.restart()
    vllm.log.clear()
    vllm.most = 0
    with gateway(world, tmp_path, vllm_address, most=2) as client, concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda n: client.post("/v1/completions", json=GREEDY | {"model": digests[n % 3]}), range(24)))
        by_model = {}
        for n, answer in enumerate(answers):
            by_model.setdefault(n % 3, set()).add(text(answer))
        assert all(len(texts) == 1 for texts in by_model.values())
        assert vllm.most == 2, "never more than it may hold"
        while (counts := client.served.engine.counts()).running:  # an answer is there before its request has ended
            client.get("/healthz")
        assert (counts.resident, counts.loading, counts.running, counts.waiting) == (2, 0, 0, 0)
        loads = [name for what, name in vllm.log if what == "load"]
        assert counts.loads == len(loads)
        vllm.log.clear()
        held = next(iter(vllm.loras))
        list(pool.map(lambda n: client.post("/v1/completions", json=GREEDY | {"model": held}), range(6)))
        assert [what for what, _ in vllm.log] == ["asked"] * 6, "it was there"


def test_an_engine_that_restarted_is_given_its_adapters_again(client, world, vllm):
    digest = world.experts[1].digest
    before = text(client.post("/v1/completions", json=GREEDY | {"model": digest}))
    vllm.restart()
    vllm.log.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: text(client.post("/v1/completions", json=GREEDY | {"model": digest})), range(4)))
    assert set(answers) == {before}
    assert vllm.log.count(("load", digest)) == 1


def test_an_expert_in_use_is_never_taken_out_and_a_client_that_leaves_lets_go(world, vllm, vllm_address, tmp_path):
    first, second, _ = (expert.digest for expert in world.experts)
    vllm.restart()
    vllm.cut.clear()
    vllm.held.clear()
    try:
        with gateway(world, tmp_path, vllm_address, most=1) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
            with client.stream("POST", "/v1/completions", json=GREEDY | {"model": first, "stream": True}) as answer:
                chunks = answer.iter_raw()
                next(chunks)
                other = pool.submit(client.post, "/v1/completions", json=GREEDY | {"model": second})
                while not client.served.engine.counts().waiting:
                    client.get("/healthz")
                assert list(vllm.loras) == [first]
            assert text(other.result(60))  # the client of the first left, so its expert did
            assert vllm.cut.wait(60), "the engine was told"
            assert list(vllm.loras) == [second]
    finally:
        vllm.held.set()


def test_a_newer_snapshot_is_routed_and_what_was_retired_leaves_the_engines(world, vllm, vllm_address, tmp_path, monkeypatch):
    monkeypatch.setattr(fleet, "WATCH", 0.02)
    vllm.restart()
    store, (kept, gone, _) = world.store, world.experts
    forest = store.load(world.ensemble.forest).model_copy(update={"experts": (kept.digest,)})
    smaller = world.ensemble.model_copy(update={"forest": store.add(forest)})
    store.name("forests/moving", world.ensemble.digest)
    opening = partial(open_gateway, store=store, behind=Behind([vllm_address], tmp_path / "adapters"), name="moving")
    source = Source(partial(store.resolve, "forests/moving"), opening, 3600.0, world.ensemble.digest)
    app = create_app(opening(world.ensemble.digest), answers=add_answers, source=source)
    with serving(app) as address, httpx.Client(base_url=address, trust_env=False, timeout=60) as client:

        def ask(model):
            return client.post("/v1/completions", json=GREEDY | {"model": model})

        before = text(ask(kept.digest)), text(ask(gone.digest))
        vllm.held.clear()
        with client.stream("POST", "/v1/completions", json=GREEDY | {"model": gone.digest, "stream": True}) as answer:
            store.name("forests/moving", store.add(smaller))
            assert app.state.follower.look()
            assert ask(gone.digest).json()["error"]["code"] == "model_not_found"
            assert client.get("/v1/experts").json()["total"] == 1
            assert set(vllm.loras) == {kept.digest, gone.digest}, "one is in use"
            vllm.held.set()
            said = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        assert "".join(part["choices"][0]["text"] for part in said) == before[1], "every token of it"
        while set(vllm.loras) != {kept.digest}:
            client.get("/healthz")
        assert text(ask(kept.digest)) == before[0]
        store.name("forests/moving", world.seed.digest)
        assert app.state.follower.look(), "what a hub without experts serves"
        answer = client.post("/v1/completions", json=GREEDY | {"elmwood": {"provenance": True}})
        assert answer.json()["choices"][0]["elmwood"]["experts"] == [{"id": "seed", "name": "seed", "weight": 1.0}]
        store.name("forests/moving", world.plain.digest)
        assert not app.state.follower.look(), "the engine runs another seed"
        assert "another seed" in app.state.live.adopted.trouble


def test_sglang_has_names_of_its_own(world, folder, http, tmp_path):
    engine = ContractEngine(folder, "sglang")
    digest = world.experts[2].digest
    with serving(engine.app) as address, gateway(world, tmp_path, address, most=1) as client:
        for _ in range(2):
            answer = client.post("/v1/completions", json=GREEDY | {"model": digest})
            assert text(answer) == text(http.post("/v1/completions", json=GREEDY | {"model": digest}))
            assert answer.json()["model"] == f"{BASE}:{digest}"
            engine.restart()
        client.post("/v1/completions", json=GREEDY | {"model": world.experts[0].digest})
        assert [what for what, _ in engine.log] == ["load", "asked", "asked", "load", "asked", "unload", "load", "asked"]


def test_elmwood_servers_are_engines_too(world, address, http, tmp_path):
    with gateway(world, tmp_path, address) as client:
        for body in (GREEDY, GREEDY | {"model": world.experts[0].digest}, GREEDY | {"elmwood": {"provenance": True, "tokens": True}}):
            ours, theirs = client.post("/v1/completions", json=body).json(), http.post("/v1/completions", json=body).json()
            assert ours["choices"] == theirs["choices"]


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_engines_that_are_down(world, vllm_address, tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}"
    with gateway(world, tmp_path, nobody) as client:
        answer = client.post("/v1/completions", json=GREEDY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_down")
        assert nobody in answer.json()["error"]["message"]
        assert answer.headers["retry-after"]
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        assert 'elmwood_upstream_up{upstream="0"} 0.0' in client.get("/metrics").text
    with gateway(world, tmp_path, nobody, vllm_address) as client:
        for _ in range(2):
            assert client.post("/v1/completions", json=GREEDY).headers["x-elmwood-upstream"] == "1"
        assert client.get("/readyz").status_code == 200
        assert 'elmwood_upstream_up{upstream="1"} 1.0' in client.get("/metrics").text


def test_an_engine_of_another_seed_is_refused(world, tmp_path):
    folder = export(world.plain, tmp_path / "plain", store=world.store)
    with serving(ContractEngine(folder).app) as address, gateway(world, tmp_path, address) as client:
        answer = client.post("/v1/completions", json=GREEDY)
        assert answer.status_code == 503
        assert "not the seed" in answer.json()["error"]["message"]


def test_keys_go_no_further(world, folder, tmp_path):
    engine = ContractEngine(folder, key="of the engine")
    keys = ["of the gateway's clients"]
    bearer = {"Authorization": f"Bearer {keys[0]}"}
    with ExitStack() as stack:
        address = stack.enter_context(serving(engine.app))
        client = stack.enter_context(gateway(world, tmp_path, address, keys=keys, key="of the engine"))
        assert client.post("/v1/completions", json=GREEDY).status_code == 401
        assert text(client.post("/v1/completions", json=GREEDY, headers=bearer))
        unkeyed = stack.enter_context(gateway(world, tmp_path, address))
        answer = unkeyed.post("/v1/completions", json=GREEDY, headers={"Authorization": "Bearer of the engine"})
        assert answer.status_code == 503


def test_what_is_refused(client, world, vllm_address, tmp_path):
    for body, status, param in (
        (GREEDY | {"model": "nobody"}, 404, "model"), (GREEDY | {"lora_path": "x"}, 400, "lora_path"),
        (GREEDY | {"elmwood": {"onyl": []}}, 400, "elmwood"),
        ({"max_tokens": 3}, 400, "prompt"), (GREEDY | {"prompt": [-1]}, 400, "prompt"), (GREEDY | {"prompt": "x" * 200_000}, 400, "prompt"),
        (GREEDY | {"elmwood": {"only": ["nobody"]}}, 400, "elmwood"), (GREEDY | {"model": 3}, 400, "model"),
    ):  # fmt: skip
        answer = client.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert client.post("/v1/chat/completions", json={"messages": "hello"}).json()["error"]["param"] == "messages"
    assert client.post("/v1/completions", content=b"x" * (5 << 20), headers={"content-type": "application/json"}).status_code == 413
    answer = client.post("/v1/completions", json=GREEDY | {"temperature": 1})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadRequestError"), "the engine's own words"


def test_an_engine_that_does_not_see_the_adapters(world, vllm, vllm_address, tmp_path):
    vllm.restart()
    with gateway(world, tmp_path, vllm_address, prefix="/nowhere") as blind:
        answer = blind.post("/v1/completions", json=GREEDY | {"model": world.experts[0].digest})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_refused_adapter")
        assert "/nowhere" in answer.json()["error"]["message"]
        assert text(blind.post("/v1/completions", json=GREEDY | {"model": "seed"}))


def test_no_torch(world, tmp_path):
    script = (
        "import sys; from pathlib import Path; from elmwood.serve.app import create_app; from elmwood.store import Store\n"
        "from elmwood.serve.gateway.opening import *; from elmwood.serve.gateway.pick import pick\n"
        "served = open_gateway('forests/small', Store(sys.argv[1]), Behind(['http://127.0.0.1:9'], Path(sys.argv[2])))\n"
        "create_app(served, answers=add_answers); print(pick(served.guide, served.encode('captain sea')).choice)\n"
        "print(served.engine.upstreams[0].folder_of(served.sorted[0]))\n"
        "assert not {'torch', 'transformers', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, world.store.root, tmp_path], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert (tmp_path / done.stdout.split("/")[-1].strip() / "adapter_config.json").is_file()
