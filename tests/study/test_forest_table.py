"""`elmwood table` on a real forest: no model runs twice, every router has a table, and what is missing is bounded."""

import shutil

import numpy as np
import pytest
from tiny_models import lora_expert, tiny_seed
from topics import SENTENCES, build_corpus, some_sentences

from elmwood.domains.partition import partition as divide
from elmwood.domains.route import ROUTERS
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, Damaged
from elmwood.evaluate.columns import round_to_half, run
from elmwood.evaluate.holdout import HoldoutSpec
from elmwood.records import Ensemble, Forest, Score
from elmwood.store import Store
from elmwood.study.quality.evaluation import evaluate
from elmwood.study.quality.forest_table import table
from elmwood.study.quality.scoring import Columns, ensure
from elmwood.study.quality.snapshots import measure


class Grown:
    """A store with a forest of two experts, and one that may join."""

    def __init__(self, root, ensemble, candidate):
        self.store, self.ensemble, self.candidate = Store(root), ensemble, candidate

    def table(self, **options):
        return table(self.ensemble, self.store, workers=1, **options)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subsets")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_sentences(SENTENCES[:2], 20, 4), holdout=0.4)
    partition = divide(corpus, store, domains=2)
    seed = tiny_seed(store)
    experts = [lora_expert(seed, store, rng_seed=k, partition=partition.digest, domain=k % 2) for k in range(3)]
    forest = Forest(seed=seed.digest, partition=partition.digest, experts=tuple(one.digest for one in experts[:2]))
    ensemble = Ensemble(forest=forest.digest, top_k=1)
    for record in (forest, ensemble):
        store.add(record)
    return Grown(store.root, ensemble.digest, experts[2].digest)


@pytest.fixture
def elsewhere(grown, tmp_path):
    """The same in another store, where no model has been run."""
    shutil.copytree(grown.store.root, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("done", "work"), symlinks=True)
    return Grown(tmp_path / "elsewhere", grown.ensemble, grown.candidate)


def test_adapters_over_one_copy_of_their_seed_score_as_alone(elsewhere):
    store = elsewhere.store
    forest = store.load(store.load(elsewhere.ensemble, Ensemble).forest, Forest)
    columns = Columns(HoldoutSpec(partition=forest.partition, seed=forest.seed, length=64), store)
    models = [*forest.experts, elsewhere.candidate]
    found = ensure([("", digest) for digest in [*models, forest.seed]], columns)
    assert found.run == 4
    for digest in models:
        alone_N = round_to_half(run(open_model(store.load(digest), store), found.holdout))
        np.testing.assert_array_equal(found.columns[digest], alone_N)


def test_a_model_runs_once(grown):
    """Known columns are only read; missing entries are bounded, and near columns suffice where they alone have weight."""
    near = grown.table(near=1)
    assert 0 < near.cost.known < 1
    assert near.routed.least <= near.routed.loss.value <= near.routed.most + 1e-9
    full = grown.table(candidate=grown.candidate)
    assert full.cost.models_run > 0
    assert full.routed.loss.value == pytest.approx(near.routed.loss.value, abs=1e-4)  # the nearest alone has weight
    assert full.candidates[0].tokens > 0
    again = grown.table(candidate=grown.candidate)
    assert again.cost.tokens == 0
    assert again.static == full.static


def test_a_budget_of_tokens_is_kept_and_gone_on_from(elsewhere, grown):
    whole = grown.table()
    column = next(one for digest in grown.store.records() if isinstance(one := grown.store.load(digest), Score) and one.windows is None)
    with pytest.raises(BadInput, match="column of the seed"):
        elsewhere.table(budget=column.tokens // 2)
    some = elsewhere.table(budget=str(2 * column.tokens))
    assert 0 < some.cost.tokens <= 2 * column.tokens
    assert 0 < some.cost.known < 1
    for value in (some.routed.loss.value, whole.routed.loss.value):
        assert some.routed.least <= value <= (some.routed.most or np.inf)  # none: a missing entry may have all the weight
    rest = elsewhere.table()
    assert rest.cost.tokens == some.cost.missing
    assert rest.routed.loss.value == pytest.approx(whole.routed.loss.value, abs=1e-5)


def test_a_budget_of_no_seconds_runs_nothing(elsewhere, grown):
    with pytest.raises(BadInput, match="column of the seed"):
        elsewhere.table(seconds=0)
    grown.table()
    assert grown.table(seconds=0).cost.tokens == 0


def test_columns_of_another_store_are_taken_over_and_looked_at(elsewhere, grown):
    whole = grown.table()
    brought = elsewhere.table(source=grown.store.root)
    assert (brought.cost.tokens, brought.cost.brought) == (0, 3)
    assert brought.routed == whole.routed
    assert elsewhere.table(source=grown.store.root).cost.brought == 0


def test_what_another_store_has_broken_is_refused(elsewhere, grown, tmp_path):
    grown.table()
    shutil.copytree(grown.store.root, tmp_path / "broken", symlinks=True)
    broken = Store(tmp_path / "broken")
    for digest in list(broken.records()):
        if isinstance(one := broken.load(digest), Score):
            blob = bytearray(broken.get(one.loglik).read_bytes())
            blob[-2] ^= 1
            broken.path(one.loglik).write_bytes(bytes(blob))
    with pytest.raises(Damaged):
        elsewhere.table(source=broken.root)


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_has_a_table_that_agrees_with_the_running_ensemble(grown, router):
    forest = grown.store.load(grown.ensemble, Ensemble).forest
    ensemble = Ensemble(forest=forest, router=router, top_k=2, temperature=0.3, seed_distance=1.2)
    made = table(ensemble, grown.store, workers=1)
    (row,) = evaluate(ensemble, grown.store, workers=1).record.rows
    assert made.routing.router == router
    assert made.routed.loss.value == pytest.approx(row.bits_per_byte, abs=2e-5)
    assert made.routed.least <= made.routed.loss.value + 1e-9
    assert made.routed.most >= made.routed.loss.value - 1e-9


def test_with_a_memory_missing_entries_leave_no_bounds(elsewhere):
    ensemble = Ensemble(forest=elsewhere.store.load(elsewhere.ensemble, Ensemble).forest, router="live", top_k=1)
    made = table(ensemble, elsewhere.store, near=1, workers=1)
    assert made.cost.known < 1
    assert (made.routed.least, made.routed.most) == (None, None)


@pytest.mark.parametrize("option", ["choose", "near", "top_k"])
def test_numbers_out_of_range_are_refused(grown, option):
    with pytest.raises(BadInput, match="is 0: choose 1 or more"):
        grown.table(**{option: 0})


def test_snapshots_are_measured_from_the_columns_of_their_experts(grown):
    """A forest that grew by one expert: the losses are those of the table, the gains those over the same documents."""
    whole = grown.store.load(grown.ensemble)
    forest = grown.store.load(whole.forest)
    grown.store.add(first := forest.model_copy(update={"experts": forest.experts[:1]}))
    grown.store.add(before := whole.model_copy(update={"forest": first.digest, "router": "live", "seed_distance": 1.0}))
    found = measure([before, grown.ensemble], grown.store, control=grown.candidate)
    shown = grown.table()
    one, both = found.ensembles
    assert both.loss.value == pytest.approx(shown.routed.loss.value, abs=1e-5)  # other batches, other sums
    assert found.seed.value == pytest.approx(shown.seed.value, abs=1e-5)
    assert one.loss.value != both.loss.value
    for row in (one, both):
        assert row.over_seed.value == pytest.approx(found.seed.value - row.loss.value, abs=1e-9)
        assert row.over_control.value == pytest.approx(found.control.value - row.loss.value, abs=1e-9)
    assert measure([before], grown.store).control is None
