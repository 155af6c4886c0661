"""Options of text and training: what no run could use is refused before any work, by the name of the option."""

import json
import math

import pytest
from tiny_models import tiny_seed

from elmwood.errors import BadCorpus, BadInput, UnknownName
from elmwood.store import Store
from elmwood.study import fitting, seeds, text, training


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("options")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"word{n % 7} word{n % 5} other{n} text"}) + "\n" for n in range(40)))
    store = Store(folder / "store")
    store.name("seed", tiny_seed(store).digest)
    text.cluster(str(folder / "text.jsonl"), store, domains=3, name="domains")
    return store


def refuse(named: str, function, *given, **options) -> None:
    with pytest.raises((BadInput, BadCorpus), match=named):
        function(*given, **options)


@pytest.mark.parametrize(
    "option", [{"domains": 0}, {"rng_seed": -1}, {"rng_seed": 2**70}, {"workers": 0}, {"holdout": math.nan}], ids=lambda option: str(option)
)
def test_clustering(store, option):
    (name,) = option
    refuse(name.replace("_", "-"), text.cluster, str(store.root.parent / "text.jsonl"), store, **{"domains": 3} | option)


@pytest.mark.parametrize("option", [{"parts": -1}, {"parts": 1}, {"rng_seed": -1}], ids=lambda option: str(option))
def test_splitting(store, option):
    (name,) = option
    refuse(name.replace("_", "-"), text.split, "domains", 0, store, **option)


TRAINING = [
    *({"alpha": value} for value in (0, -1, math.nan, math.inf)),
    *({"learning_rate": value} for value in (0, -1, math.nan, math.inf)),
    *({"late": value} for value in (0, 1.5, math.nan)),
    *({"length": value} for value in (0, 1, -1, 65)),
    *({"rng_seed": value} for value in (-1, 2**70)),
    *({name: 0} for name in ("batch", "accumulate", "patience", "rank", "threads", "together", "workers")),
    *({"domains": value} for value in ("", "-1", "5-2", "0-99999999999", 3)),
    *({"tokens": value} for value in ("0", "-5", "many")),
    {"rank": 10**9}, {"batch": 10**9}, {"targets": "nothing"}, {"schedule": "steps"}, {"method": "all"}, {"optimiser": "sgd"},
]  # fmt: skip


@pytest.mark.parametrize("option", TRAINING, ids=lambda option: str(option))
def test_training(store, option):
    (name,) = option
    named = {"domains": "names( no)? domains", "tokens": "tokens|is not a number"}.get(name, name.replace("_", "-"))
    refuse(named, training.train, "domains", "seed", store, **{"tokens": "100", "length": 16, "batch": 2, "rank": 2, "workers": 1} | option)
    assert not list((store.root / "work").glob("*/state.safetensors"))


@pytest.mark.parametrize("option", [{"length": 0}, {"rank": 0}, {"together": 0}, {"batch": 10**9}, {"late": math.nan}], ids=str)
def test_fit(store, option):
    refuse(next(iter(option)), fitting.fit, "seed", store=store, **option)


@pytest.mark.parametrize("option", [{"layers": 0}, {"width": 0}, {"length": 1}, {"batch": 0}, {"learning_rate": math.nan}], ids=str)
def test_seeds(store, option):
    refuse(next(iter(option)).replace("_", "-"), seeds.train_seed, str(store.root.parent / "text.jsonl"), store, **option)


def test_statistics(store):
    refuse("rows", training.compute_statistics, "seed", store=store, rows=0)


def test_a_name_that_cannot_be_is_refused_before_any_work(store, tmp_path):
    own = Store(tmp_path)
    own.name("seed", own.add(store.load("seed")))
    for call in (
        lambda: text.cluster("sample", own, domains=3, name="seed/domains"),
        lambda: seeds.train_seed("sample", own, name="n" * 300),
        lambda: training.train("domains", "seed", store, name="seed", tokens="100", length=16, workers=1, batch=2),
    ):
        with pytest.raises(UnknownName, match=r"cannot be a name|too long"):
            call()
    assert not (own.root / "work").exists()
