"""A small forest, served for real on a free port of this machine, and clients."""

import json
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
import uvicorn
from openai import OpenAI
from tiny_models import SHAPE, lora_expert, louder, tiny_tokenizer
from topics import TOPICS, build_corpus, some_texts

from elmwood.domains.partition import partition
from elmwood.lm.load import load_model, new_model, save_seed
from elmwood.records import Ensemble, Forest, Seed
from elmwood.serve.app import create_app
from elmwood.serve.model import open_served
from elmwood.store import Store

CONTEXT = 256
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' + message['role']) }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


class World:
    """A store with a seed that has a chat template, one that has none, and an ensemble over the first."""

    def __init__(self, folder: Path):
        self.store = Store(folder / "store")
        corpus = build_corpus(folder / "text", self.store, some_texts(TOPICS[:3], 20, np.random.default_rng(0)))
        self.partition = partition(corpus, self.store, domains=3)
        shape = SHAPE.model_copy(update={"context": CONTEXT})
        self.plain = save_seed(louder(new_model(shape)), tiny_tokenizer(), self.store, name="plain", separator=0)
        self.seed = self.with_template(self.plain, TEMPLATE)
        place = {"partition": self.partition.digest}
        self.experts = [lora_expert(self.seed, self.store, n, domain=n, **place) for n in range(3)]
        forest = Forest(seed=self.seed.digest, partition=self.partition.digest, experts=[expert.digest for expert in self.experts])
        self.store.add(forest)
        self.ensemble = Ensemble(forest=forest.digest, top_k=2, temperature=0.5, seed_distance=0.9)
        self.store.add(self.ensemble)
        self.store.name("forests/small", self.ensemble.digest)

    def with_template(self, seed: Seed, template: str) -> Seed:
        with tempfile.TemporaryDirectory() as folder:
            load_model(seed, self.store, device="cpu").save_pretrained(folder)
            for name, digest in seed.files.items():
                (Path(folder) / name).write_bytes(self.store.get(digest).read_bytes())
            path = Path(folder) / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
            made = seed.model_copy(update={"files": self.store.put_folder(Path(folder)), "name": "chatty"})
        self.store.add(made)
        return made


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("serve"))


class Running(NamedTuple):
    """A server in a thread."""

    server: uvicorn.Server
    thread: threading.Thread

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"


def start(app, drain_s: int) -> Running:
    """Serve an app; it listens when this returns."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=drain_s))
    listening, started = threading.Event(), server.startup

    async def startup(sockets=None):
        await started(sockets)
        listening.set()

    server.startup = startup
    thread = threading.Thread(target=server.run)
    thread.start()
    assert listening.wait(60)
    return Running(server, thread)


@contextmanager
def serving(app):
    """The address of an app while it is served."""
    running = start(app, 5)
    try:
        yield running.address
    finally:
        running.server.should_exit = True
        running.thread.join()


@pytest.fixture(scope="session")
def served(world):
    return open_served("forests/small", world.store)


@pytest.fixture(scope="session")
def address(served):
    with serving(create_app(served)) as found:
        yield found


@pytest.fixture(scope="session")
def client(address):
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as opened:
        yield opened


@pytest.fixture(scope="session")
def http(address):
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as opened:
        yield opened
