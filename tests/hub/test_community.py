"""The story of the hub, small: real processes on this machine, of which two lie and one is killed, and everything that must come of it."""

import urllib.request

import pytest
from tiny_models import tiny_seed
from topics import SENTENCES, build_corpus, some_sentences

from elmwood.domains.partition import partition as divide
from elmwood.hub.demo.stage import Setting, play
from elmwood.store import Store

LETTERS = ("abcdef", "ghijkl", "mnopqr")
SMALL = Setting(
    domains=3, tokens=25 * 4 * 64, rank=4, learning_rate=2e-2, dense_rate=1e-3, seed_distance=0.99, patience_s=240, lag=2.0
)  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What happened, and what it came to; and the overview at the end."""
    folder = tmp_path_factory.mktemp("community")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_sentences(SENTENCES, 40, 30, LETTERS), holdout=0.6)
    partition = divide(corpus, store, domains=3)
    seed = tiny_seed(store)
    events, pages = [], []

    def look(found):
        pages.append(urllib.request.urlopen(found.url).read().decode())

    found = play(store, setting=SMALL, made=(seed, partition), on_event=events.append, keep=look)
    return found, events, pages[0]


def test_honest_experts_fill_every_domain_and_the_dishonest_are_refused_with_reasons(told):
    found, events, _ = told
    assert sorted(found.filled) == [0, 1, 2]
    assert set(found.filled.values()) <= {"ada", "bert", "carol"}
    assert found.refused == {"mallory": "no-gain", "trudy": "duplicate"}
    assert any("mallory’s submission was refused (no better than the seed on its own domain)" in line for line in events)


def test_the_killed_one_goes_on_and_the_retired_domain_is_trained_again(told):
    found, events, _ = told
    step, steps = found.resumed
    assert steps // 2 <= step < steps
    assert any("carol’s expert was accepted" in line for line in events)
    assert found.again == "bert"
    assert any("was retired (better-expert)" in line for line in events)


def test_the_page_shows_the_ensemble_passing_the_seed_and_where_it_stands_against_dense(told):
    found, _, page = told
    measured = found.measured
    assert measured.over_seed > 3 * measured.over_seed_error > 0
    assert measured.gain == pytest.approx(measured.control_bits_per_byte - measured.bits_per_byte, abs=1e-9)
    for part in (f"{measured.bits_per_byte:.3f}", f"± {measured.over_seed_error:.4f}", f"± {measured.gain_error:.4f}", "3<small>of 3"):
        assert part in page
