"""What the verbs return: results that stand for their record, and show themselves in notebooks."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from elmwood.domains.route import Routing
from elmwood.errors import BadInput
from elmwood.evaluate.losses import Estimate
from elmwood.records import Comparison, Ensemble, Forest, Gates, Merged, Mixture, Row
from elmwood.report.notebook import draw_records
from elmwood.store import Store
from elmwood.study.ancestry import Sample
from elmwood.study.merging import Merges
from elmwood.study.mixing import Loads, MixResult, TunedMixture
from elmwood.study.page import settings_of_rows
from elmwood.study.quality.evaluation import Evaluation
from elmwood.study.quality.forest_table import CandidateRow, Chosen, ExpertValue, ForestTable, Routed, Static, TableCost
from elmwood.study.quality.selection import ChosenMerge, Tuned

A, B = "a" * 64, "b" * 64
LOSSES = {"ties": Estimate(2.5, 0.04), "average": Estimate(2.25, 0.04)}
TUNED = Tuned(LOSSES, {"ties": Estimate(0.25, 0.01), "average": Estimate(0.0, 0.0)}, 1000)
MERGED = {one: Merged(seed=A, method=one, settings={}, contributions=(), files={}) for one in LOSSES}
MIXTURE = Mixture(seed=A, forest=B, experts=(A, B), gates=Gates(), files={})
ROW = Row(name="seed", bits_per_byte=2.1, standard_error=0.04, perplexity=40.0, role="seed")


@pytest.fixture(autouse=True)
def drawn():
    draw_records()


def shown(result) -> str:
    """The text a reader sees, of well-formed HTML."""
    return " ".join(" ".join(ET.fromstring(f"<div>{result._repr_html_()}</div>").itertext()).split())


def test_an_evaluation_has_an_ensemble_where_a_forest_was_evaluated():
    comparison = Comparison(holdout="h", rows=(ROW,))
    assert "2.100" in shown(Evaluation(comparison, ("sea",)))
    with pytest.raises(BadInput, match="evaluate a forest"):
        _ = Evaluation(comparison, ("sea",)).ensemble
    fitted = Ensemble(forest=A)
    assert Evaluation(comparison, ("sea",), fitted).ensemble is fitted


def test_a_table_shows_experts_in_the_order_they_were_chosen():
    loss = Estimate(2.25, 0.04)
    experts = (ExpertValue(A, "0 sea", 0.25, 0.125), ExpertValue(B, "1 code", 0.5, -0.0625))
    table = ForestTable(
        Forest(seed=A, partition=A, experts=(A, B)), "h", "p", Routing(), loss, Routed(loss, None, None), Static(loss, 0.25, 0.0, 3),
        experts, (Chosen(1, 2.5, Estimate(2.5, 0.04)),), 3, (CandidateRow(A, "2 soup", 1.5, 0.1, 100),), TableCost(2, 9, 0.1, 0, 1.0, 0),
    )  # fmt: skip
    text = shown(table)
    assert text.index("1 code") < text.index("0 sea")
    for part in ("2.5000 ± 0.0400", "+0.1250", "2 soup", "1.5000"):
        assert part in text


def test_merges_stand_for_the_chosen_one(tmp_path):
    store = Store(tmp_path)
    alone = Merges({"ties": MERGED["ties"]})
    assert store.load(alone) is MERGED["ties"]
    assert "ties" in shown(alone)
    both = Merges(dict(MERGED))
    assert MERGED["average"].digest[:12] in shown(both)
    with pytest.raises(BadInput, match="choose=True"):
        store.load(both)
    chosen = Merges(dict(MERGED), ChosenMerge(best="average", tuned=TUNED, **dict.fromkeys(UNUSED)))
    assert store.load(chosen) is MERGED["average"]
    text = shown(chosen)
    assert text.index("average") < text.index("ties"), "the best comes first"


UNUSED = set(ChosenMerge._fields) - {"best", "tuned"}


def test_mixtures_show_their_gates_and_loads():
    assert "random" in shown(MixResult(MIXTURE))
    assert "random" in shown(TunedMixture(MIXTURE, None))
    assert "2.2500" in shown(MixResult(MIXTURE, TUNED))
    assert "75.0%" in shown(Loads(A, ["0"], ["sea"], ["0", "seed"], np.array([[[0.75, 0.25]]])))


def test_a_sample_prints_as_its_text():
    sample = Sample("The river <", " ran.", {"0 sea": 0.75, "seed": 0.25})
    assert str(sample) == "The river < ran."
    assert shown(sample) == "The river < ran. 0 sea 75%, seed 25%"


def test_a_page_has_one_line_of_settings_for_each_fitted_row():
    fitted = {"top_k": 2.0, "temperature": 0.83859, "live routing, top-2: top_k": 2.0, "live routing, top-2: temperature": 0.83859}
    fitted |= {"dense + seed, live routing: decay": 0.85}
    assert settings_of_rows(fitted) == {
        "settings, live routing, top-2": "top_k 2, temperature 0.8386",
        "settings, dense + seed, live routing": "decay 0.85",
    }
    older = {"top_k": 2.0, "temperature": 0.1, "top-1 temperature": 0.3}  # before rows had their names in them
    assert settings_of_rows(older) == {"settings": "top_k 2, temperature 0.1, top-1 temperature 0.3"}
    assert settings_of_rows({}) == {}
