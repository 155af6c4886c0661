"""Report: one page that stands alone, whatever text is put into it."""

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elmwood.records import Contest, Row
from elmwood.report import Ancestor, Area, Curve, MapPoint, Report, domain_map, html, project
from elmwood.report.charts import Scale, draw_estimate, draw_losses
from elmwood.report.domain_map import HEIGHT, WIDTH, place_labels
from elmwood.report.formats import digits, signed, spell_time, tick_labels, ticks, with_prefix
from elmwood.report.lineage import tree

HOSTILE = "</title><script>alert('1')</script>\"'&<img src=x onerror=alert(2)>{{7*7}}"
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a page holds."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def row(name: str, loss: float, role: str = "result", **fields) -> Row:
    return Row(name=name, bits_per_byte=loss, standard_error=0.04, perplexity=40.0, role=role, domains=(loss, None), **fields)


def full(text: str = "") -> Report:
    """A report with every section, `text` wherever a reader's text can stand."""
    rng = np.random.default_rng(0)
    rows = (
        row(f"seed{text}", 2.3, "seed", gain=-0.02, gain_error=0.004),
        row(f"dense{text}", 2.28, "control", tokens=1_200_000, steps=600, batch=8, machine_seconds=66.0, wall_seconds=66.0),
        row("c-BTM top-1", 2.26, gain=0.02, gain_error=0.004, tokens=1_200_000),
        row("c-BTM top-2", 2.25, gain=0.03, gain_error=0.004),
        row("oracle routing", 2.24, "bound", gain=0.04, gain_error=0.005),
    )
    areas = [Area(name=f"d{k}", terms=(f"term{k}{text}", "b", "c", "d"), fitted=20, documents=20 + k, bytes=10**6) for k in range(2)]
    seed = Ancestor(depth=1, kind="seed", digest="a" * 64)
    experts = [Ancestor(depth=1, kind="expert", digest=f"{n}" * 64) for n in range(9)]
    again = seed.model_copy(update={"depth": 2})
    roles = ((None, "seed"), (0, "expert"), (1, "expert"))
    return Report(
        title=f"A title{text}",
        summary=f"A summary{text}",
        domains=tuple(area.model_copy(update={"snippets": (f"snippet{text}",)}) for area in areas),
        places=tuple(MapPoint(x=x, y=y, domain=n % 2, text=f"document{text}") for n, (x, y) in enumerate(rng.random((40, 2)))),
        curves=tuple(Curve(name=f"curve{k}{text}", role=role, domain=k, points=((100, 4.0), (200, 3.5))) for k, role in roles),
        rows=rows,
        chosen="c-BTM top-2",
        routing=((0.9, 0.1, 0.0), (0.2, 0.7, 0.1)),
        growth=((2.29, 0.04), (2.25, 0.03)),
        contests=(
            Contest(
                a="a" * 64,
                b="b" * 64,
                names=(f"old{text}", "new"),
                holdout="holdout-x",
                protocol="p",
                outcome="better",
                estimand="mean",
                effect=0.01,
                low=0.002,
                high=0.03,
                drawn=32,
                touched=100,
                blocks=1000,
                alpha=0.05,
                beta=0.1,
                min_effect=0.002,
                cap=50,
                clip=0.5,
                order="o",
                wealth=((1, 0.1, -0.1), (32, 1.4, -2.0)),
            ),
        ),
        lineage=(
            Ancestor(depth=0, kind="forest", digest="f" * 64, summary=f"forest{text}"),
            seed,
            *(record for expert in experts for record in (expert, again)),
        ),
        facts={"machine": f"2 cores{text}"},
    )


def test_the_page_stands_alone_and_shows_everything():
    report = full()
    made = html(report)
    page = Page(made)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=|<script|<link", made)
    for one in report.rows:
        assert one.name in page.text
        assert f"{one.bits_per_byte:.3f}" in page.text
    for words in (
        "A title",
        "A summary",
        "term0",
        "snippet",
        "curve1",
        "ffffffffff",
        "1.2\N{NO-BREAK SPACE}M",
        "1 min 6 s",
        "2 cores",
        "reference",
        "Number of experts",
        "new is better than old",
        "32 of 100 drawn",
    ):
        assert words in page.text, words
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert all(
        attrs.get("aria-label") or attrs.get("aria-hidden") or "svg" not in tag for tag, attrs in page.tags if attrs.get("role") == "img"
    )


def test_hostile_text_stays_text():
    page = Page(html(full(HOSTILE)))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count("alert('1')") >= 8
    ET.fromstring(domain_map(full(HOSTILE).domains, full(HOSTILE).places, alone=True))


def test_empty_sections_are_left_out():
    page = Page(html(Report(title="Nothing yet")))
    assert [tag for tag, _ in page.tags].count("section") == 0
    assert "Result" not in page.text


def test_one_model_alone_is_a_table_too():
    page = Page(html(Report(title="One", rows=(row("seed", 2.3, "seed"),))))
    assert "2.300" in page.text
    assert "gain" not in page.text


def test_five_rows_come_first():
    """The seed, the strongest control, random clusters, the result and the bound, each with what it is."""
    report = full()
    random = row("random clusters, sparse routing", 2.27, "control", gain=0.01, gain_error=0.004)
    dense = report.rows[1].model_copy(update={"gain": None})
    rows = (report.rows[0], dense, random, *report.rows[2:])
    text = Page(html(report.model_copy(update={"rows": rows}))).text
    shown = text[text.index("as many tokens.") : text.index("Domains")]
    names = ["seedthe small", "dense", "random clusters, sparse routing", "c-BTM top-2", "oracle routing"]
    assert sorted(names, key=shown.index) == names
    assert "c-BTM top-1" not in shown
    assert "each of which got random documents" in shown
    assert text.rindex("All models") > text.index("Domains")


def test_settings_of_rows_are_a_table():
    page = Page(html(full().model_copy(update={"facts": {"machine": "2 cores", "a: top_k": "2", "b: top_k": "3", "b: decay": "0.9"}})))
    assert "top k" in page.text
    assert "0.9" in page.text
    assert "a: top_k" not in page.text


def test_the_same_report_makes_the_same_page():
    assert html(full()) == html(Report.model_validate_json(full().model_dump_json()))


def test_a_map_alone_is_a_drawing_of_its_own():
    drawing = ET.fromstring(domain_map(full().domains, full().places, alone=True))
    assert drawing.attrib["width"] == str(WIDTH)
    assert "var(" not in ET.tostring(drawing, encoding="unicode")


@given(st.lists(st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT), st.floats(20, 300)), max_size=40))
def test_labels_never_overlap_and_stay_on_the_paper(wanted):
    found = place_labels([(x, y) for x, y, _ in wanted], [(width, 24.0) for _, _, width in wanted], np.zeros((1, 2)))
    boxes = [box for box in found if box]
    assert all(box.inside() for box in boxes)
    assert not any(a.meets(b) for place, a in enumerate(boxes) for b in boxes[:place])


def test_a_record_met_again_is_pointed_to():
    (root,) = tree(full().lineage)
    assert [node.record.kind for node in root.below] == ["seed", *["expert"] * 9]
    assert [record.kind for record in root.below[1].again] == ["seed"]
    assert root.below[1].below == []
    assert "3 more" in html(full())


def test_drawings_take_odd_numbers():
    assert "circle" in draw_estimate(1.0, None, Scale(1.0, 1.0), role="seed")
    assert "polyline" in draw_losses([Curve(name="one", role="seed", points=((0, 3.0),))], "one point")
    assert domain_map([Area(name="one")], [MapPoint(x=0.5, y=0.5, domain=0)]).count("<path") == 1


# ---- the plane


def test_near_neighbours_stay_near():
    rng = np.random.default_rng(0)
    x_ND = np.repeat(np.eye(3, 20), 30, axis=0) + 0.05 * rng.normal(size=(90, 20))
    place_N2 = project(x_ND)
    assert place_N2.min() == 0
    assert place_N2.max() == 1
    distance_NN = np.linalg.norm(place_N2[:, None] - place_N2, axis=2) + 9 * np.eye(90)
    assert (distance_NN.argmin(1) // 30 == np.arange(90) // 30).all()
    assert (project(x_ND) == place_N2).all()


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (2, 5), (5, 1), (13, 3)])
def test_few_documents_have_places(shape):
    for x_ND in (np.random.default_rng(0).random(shape), np.ones(shape)):
        place_N2 = project(x_ND)
        assert place_N2.shape == (shape[0], 2)
        assert ((place_N2 >= 0) & (place_N2 <= 1)).all()


# ---- numbers


def test_numbers_read_well():
    space = "\N{NO-BREAK SPACE}"
    assert [with_prefix(n) for n in (0, 12, 999, 1000, 1_234_567, 999_999, 7.5e9)] == [
        "0",
        "12",
        "999",
        f"1{space}k",
        f"1.23{space}M",
        f"1{space}M",
        f"7.5{space}G",
    ]
    assert [spell_time(s) for s in (0.5, 9.99, 59.7, 66, 120, 3725)] == ["0.5 s", "10 s", "60 s", "1 min 6 s", "2 min", "1 h 2 min"]
    assert [signed(x, 3) for x in (0.0123, -0.0123, -0.0001)] == ["+0.012", "−0.012", "0.000"]
    assert [digits(errors) for errors in ([0.041], [0.0042, None], [0.5], [], [1e-9])] == [3, 4, 2, 3, 4]
    assert tick_labels([-0.05, 0, 0.05]) == ["−0.05", "0.00", "0.05"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_inside_and_are_few(low, width):
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 12
    slack = 1e-6 * width + 4 * math.ulp(low)  # a range of a few units in the last place has no rounder numbers in it
    assert all(low - slack <= value <= low + width + slack for value in found)
    assert len(set(found)) == len(found)


def test_routing_of_many_experts_is_one_image_and_grows_with_them_alone():
    """Cells are drawn where their weight is, by one path for each shade."""
    sizes = {}
    for count in (100, 200):
        weights = np.full((count, count + 1), 0.2 / count)
        weights[np.arange(count), np.arange(count)] = 0.7
        weights[3, 3], weights[3, 7] = 0.0, 0.7
        areas = tuple(Area(name=f"domain {k}", documents=1) for k in range(count))
        made = html(full().model_copy(update={"domains": areas, "places": (), "routing": tuple(map(tuple, weights.tolist()))}))
        (svg,) = re.findall(r'<svg class="matrix".*?</svg>', made, re.S)
        drawn = {(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", svg)}
        assert drawn == {(k, k) for k in range(count) if k != 3} | {(7, 3)}
        assert svg.count("<path") == 1
        assert "expert 8 70.0%" in made  # beside the image, as the domain whose own expert has least
        sizes[count] = len(made)
    assert sizes[200] < 2.2 * sizes[100]


def test_contests_of_others_stand_apart():
    report = full()
    page = Page(html(report.model_copy(update={"contests": (), "claims": report.contests * 30})))
    assert "Claimed by others, not checked here" in page.text
    assert "And 10 more" in page.text
    assert "Claimed by others" not in Page(html(report)).text
