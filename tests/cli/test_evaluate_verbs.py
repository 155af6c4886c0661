"""What the verbs of evaluation print, and how they refuse numbers out of range."""

import json
from xml.etree import ElementTree

import pytest
from tiny_models import lora_expert, tiny_seed
from topics import SENTENCES, build_corpus, some_sentences
from typer.testing import CliRunner

from elmwood.cli import app
from elmwood.domains.partition import partition as divide
from elmwood.errors import BadInput
from elmwood.records import Ensemble, Expert, Forest, Partition
from elmwood.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a seed, two experts, a forest of the first, and an ensemble of it."""
    folder = tmp_path_factory.mktemp("verbs")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_sentences(SENTENCES[:2], 20, 4), holdout=0.4)
    division = divide(corpus, store, domains=2)
    seed = tiny_seed(store)
    experts = [lora_expert(seed, store, rng_seed=k, partition=division.digest, domain=k) for k in range(2)]
    forest = Forest(seed=seed.digest, partition=division.digest, experts=tuple(one.digest for one in experts))
    ensemble = Ensemble(forest=store.add(forest), router="live", top_k=1, seed_distance=1.0)
    for name, record in (("seed", seed), ("forest", forest), ("ensemble", ensemble), ("expert/0", experts[0]), ("expert/1", experts[1])):
        store.name(name, store.add(record))
    return store


def run(store, *words):
    done = CliRunner().invoke(app, [*words, "--store", str(store.root)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_a_table_in_words_and_numbers(store, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ("table", "ensemble", "--workers", "1", "--candidate", "expert/1", "--plot", str(tmp_path / "plot.svg"))
    found = json.loads(run(store, *words, "--json"))
    assert (found["router"], found["top_k"], found["seed_joins"]) == ("live", 1, True)
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    shown = run(store, *words)
    for value in (found["routed"]["value"], found["static"]["value"], found["seed"]["value"]):
        assert f"{value:.4f}" in shown
    for word in (
        "(live, top-1",
        "models run",
        "columns brought in",
        "help: mean p_new / p_mix",
        *(one["name"] for one in found["experts"]),
    ):
        assert word in shown


def test_a_forest_with_every_routing(store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    found = json.loads(run(store, "eval", "forest", "--workers", "1", "--name", "fitted", "--json"))
    assert isinstance(store.load("fitted"), Ensemble)
    shown = run(store, "eval", "forest", "--workers", "1")
    for row in found["rows"]:
        assert row["name"] in shown
        assert f"{row['bits_per_byte']:.4f}" in shown


def test_names_that_look_like_markup_or_commands_are_text(store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    forest = store.load("forest", Forest)
    division = store.load(forest.partition, Partition)
    domains = tuple(
        domain.model_copy(update={"name": name}) for domain, name in zip(division.domains, ("[/nope]", "[red]\x1b[2J"), strict=True)
    )
    renamed = store.add(division.model_copy(update={"domains": domains}))
    experts = [store.load(digest, Expert).model_copy(update={"partition": renamed}) for digest in forest.experts]
    other = forest.model_copy(update={"partition": renamed, "experts": tuple(store.add(one) for one in experts)})
    store.name("odd", store.add(other))
    assert "[/nope]" in run(store, "table", "odd", "--workers", "1")
    store.name("odd-expert", store.add(experts[0]))
    shown = run(store, "eval", "odd-expert", "--workers", "1")
    assert "[/nope]" in shown
    assert "[red]" in shown
    assert "\x1b" not in shown
    assert "partition" in run(store, "show", "odd")


def test_models_side_by_side_in_each_domain(store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ("eval", "ensemble", "seed", "--workers", "1")
    found, shown = json.loads(run(store, *words, "--json")), run(store, *words)
    assert all(name in shown for name in (*found["domains"], "macro", "micro"))
    for row in found["rows"]:
        assert f"{row['macro']:.4f}" in shown


@pytest.mark.filterwarnings("ignore")  # from the libraries of the benchmarks
def test_benchmarks_in_words_and_numbers(store, tmp_path, monkeypatch):
    for name, value in (("COLUMNS", "160"), ("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_EVALUATE_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    items = [{"question": f"the {word}", "choices": ["sea", "path"], "answer": n % 2} for n, word in enumerate(("cat", "sea", "captain"))]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}],
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "metadata": {"version": 3}, "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer",
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(json.dumps(task))
    words = ("eval", "seed", "expert/0", "--tasks", "choice", "--limit", "2", "--tasks-folder", str(tmp_path / "tasks"))
    found, shown = json.loads(run(store, *words, "--json")), run(store, *words)
    assert [one["name"] for one in found] == ["seed", "expert/0"]
    assert found[1]["model"] == store.resolve("expert/0")
    for word in ("2/3", "acc", "seed", "expert/0", f"{found[1]['tasks']['choice']['metrics']['acc']['value']:.4f}"):
        assert word in shown


@pytest.mark.parametrize(
    ("verb", "option", "values"),
    [
        ("compare seed ensemble", "--alpha", ("0", "1", "2", "nan")),
        ("compare seed ensemble", "--beta", ("0", "1", "nan")),
        ("compare seed ensemble", "--cap", ("0", "-1")),
        ("compare seed ensemble", "--clip", ("0", "inf", "nan")),
        ("compare seed ensemble", "--min-effect", ("nan", "-1")),
        ("compare seed ensemble", "--documents", ("0", "3")),
        ("compare seed ensemble", "--length", ("1", "-1", "1000000")),
        ("accept expert/1 forest", "--cap", ("0", "-1")),
        ("accept expert/1 forest", "--clip", ("inf", "nan")),
        ("accept expert/1 forest", "--length", ("1", "-1", "1000000")),
        ("eval seed --partition none", "--length", ("0", "1")),
        ("eval seed --tasks none", "--limit", ("0", "-1")),
        ("table forest", "--near", ("0", "-1")),
        ("table forest", "--seconds", ("nan", "-1")),
        ("chat seed --prompt x", "--temperature", ("1e-320", "nan", "-1")),
        ("chat seed --prompt x", "--top-p", ("0", "1e-320", "2")),
        ("chat seed --prompt x", "--rng-seed", ("-1", str(2**70))),
        ("chat seed --prompt x", "--max-tokens", ("0",)),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(store, verb, option, values):
    for value in values:
        with pytest.raises(BadInput, match=rf"^{option[2:]} is .*(choose|reads at most)"):
            run(store, *verb.split(), option, value)
