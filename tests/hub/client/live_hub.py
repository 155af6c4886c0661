"""A real hub for tests: published from the small run, served by uvicorn on a free port of this machine."""

from contextlib import contextmanager

from elmwood.hub.client.gate import adapter_config, expected_tensors
from elmwood.hub.home import Home, Hub
from elmwood.hub.manifest import publish
from elmwood.hub.messages import Gate, Licences, RunDomain, RunManifest, Terms, Tier
from elmwood.records import Ensemble, Forest
from elmwood.store import Store
from tests.hub.served import serve

TEXTS = {"data": b"The text is public domain.", "contribution": b"Adapters are given under Apache-2.0.", "disk": b"The seed stays."}
NONE = "0" * 64


def draft(run, recipe, *, domains=(0, 1, 2), with_text=True, **fields):
    """A manifest of the small run."""
    store = run.store
    expected = expected_tensors(run.seed, recipe, store)
    tier = Tier(recipe=recipe, tensors=expected, config=store.put(adapter_config(recipe, run.seed, expected)), bytes=1 << 20)
    forest = Forest(seed=run.seed.digest, partition=run.partition.digest, experts=())
    shown = [
        RunDomain(number=k, name=one.name, shards=one.train if with_text else ())
        for k, one in enumerate(run.partition.domains)
        if k in domains
    ]
    made = {
        "run": "tiny", "version": 1, "issued": 0, "expires_s": 86400.0, "seed": run.seed.digest, "partition": run.partition.digest,
        "ensemble": Ensemble(forest=forest.digest, top_k=1, temperature=0.1, seed_distance=0.99), "domains": tuple(shown),
        "tiers": {"cpu": tier}, "gate": Gate(length=48, cooldown_s=0.0),
        "licences": Licences(**{name: store.put(text) for name, text in TEXTS.items()}), "terms": Terms(),
        "hub_key": NONE, "root_key": NONE,
    }  # fmt: skip
    return RunManifest(**made | fields)


class Live:
    """A hub that answers at `url`."""

    def __init__(self, hub, url, signed):
        self.hub, self.url, self.signed = hub, url, signed

    @property
    def verifier_key(self):
        return self.hub.home.key_path("verifier")


@contextmanager
def live_hub(manifest, store, name="tiny"):
    """Publish and serve a run from a store."""
    home = Home(name, Store(store))
    home.make_keys()
    hub = Hub(home)
    signed = publish(manifest.model_copy(update={"run": name}), hub, TEXTS.values())
    try:
        with serve(hub) as url:
            yield Live(hub, url, signed)
    finally:
        hub.close()
