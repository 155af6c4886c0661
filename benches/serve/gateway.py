"""The gateway before an engine that runs already: whether each expert says there what it says here, and what the gateway costs.

    python -m benches.serve.gateway ENSEMBLE [--upstream URL] [--store FOLDER] [--adapters FOLDER] [--max-adapters 2] [--requests 200]

Without --upstream the engine is one that answers at once with nothing, and `equal` is left out. The engine serves the seed's exported
folder in float32, with its adapters loaded by name (docs/gateway.md). One JSON line per measurement: `equal`, of the tokens of the seed
and of each expert; `overhead`, of the same request sent to the engine and through the gateway, in turn; `busy`, of 16 clients at once.
`cpu_ms` is of the gateway's process, for each request.
"""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import httpx2 as httpx
import numpy as np
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.responses import JSONResponse
from starlette.routing import Route

from benches import common
from elmwood.ensemble.batch.interface import Ended, Request, Said
from elmwood.serve.gateway.pick import pick
from elmwood.serve.model import Served, open_served
from elmwood.store import Store

PROMPTS = (
    "the captain sailed over the sea toward the harbour",
    "def read(path): return open(path).read() if path else None",
    "le chat mange une pomme dans le jardin de la maison",
)


def tokens_here(served: Served, name: str, prompt: str, tokens: int) -> list[int]:
    """The greedy continuation by one candidate, in elmwood's own engine."""
    made: list[int] = []
    ended = threading.Event()

    def hear(event: object) -> None:
        if isinstance(event, Said) and not event.stop:
            made.append(event.token)
        elif isinstance(event, Ended):
            ended.set()

    served.engine.submit(Request(tuple(served.encode(prompt)), tokens, 0.0, only=(name,)), hear)
    ended.wait()
    return made


def start_nothing() -> str:
    """An engine that answers at once, in a thread: what is left is the gateway's own time."""

    async def models(request: StarletteRequest) -> JSONResponse:
        return JSONResponse({"data": [{"id": "seed-there", "owned_by": "vllm", "root": "nowhere", "parent": None}]})

    async def say(request: StarletteRequest) -> JSONResponse:
        asked = await request.json()
        return JSONResponse({"model": asked.get("model"), "choices": [{"index": 0, "text": "", "finish_reason": "length"}]})

    paths = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions")
    app = Starlette(routes=[Route("/v1/models", models), *(Route(path, say, methods=["POST"]) for path in paths)])
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": round(1000 * float(np.quantile(seconds, share / 100)), 3) for share in (50, 90, 99)}


def equal(client: httpx.Client, served: Served, tokens: int) -> None:
    """The tokens of the seed and of each expert, here and there; the text, where the engine tells no tokens."""
    same, cases = 0, [(name, prompt) for name in ("seed", *served.sorted) for prompt in PROMPTS]
    began = perf_counter()
    for name, prompt in cases:
        body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
        answer = client.post("/v1/completions", json=body)
        answer.raise_for_status()
        assert answer.headers["x-elmwood-expert"] == name
        (choice,), here = answer.json()["choices"], tokens_here(served, name, prompt, tokens)
        if choice.get("token_ids"):
            there = [token for token in choice["token_ids"] if token not in served.engine.stops]
            same += there == here
        else:  # engines end in the middle of a character in different ways
            same += choice["text"].rstrip("\ufffd") == served.tokenizer.decode(here, skip_special_tokens=True).rstrip("\ufffd")
    common.say("gateway", part="equal", texts=len(cases), same=same, tokens=tokens, seconds=round(perf_counter() - began, 2))


def overhead(client: httpx.Client, engine: httpx.Client, served: Served, process: psutil.Process, requests: int) -> None:
    """One client: the same request to the engine and through the gateway, in turn."""
    assert served.guide
    direct: list[float] = []
    through: list[float] = []
    routed: list[float] = []
    used = 0.0
    for n in range(requests + 10):
        tokens = served.encode(PROMPTS[n % len(PROMPTS)])
        began = perf_counter()
        where = pick(served.guide, tokens)
        routed.append(perf_counter() - began)
        body = {"prompt": PROMPTS[n % len(PROMPTS)], "max_tokens": 1, "temperature": 0}
        before, began = sum(process.cpu_times()[:2]), perf_counter()
        answer = client.post("/v1/completions", json=body)
        through.append(perf_counter() - began)
        used += sum(process.cpu_times()[:2]) - before if n >= 10 else 0.0
        answer.raise_for_status()
        asked = body | {"prompt": tokens, "model": answer.json()["model"]}
        began = perf_counter()
        engine.post("/v1/completions", json=asked).raise_for_status()
        direct.append(perf_counter() - began)
        assert answer.headers["x-elmwood-expert"] == where.choice
    added = [one - other for one, other in zip(through, direct, strict=True)]
    common.say(
        "gateway", part="overhead", requests=requests, direct_ms=quantiles(direct[10:]), through_ms=quantiles(through[10:]),
        added_ms=quantiles(added[10:]), routing_ms=quantiles(routed[10:]), cpu_ms=round(1000 * used / requests, 3),
    )  # fmt: skip


def busy(client: httpx.Client, engine: httpx.Client, served: Served, process: psutil.Process, requests: int, clients: int = 16) -> None:
    """Many clients at once, first at the engine, then through the gateway."""
    assert served.guide
    tokens = [served.encode(prompt) for prompt in PROMPTS]
    names = [
        client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1, "temperature": 0}).json()["model"] for prompt in PROMPTS
    ]

    def run(ask: object) -> tuple[float, list[float]]:
        def timed(n: int) -> float:
            began = perf_counter()
            ask(n % len(PROMPTS)).raise_for_status()  # type: ignore[operator]
            return perf_counter() - began

        began = perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(timed, range(requests)))
        return perf_counter() - began, found

    words = {"max_tokens": 8, "temperature": 0}
    first, direct = run(lambda n: engine.post("/v1/completions", json=words | {"prompt": tokens[n], "model": names[n]}))
    before = sum(process.cpu_times()[:2])
    second, through = run(lambda n: client.post("/v1/completions", json=words | {"prompt": PROMPTS[n]}))
    used = sum(process.cpu_times()[:2]) - before
    common.say(
        "gateway", part="busy", clients=clients, requests=requests, direct_s=round(first, 2), through_s=round(second, 2),
        ratio=round(second / first, 3), direct_ms=quantiles(direct), through_ms=quantiles(through), cpu_ms=round(1000 * used / requests, 3),
    )  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("ensemble")
    parser.add_argument("--upstream")
    parser.add_argument("--store", type=Path, default=Path(".elmwood"))
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--max-adapters", type=int, default=2)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24)
    asked = parser.parse_args()
    served, engine_at = open_served(asked.ensemble, Store(asked.store)), asked.upstream or start_nothing()
    command = [
        sys.executable, "-m", "elmwood", "gateway", asked.ensemble, "--store", str(asked.store), "--upstream", engine_at, "--adapters",
        str(asked.adapters), "--max-adapters", str(asked.max_adapters), "--port", "0", "--json", "--log", "none",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout
            address, process = json.loads(running.stdout.readline())["url"], psutil.Process(running.pid)
            with (
                httpx.Client(base_url=address, timeout=120, trust_env=False) as client,
                httpx.Client(base_url=engine_at, timeout=120, trust_env=False) as engine,
            ):
                if asked.upstream:
                    equal(client, served, asked.tokens)
                overhead(client, engine, served, process, asked.requests)
                busy(client, engine, served, process, asked.requests)
                for line in client.get("/metrics").text.splitlines():
                    if line.startswith(("elmwood_expert_loads_total", "elmwood_expert_load_seconds_total")):
                        common.say("gateway", part="metrics", name=line.split("{")[0], value=float(line.rsplit(" ", 1)[1]))
        finally:
            running.terminate()
            served.engine.close()


if __name__ == "__main__":
    main()
