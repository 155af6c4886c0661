"""The examples of CONTRIBUTING.md, each run as a stranger would: a module of its own on the Python path, named 'module:function'."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import full_expert, lora_expert
from topics import TOPICS, some_texts

import elmwood as ew
from elmwood.corpus.build import documents
from elmwood.domains.route import Routing, Signals, weights
from elmwood.records import Forest
from elmwood.registry import trust_file

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
EXAMPLES = {match[1]: match[2] for match in re.finditer(r"^### (.+)\n(?:(?!#|```).*\n)*```python\n((?:.*\n)*?)```", TEXT, re.M)}


def merge_rule(store, seed):
    for number in range(2):
        store.name(f"expert/{number}", full_expert(seed, store, number).digest)
    ew.merge("expert/", store, method="soft:soft", settings={"threshold": 0.01}, name="merged")
    base, made, *experts = (weights_of(store, name) for name in ("seed", "merged", "expert/0", "expert/1"))
    for name, value in base.items():
        deltas = [one[name].astype(float) - value for one in experts]
        wanted = value + sum(np.sign(delta) * np.maximum(np.abs(delta) - 0.01, 0) for delta in deltas)
        np.testing.assert_allclose(made[name], wanted, rtol=1e-6, atol=1e-7)


def gates(store, seed):
    experts = [lora_expert(seed, store, number, domain=number).digest for number in range(2)]
    forest = Forest(seed=seed.digest, partition="0" * 64, experts=tuple(experts))
    store.name("forest", store.add(forest))
    ew.mix("forest", store, gates="prototypes:plain", name="mixture")
    rows = next(value for name, value in weights_of(store, "mixture", "model-00001-of-00002").items() if "gate.weight" in name)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 0], atol=1e-6)  # two experts, and the seed's own


def embedder(store, seed):
    texts = [f"{word} {n} " * 9 for n in range(20) for word in ("zebra jazz", "quick quiz", "onion soup")]
    folder = store.root.parent / "texts.jsonl"
    folder.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = ew.cluster(str(folder), store, embedder="letters:letters", domains=3)
    assert made.embedder.name == "letters:letters"
    assert all(len({document.text[:5] for document in documents(domain.train, store)}) == 1 for domain in made.domains)
    assert "letters:letters" in trust_file().read_text()


def router(store, seed):
    folder = store.root.parent / "topics.jsonl"
    texts = some_texts(TOPICS[:2], 20, np.random.default_rng(0))
    folder.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    division = ew.cluster(str(folder), store, domains=2, holdout=0.4)
    experts = [lora_expert(seed, store, n, domain=n, partition=division.digest) for n in range(2)]
    forest = ew.forest(division.digest, [expert.digest for expert in experts], store=store)
    made = ew.evaluate(forest, store, router="heavy:tails", workers=1)
    assert (made.ensemble.router, made.record.chosen.split(",")[0]) == ("heavy:tails", "heavy:tails routing")
    dist2_NE, chosen = np.array([[0.3, 1.9]]), Routing.of(made.ensemble)
    kernel_C = 1 / (1 + np.append(dist2_NE[0], chosen.seed_distance or 0) / chosen.temperature) * [1, 1, chosen.seed_distance is not None]
    kernel_C[np.argsort(-kernel_C)[chosen.top_k :]] = 0
    np.testing.assert_allclose(weights(Signals(dist2_NE), chosen)[0], kernel_C / kernel_C.sum())
    assert ew.open_model(made.ensemble, store=store).lm.score([[0, 5, 7, 9]]).isfinite().all()
    assert "heavy:tails" in trust_file().read_text()


def importer(store, seed):
    table = store.root.parent / "reviews.csv"
    table.write_text("review,stars\nThe mill turns slowly,5\nBoil the onions,4\n,3\n")
    made = ew.build(f"tables:rows:{table}", store)
    assert {document.text for document in documents((*made.train, *made.holdout), store)} == {"The mill turns slowly", "Boil the onions"}
    assert made.rejected == {"no words": 1}


USES = {
    "A new embedder in ten lines": embedder,
    "A new router in ten lines": router,
    "A new importer in ten lines": importer,
    "A new merge rule in ten lines": merge_rule,
    "New gates in ten lines": gates,
}


def weights_of(store, name, stem="model"):
    return load_file(store.get(store.load(name).files[f"{stem}.safetensors"]))


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_runs(title, store, seed, tmp_path, monkeypatch):
    code = EXAMPLES[title]
    assert code.count("\n") <= 10
    name = re.match(r"# (\w+\.py)\n", code)
    assert name
    (tmp_path / name[1]).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    store.name("seed", seed.digest)
    USES[title](store, seed)


def test_every_use_has_an_example():
    assert EXAMPLES.keys() == USES.keys()
