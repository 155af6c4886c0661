"""Names come from others: wherever one is printed, drawn or put in a file, it is text and nothing else."""

import io
import xml.etree.ElementTree as ET

import pytest
import yaml

from elmwood.cli import screen
from elmwood.cli.store import print_record
from elmwood.lm.mixture_card import mixture_card, plain
from elmwood.merge.export.card import card, model_card
from elmwood.records import Contribution, Expert, Gates, Mixture, Recipe, Seed, Share
from elmwood.report.data import Ancestor, Report
from elmwood.report.notebook import draw_records
from elmwood.report.page import html
from elmwood.report.plots import Series, experts_plot, wealth_plot

A, B = "a" * 64, "b" * 64
NAMES = ["[/x]", "[red]\x1b[2J", "\x1b]0;title\x07", "a\u202egnp.exe", "\u2066left\u2069", "$x^2$", "<script>alert(1)</script>",
         "</title><img src=x onerror=alert(2)>{{7*7}}",
         "two\nlines\n---\nadmin: true", "a|b `code` [link](http://x)", "\u200bhidden", "c\x9b31m", "a\u2060\U000e0041b"]  # fmt: skip
FORBIDDEN = {"\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\u2069", "\u200b", "\u2060", "\U000e0041"}


def seed_of(name):
    return Seed(name=name, architecture="LlamaForCausalLM", parameters=9, vocabulary=9, context=9, separator=0, files={}, licence=name)


@pytest.mark.parametrize("name", NAMES)
def test_cards_have_one_header_and_no_markup_of_a_name(name):
    seed = seed_of(name)
    expert = Expert(seed=A, domain=3, partition=B, data=(), recipe=Recipe(steps=4), files={}, contributor=name)
    rows = [Contribution(expert=A, weight=(Share(values=(1.0,), tensors=name),), whole=True, reach=1)]
    mixture = Mixture(seed=A, forest=B, experts=(A, B), gates=Gates(), files={})
    for text in (
        model_card(expert, seed, "transformers", name, {"x": A}), card(seed, "ties", "arXiv:2306.01708", {}, rows, {}),
        mixture_card(mixture, seed),
    ):  # fmt: skip
        _, header, body = text.split("---\n", 2)
        assert set(yaml.safe_load(header)) == {"library_name", "tags", "license"}
        assert "\n---\n" not in body
        assert "<script" not in body
        assert "[link]" not in body
        assert not FORBIDDEN & set(text)


def test_a_name_without_marks_stays_as_it_is():
    for name in ("tiny", "Llama-3.2_1B (base)", "café 猫", "expert/0"):
        assert plain(name) == name
    assert "license: apache-2.0\n" in mixture_card(
        Mixture(seed=A, forest=B, experts=(A,), gates=Gates(), files={}), seed_of("apache-2.0")
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_screens_show_names_as_text(name, monkeypatch):
    shown = io.StringIO()
    console = screen.Screen(file=shown, width=400, force_terminal=False, **screen.PLAIN)
    monkeypatch.setattr("elmwood.cli.store.out", console)
    print_record("abc  seed", f"{name}: LlamaForCausalLM")
    screen.table(name, ["", name], [[name, "1"]], to=console)
    console.print(name, soft_wrap=True)
    assert not FORBIDDEN & set(shown.getvalue())
    if name.isprintable() and not FORBIDDEN & set(name):
        assert shown.getvalue().count(name) == 5


@pytest.mark.parametrize("name", NAMES)
def test_plots_and_notebooks_stay_well_formed(name):
    for svg in (experts_plot([Series(name, [1, 2], [2.0, 1.9], [0.1, 0.1])], reference=(name, 2.1)),
                wealth_plot([1.0, 2.0], [0.5, 0.1], alpha=0.05, beta=0.1, names=(name, name))):  # fmt: skip
        assert not FORBIDDEN & set(svg)
        assert not [one for one in ET.fromstring(svg).iter() if one.tag.endswith("script")]
    draw_records()
    drawn = seed_of(name)._repr_html_() or ""
    assert "<script" not in drawn
    assert not FORBIDDEN & set(drawn)
    page = html(Report(title=name, lineage=(Ancestor(depth=0, kind=name, digest="a" * 64),), facts={name: name}))
    assert "<script" not in page
    assert not FORBIDDEN & set(page)
