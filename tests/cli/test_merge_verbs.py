"""What the verbs of merging and mixtures read and print; what they compute is tested in tests/merge."""

import json

import pytest
from tiny_models import WORDS, full_expert, lora_expert
from typer.testing import CliRunner

from elmwood.cli import app
from elmwood.corpus.build import build
from elmwood.errors import BadInput
from elmwood.records import Domain, Embedder, Forest, Partition


@pytest.fixture(scope="module")
def asked(store, seed):
    """A function that runs a verb in a store with experts, and gives its stdout and stderr."""
    path = store.root / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{WORDS} {n} " * 3}) + "\n" for n in range(40)))
    corpus = build([str(path)], store, holdout=0.4)
    domain = Domain(name="all", train=corpus.train, holdout=corpus.holdout)
    embedder = Embedder(name="none", dimension=1, files={})
    nothing = "sha256:" + "0" * 64
    store.name("p", store.add(Partition(corpus=corpus.digest, embedder=embedder, centroids=nothing, domains=(domain,))))
    low = [lora_expert(seed, store, n, domain=n) for n in range(2)]
    for number in range(2):
        store.name(f"full/{number}", full_expert(seed, store, number).digest)
        store.name(f"low/{number}", low[number].digest)
    store.name("forest", store.add(Forest(seed=seed.digest, partition="0" * 64, experts=tuple(one.digest for one in low))))

    def run(*words):
        done = CliRunner().invoke(app, [*words, "--store", str(store.root)])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.stdout, done.stderr

    return run


def test_one_merge_and_several(asked, store):
    out, _ = asked("merge", "full/", "--method", "ties", "--density", "0.5", "--name", "one")
    assert out == f"{store.resolve('one')}  one\n"
    out, _ = asked("merge", "full/", "--method", "ties,average", "--scale", "0.5,1", "--weights", "1,0:1", "--name", "all")
    names = [line.split()[1] for line in out.splitlines()]
    assert names == ["all/ties-scale-0.5", "all/ties-scale-1", "all/average-scale-0.5", "all/average-scale-1"]
    made = json.loads(asked("merge", "low/", "--method", "svd", "--rank", "1,2", "--json")[0])
    assert [one["record"]["settings"]["rank"] for one in made] == [1, 2]


def test_a_choice_is_shown_with_its_test_and_cost(asked):
    words = ("merge", "full/", "--method", "task_arithmetic", "--scale", "0.01,0.2,3", "--choose", "--run", "2", "--partition", "p")
    out, err = asked(*words, "--documents", "4", "--name", "best")
    assert out.endswith("  best\n")
    for part in ("log-linear pools", "behind the best (paired)", "on fresh blocks", "the search scored 2 models"):
        assert part in err
    made = json.loads(asked(*words, "--documents", "4", "--json")[0])
    assert len(made["answers"]) == made["cost"]["answers"] == 2
    assert made["test"]["b"] == made["digest"]


def test_states(asked, store):
    for number in range(2):
        asked("state", "make", f"full/{number}", "--method", "ties", "--name", f"state/{number}")
    asked("state", "add", "state/0", "state/1", "--name", "both")
    asked("state", "remove", "both", "full/1", "--name", "back")
    assert store.resolve("back") == store.resolve("state/0")
    out, _ = asked("state", "finalize", "both", "--scale", "0.5,1", "--name", "end")
    assert [line.split()[1] for line in out.splitlines()] == ["end/ties-scale-0.5", "end/ties-scale-1"]


def test_mixtures(asked, store):
    out, _ = asked("mix", "forest", "--gates", "random", "--name", "mixture")
    assert out == f"{store.resolve('mixture')}  mixture\n"
    assert asked("mix", "mixture", "--without", "low/0", "--name", "rest")[0].endswith("  rest\n")
    with pytest.raises(BadInput, match="--top-k is of mixtures that are made of a forest"):
        asked("mix", "mixture", "--without", "low/0", "--top-k", "1")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--weights 1,x", "weight 'x' is not a number"), ("--set gamma", "NAME=VALUE"), ("--layers 5-2", "no range of layers"),
        ("--weights 1,2,3", "3 weights for 2 experts"), ("--set gamma=1 --method average", "no setting 'gamma'"),
        ("--scale nan", "finite"), ("--weights inf", "finite"), ("--method nothing", "no merge rule"),
        ("--weights 0", "all weights are 0"), ("--weights 0,0 --method svd", "all weights are 0"),
        ("--scale 1e301", r"from -1e\+300 to 1e\+300"),
    ],
)  # fmt: skip
def test_what_was_typed_wrong_is_said(asked, words, complaint):
    with pytest.raises(Exception, match=complaint):
        asked("merge", "full/", *words.split())
