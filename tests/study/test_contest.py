"""`elmwood compare`: only blocks that can differ are run, only until the answer is known, and it is what the full table says."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from markupsafe import escape
from tiny_models import full_expert, lora_expert, tiny_seed
from topics import SENTENCES, build_corpus, some_sentences
from typer.testing import CliRunner

from elmwood.cli import app
from elmwood.domains.partition import partition as divide
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, UnknownName
from elmwood.evaluate import holdout
from elmwood.evaluate.columns import run
from elmwood.evaluate.holdout import HoldoutSpec, open_holdout
from elmwood.evaluate.losses import block_nats, mix
from elmwood.evaluate.partial import Partial, score
from elmwood.evaluate.sequential.decision import best, per_byte, worst
from elmwood.records import Contest, Ensemble, Forest, references
from elmwood.report import Report, html
from elmwood.report.charts import draw_wealth
from elmwood.report.contest import headline, lines
from elmwood.report.plots import Series, experts_plot, wealth_plot
from elmwood.store import Store
from elmwood.study.quality.contest import compare

K = len(SENTENCES)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """A few thousand bytes of text make many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdout, "BLOCK", 256)
        yield


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A store with three topics, a seed, an expert of each, and ensembles with all of them and without the last; small blocks."""
    folder = tmp_path_factory.mktemp("compare")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_sentences(SENTENCES, 20, 16), holdout=0.8)
    partition = divide(corpus, store, domains=K)
    seed = tiny_seed(store)
    experts = [(full_expert if k == 0 else lora_expert)(seed, store, rng_seed=k, partition=partition.digest, domain=k) for k in range(K)]
    for name, members in (("all", experts), ("fewer", experts[:-1])):
        forest = Forest(seed=seed.digest, partition=partition.digest, experts=tuple(expert.digest for expert in members))
        store.add(forest)
        ensemble = Ensemble(forest=forest.digest, top_k=1, temperature=0.1, seed_distance=0.99)
        store.name(name, store.add(ensemble))
    store.name("seed", seed.digest)
    store.name("last", experts[-1].digest)
    store.name("partition", partition.digest)
    held = open_holdout(HoldoutSpec(partition=partition.digest, seed=seed.digest, length=48), store)
    return store, held


def asked(store, *words):
    done = CliRunner().invoke(app, ["compare", *words, "--length", "48", "--store", str(store.root), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def differences(store, held, a, b):
    """The full table's answer for the gate split."""
    loss = [block_nats(run(open_model(store.load(name), store, "cpu"), held), held)[held.split_B == holdout.GATE] for name in (a, b)]
    return per_byte(loss[0] - loss[1], held.block_bytes_B[held.split_B == holdout.GATE])


def test_a_routed_change_is_run_only_where_it_acts(grown):
    store, held = grown
    full_G = differences(store, held, "fewer", "all")
    told = asked(store, "fewer", "all", "--cap", "100000", "--alpha", "1e-9", "--beta", "1e-9")
    assert told["blocks"] == len(full_G)
    assert told["touched"] == (np.abs(full_G) > 0).sum() < told["blocks"]
    assert told["drawn"] == told["touched"]  # such small errors ask for everything
    assert told["effect"] == pytest.approx(full_G.sum() / told["touched"], abs=1e-5)
    assert told["overall"] == pytest.approx(full_G.mean(), abs=1e-5)
    assert 0 < told["tokens_forwarded"] < told["full_tokens"]
    again = asked(store, "fewer", "all", "--cap", "100000", "--alpha", "1e-9", "--beta", "1e-9")
    assert (again["tokens_forwarded"], again["effect"]) == (0, told["effect"])


def test_with_a_memory_two_ensembles_differ_only_where_their_candidates_do(grown):
    store, held = grown
    for name in ("fewer", "all"):
        store.name(f"live/{name}", store.add(store.load(name, Ensemble).model_copy(update={"router": "live"})))
    full_G = differences(store, held, "live/fewer", "live/all")
    found = compare("live/fewer", "live/all", store, length=48, cap=100_000, alpha=1e-9, beta=1e-9)
    assert found.finding.size == (np.abs(full_G) > 1e-6).sum() < len(full_G)
    assert found.finding.effect * found.finding.share == pytest.approx(full_G.mean(), abs=1e-5)
    other = store.load("live/all", Ensemble).model_copy(update={"memory": 0.3})
    assert compare("live/all", other, store, length=48, cap=10).finding.size == len(full_G)  # other settings act everywhere


def test_a_clear_answer_costs_few_tokens(grown):
    store, held = grown
    told = asked(store, "last", "seed", "--clip", "0.6")
    assert (told["outcome"] == "better") == (differences(store, held, "last", "seed").mean() > 0)
    assert told["drawn"] < told["blocks"]
    assert told["low"] <= told["effect"] <= told["high"]
    assert told["tokens_forwarded"] < told["full_tokens"]


def test_known_columns_give_the_exact_answer_for_nothing(grown, tmp_path):
    store, held = grown
    for name in ("seed", "last"):
        score(store.load(name), lambda name=name: open_model(store.load(name), store, "cpu"), held, store)
    told = asked(store, "seed", "last", "--plot", str(tmp_path / "wealth.svg"))
    full_G = differences(store, held, "seed", "last")
    assert told["tokens_forwarded"] == told["full_tokens"] == 0
    assert told["low"] == told["high"] == pytest.approx(full_G.mean(), abs=1e-5)
    assert (told["estimand"], told["clipped"]) == ("mean", 0)
    ElementTree.fromstring((tmp_path / "wealth.svg").read_text())


def test_words_for_people(grown):
    store, _ = grown
    done = CliRunner().invoke(app, ["compare", "fewer", "all", "--length", "48", "--store", str(store.root)], catch_exceptions=False)
    assert done.exit_code == 0
    for word in ("bits per byte", "cannot differ", "forwarded", "gate split", "not run"):
        assert word in done.stdout
    kept = [one for digest in store.records() if isinstance(one := store.load(digest), Contest) and one.names == ("fewer", "all")]
    assert headline(kept[0]) in done.stdout
    page = html(Report(title="contests", contests=tuple(kept)))
    for _, text in lines(kept[0]):
        assert str(escape(text)) in page


def test_a_contest_is_told_whichever_way_it_went(grown):
    store, _ = grown
    found = [
        Contest(
            a="a" * 64, b="b" * 64, names=("old", "new"), holdout="holdout-x", protocol="p", outcome=outcome, estimand="clipped mean",
            effect=0.01, low=-0.01, high=0.03, drawn=32, touched=100, blocks=1000, moved=0.2, alpha=0.05, beta=0.1, min_effect=0.002,
            cap=50, clip=0.5, order="c" * 64, wealth=((1, 0.1, -0.1), (32, 99.0, -99.0)),
        )
        for outcome in ("better", "not better", "undecided")
    ]  # fmt: skip
    for one, words in zip(found, ("new is better than old", "not better than old by 0.002", "undecided after 32"), strict=True):
        told = " ".join(text for _, text in lines(one))
        assert words in headline(one)
        assert set(references(one)) == {one.a, one.b}  # its order looks like a digest, and `verify` would miss it
        for part in (
            "+0.0100",
            "+0.00100 over all",
            "32 of 100 drawn by the weight",
            "900 of 1,000 cannot differ",
            "clipped at 0.5",
            "20 decide",
        ):
            assert part in told
        assert store.load(store.add(one), Contest) == one
        ElementTree.fromstring(str(draw_wealth(one, "wealth")))


def test_what_cannot_be_compared_is_refused(grown):
    store, _ = grown
    runner, base = CliRunner(), ["--length", "48", "--store", str(store.root)]
    for words, error in ((["all", "all"], BadInput), (["seed", "seed"], BadInput), (["seed", "nothing"], UnknownName)):
        with pytest.raises(error):
            runner.invoke(
                app, ["compare", *words, *base, *(["--partition", "partition"] if words[0] == "seed" else [])], catch_exceptions=False
            )


# ---- columns that grow


def test_a_partial_column_is_the_column_where_it_is_known(grown):
    store, held = grown
    model, opened = store.load("all"), []

    def load():
        opened.append(1)
        return open_model(model, store, "cpu")

    whole_N = run(load(), held)
    one = Partial(model, load, held, store)
    assert not one.known_W.any()
    one.fill(np.array([0, 5, 6]))
    one.fill(np.array([5, 2]))
    known_N = one.known_W[held.window_N]
    np.testing.assert_allclose(one.loglik_N[known_N], whole_N[known_N], atol=1e-5)
    assert np.isnan(one.loglik_N[~known_N]).all()
    assert one.forwarded == held.windows.length_W[[0, 2, 5, 6]].sum()
    again = Partial(model, lambda: pytest.fail("opened again"), held, store)
    again.fill(np.array([2, 6]))
    np.testing.assert_array_equal(again.loglik_N, one.loglik_N)


def test_bounds_hold_whatever_the_unknown_models_say():
    rng = np.random.default_rng(0)
    loglik_NE, weight_NE = -4 * rng.random((50, 4)), rng.dirichlet(np.ones(4), 50)
    true_N = worst(loglik_NE, weight_NE)
    np.testing.assert_allclose(true_N, mix(loglik_NE, weight_NE))
    for known in range(5):
        assert (worst(loglik_NE[:, :known], weight_NE[:, :known]) <= true_N + 1e-12).all()
        assert (best(loglik_NE[:, :known], weight_NE[:, :known]) >= true_N - 1e-12).all()
    np.testing.assert_allclose(best(loglik_NE, weight_NE), true_N)


# ---- drawings


def test_drawings_are_well_formed():
    drawn = wealth_plot(np.cumsum(np.ones(700)), -np.ones(700), alpha=0.05, beta=0.1, names=("a < b", "not by enough"))
    assert "a < b" in "".join(ElementTree.fromstring(drawn).itertext())
    lines = [Series("top-2", [1, 2, 4], [2.2, 2.1, 2.05], [0.01, 0.01, 0.02]), Series("all", [1, 2, 4], [2.2, 2.1, 2.05])]
    text = "".join(ElementTree.fromstring(experts_plot(lines, reference=("dense", 2.15))).itertext())
    assert all(word in text for word in ("top-2", "all", "dense", "bits per byte"))
    wide = ElementTree.fromstring(experts_plot([Series("all", [4, 16, 64], [2.2, 2.1, 2.05])], by="rank"))
    (line,) = (one for one in wide.iter() if one.tag.endswith("polyline"))
    left, middle, right = (float(spot.split(",")[0]) for spot in line.get("points", "").split())
    assert middle - left == pytest.approx(right - middle)
    assert {"4", "8", "16", "32", "64"} <= set(wide.itertext())
    lone = ElementTree.fromstring(experts_plot([Series("random", [4], [2.2])]))
    assert len([one for one in lone.iter() if one.tag.endswith("circle")]) == 1  # a line of one point would not be seen
    ElementTree.fromstring(wealth_plot(np.array([np.inf]), np.array([-np.inf]), alpha=0.05, beta=0.1, names=("x", "y")))
