"""Records in notebooks: well-formed, escaped, complete."""

import base64
import re
import xml.etree.ElementTree as ET

import pytest

from elmwood.records import (
    Check,
    Comparison,
    Contest,
    Corpus,
    Domain,
    Embedder,
    Ensemble,
    Expert,
    Forest,
    Merged,
    Partition,
    Point,
    Recipe,
    Record,
    Row,
    Seed,
    Shard,
    Verdict,
)
from elmwood.report.notebook import draw_records, image

HOSTILE = "<script>alert('1')</script>\"&{{7*7}}"
A, BLOB = "a" * 64, "sha256:" + "b" * 64


def row(name: str, role: str, **fields) -> Row:
    return Row(name=name, bits_per_byte=2.1, standard_error=0.04, perplexity=40.0, role=role, **fields)


def contest(**fields) -> Contest:
    plain = {
        "a": A, "b": A, "names": (HOSTILE, "new"), "holdout": "holdout-x", "protocol": "p", "outcome": "better", "estimand": "mean",
        "effect": 0.01, "low": 0.002, "high": 0.03, "drawn": 32, "touched": 100, "blocks": 1000, "alpha": 0.05, "beta": 0.1,
        "min_effect": 0.002, "cap": 50, "clip": 0.5, "order": "o", "wealth": ((1, 0.1, -0.1), (32, 1.4, -2.0)),
    }  # fmt: skip
    return Contest(**(plain | fields))


SHARD = Shard(blob=BLOB, documents=20, bytes=10**6)
CURVE = (Point(step=1, tokens=10, loss=3.0),)
RECORDS = {
    "comparison": Comparison(
        holdout="h", chosen="top-2",
        rows=(row(HOSTILE, "seed", gain=-0.02, gain_error=0.004), row("dense", "control", tokens=1_200_000, wall_seconds=66.0),
              row("top-2", "result", gain=0.03, gain_error=0.004), row("oracle", "bound", gain=0.04, gain_error=0.004)),
    ),
    "contest": contest(),
    "verdict": Verdict(
        expert=A, accepted=False,
        checks=(Check(name=HOSTILE, value=0.1, threshold=0.0, side="at least", passed=True),
                Check(name="harm", value=None, threshold=None, side="at most", passed=False)),
    ),
    "partition": Partition(
        corpus=A, embedder=Embedder(name="tfidf", dimension=2, files={}), centroids=BLOB,
        domains=(Domain(name=HOSTILE, terms=("a", "b"), train=(SHARD,)), Domain(name="two", train=(SHARD,), holdout=(SHARD,))),
    ),
    "seed": Seed(name=HOSTILE, architecture="LlamaForCausalLM", parameters=10**6, vocabulary=2048, context=256, separator=0, files={},
                 curve=CURVE),
    "expert": Expert(seed=A, domain=3, data=(), recipe=Recipe(steps=4), files={}, curve=CURVE, contributor=HOSTILE),
    "forest": Forest(seed=A, partition=A, experts=(A, "b" * 64)),
    "ensemble": Ensemble(forest=A),
    "merged": Merged(seed=A, method="ties", settings={"density": 0.2}, contributions=(), files={}, error=0.01),
}  # fmt: skip


@pytest.fixture(autouse=True)
def drawn():
    draw_records()


def shown(record: Record) -> str:
    """The text that a reader sees. The HTML must be well formed, without any address but drawings in it."""
    html = record._repr_html_()
    assert html
    tree = ET.fromstring(f"<div>{html}</div>")
    assert not tree.findall(".//script")
    assert all(one.attrib["src"].startswith("data:image/svg+xml;base64,") for one in tree.iter("img"))
    return " ".join(" ".join(tree.itertext()).split())


@pytest.mark.parametrize("kind", RECORDS)
def test_records_show_themselves(kind):
    text = shown(RECORDS[kind])
    assert len(text) > 20
    record = RECORDS[kind].model_dump_json()
    assert ("<script>" in text) == ("<script>" in record), "hostile text is shown as text"


def test_a_comparison_shows_every_row_and_marks_the_chosen():
    html = RECORDS["comparison"]._repr_html_() or ""
    assert html.count("<tr") == 5
    assert re.search(r'font-weight:bold"><td[^>]*>top-2<', html)
    assert "+0.030" in html
    plain = Comparison(holdout="h", rows=(row("one", "result"),))
    assert "gain" not in shown(plain)


def test_a_contest_draws_its_wealth_unless_it_is_exact():
    assert "<img" in (RECORDS["contest"]._repr_html_() or "")
    assert "<img" not in (contest(drawn=100, touched=100)._repr_html_() or "")
    data = re.search(r"base64,([^\"]*)", image("<svg/>"))
    assert data
    assert base64.b64decode(data[1]) == b"<svg/>"


def test_a_verdict_shows_failed_checks():
    text = shown(RECORDS["verdict"])
    assert "may not join" in text
    assert "✗ harm not measured none was set" in text


def test_a_kind_that_nobody_draws_shows_its_text():
    one = Corpus(train=(), holdout=(), documents=1, bytes=4, holdout_share=0.1)
    assert one._repr_html_() is None
