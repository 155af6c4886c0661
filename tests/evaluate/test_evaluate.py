"""Evaluate: the holdout, columns scored once, and the arithmetic of the table."""

import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_models import full_expert, lora_expert, tiny_seed

from elmwood import evaluate
from elmwood.corpus.build import build, documents
from elmwood.domains.partition import partition as divide
from elmwood.domains.route import posterior_scores
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, Damaged
from elmwood.evaluate.calibrate import minimise, weights
from elmwood.evaluate.columns import RUN, encode, mapped, rounded, run
from elmwood.evaluate.comparison import top_ks
from elmwood.evaluate.holdout import AUDITED, GATE, TUNE, blocks, halve
from elmwood.evaluate.losses import nats
from elmwood.lm.files import tokenizer
from elmwood.records import Ensemble, Forest, Score, fingerprint
from elmwood.store import Store

TOPICS = ("the {0} sailed over the sea with captain {1}", "def {0}(path): return open({1}).read()", "le {0} mange une pomme — {1} aussi")
K = len(TOPICS)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A store with a partition of three topics, a tiny seed and an expert of each domain."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    for n in range(60):
        sentences = (TOPICS[n % K].format(*("".join(rng.choice(list("abcdefghij"), 4)) for _ in range(2))) for _ in range(6))
        (folder / "text" / f"{n}.txt").write_text(". ".join(sentences))
    store = Store(folder / "store")
    partition = divide(build([str(folder / "text")], store, holdout=0.4), store, domains=K)
    seed = tiny_seed(store)
    experts = [(full_expert if k == 0 else lora_expert)(seed, store, rng_seed=k, partition=partition.digest, domain=k) for k in range(K)]
    return store, partition, seed, experts


@pytest.fixture(scope="module")
def held(grown):
    store, partition, seed, _ = grown
    return evaluate.holdout(spec(partition, seed), tokenizer(seed, store), store)


@pytest.fixture(scope="module")
def columns(grown, held):
    """The seed's column [N] and the experts' [N, K]."""
    store, _, seed, experts = grown
    found = [
        evaluate.column(evaluate.score(model, lambda model=model: open_model(model, store, "cpu"), held, store), held, store)
        for model in (seed, *experts)
    ]
    return found[0], np.column_stack(found[1:])


def spec(partition, seed, **fields):
    return evaluate.HoldoutSpec(partition=partition.digest, seed=seed.digest, **{"length": 48, **fields})


def difference(one, two, holdout):
    return evaluate.difference(one, two, holdout, ~holdout.tune_D)


# ---- holdout


def test_every_held_out_byte_and_token_is_counted_once(grown, held):
    store, partition, seed, _ = grown
    texts = [document.text for domain in partition.domains for document in documents(domain.holdout, store)]
    assert sorted(held.bytes_D) == sorted(len(text.encode()) for text in texts)
    encoded = tokenizer(seed, store).encode_batch(texts)
    assert sorted(np.bincount(held.document_N)) == sorted(len(one.ids) for one in encoded)
    assert held.scored_WL.sum() == len(held.document_N)
    assert held.protocol == "windows-v1:length=48,carry=12"


def test_another_partition_of_the_corpus_shares_the_columns(grown, held):
    store, partition, seed, _ = grown
    random = divide(store.load(partition.corpus), store, domains=K, method="random")
    other = evaluate.holdout(spec(random, seed), tokenizer(seed, store), store)
    assert other.name == held.name
    assert (other.document_N == held.document_N).all()
    assert (other.domain_D != held.domain_D).any()
    assert evaluate.holdout(spec(partition, seed, length=40), tokenizer(seed, store), store).name != held.name


def test_fewer_documents_are_a_fixed_choice_of_all(grown, held):
    store, partition, seed, _ = grown
    few = evaluate.holdout(spec(partition, seed, documents=8), tokenizer(seed, store), store)
    assert len(few.bytes_D) == 8
    assert set(few.bytes_D) <= set(held.bytes_D)
    assert few.name != held.name


def test_a_holdout_too_small_to_halve_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(12):
        (tmp_path / "text" / f"{n}.txt").write_text(f"the cat number {'abcdefghijkl'[n] * 4} sat on the mat")
    store = Store(tmp_path / "store")
    partition, seed = divide(build([str(tmp_path / "text")], store, holdout=0.01), store, domains=2), tiny_seed(store)
    with pytest.raises(BadInput, match="hold out a larger share"):
        evaluate.holdout(spec(partition, seed), tokenizer(seed, store), store)


@given(hnp.arrays(np.float64, st.integers(4, 30), elements=st.floats(0, 1, exclude_max=True)))
def test_each_half_has_two_documents(chance_D):
    tune_D = halve(chance_D)
    assert 2 <= tune_D.sum() <= len(chance_D) - 2
    if 2 <= (chance_D < 0.5).sum() <= len(chance_D) - 2:
        assert (tune_D == (chance_D < 0.5)).all()


def test_blocks_hold_every_byte_once_and_never_cross_a_split_or_a_domain(held):
    assert held.block_N.dtype == np.int64
    assert set(held.block_N) == set(range(len(held.split_B)))
    assert held.block_bytes_B.sum() == held.bytes_D.sum()
    domain_N, tune_N = held.domain_D[held.document_N], held.tune_N
    assert (held.block_domain_B[held.block_N] == domain_N).all()
    assert ((held.split_B == TUNE)[held.block_N] == tune_N).all()
    assert {TUNE, GATE, AUDITED} == set(held.split_B)
    for d in range(len(held.bytes_D)):
        assert len(set(held.split_B[held.block_N[held.document_N == d]])) == 1
    loglik_N = -np.random.default_rng(0).random(len(held.block_N))
    assert evaluate.block_nats(loglik_N, held).sum() == pytest.approx(-loglik_N.sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_blocks_are_equal_up_to_a_token(rng_seed, documents):
    rng = np.random.default_rng(rng_seed)
    size_D = rng.integers(1, 400, documents)
    document_N = np.repeat(np.arange(documents), size_D)
    length_N = rng.integers(1, 12, len(document_N))
    bytes_D = np.bincount(document_N, length_N).astype(np.int64)
    end_N = np.cumsum(length_N) - np.repeat(np.cumsum(bytes_D) - bytes_D, size_D)
    domain_D, split_D = rng.integers(0, 3, documents), rng.integers(0, 3, documents)
    made = blocks(document_N, end_N, bytes_D, domain_D, split_D)
    assert made.block_bytes_B.sum() == bytes_D.sum()
    for split in range(3):
        for domain in range(3):
            mine = (made.split_B == split) & (made.block_domain_B == domain)
            total = bytes_D[(split_D == split) & (domain_D == domain)].sum()
            assert made.block_bytes_B[mine].sum() == total
            if total:
                wanted = total / max(1, round(total / 2048))
                assert np.abs(made.block_bytes_B[mine] - wanted).max() <= 12


# ---- columns


def test_a_model_is_scored_once(grown, held, columns):
    store, _, seed, _ = grown
    score = evaluate.score(seed, lambda: pytest.fail("opened again"), held, store)
    assert score.tokens == len(held.document_N)
    assert score.nats == pytest.approx(nats(columns[0], held).sum())
    with pytest.raises(Damaged, match="score the model again"):
        evaluate.column(score, held._replace(name="holdout-other"), store)


def test_a_complete_column_is_a_read_only_memory_map_of_its_blob(grown, held, columns):
    store, _, seed, _ = grown
    made = evaluate.score(seed, lambda: pytest.fail("opened again"), held, store)
    loglik_N = evaluate.column(made, held, store)
    base = loglik_N
    while not isinstance(base, np.memmap):
        base = base.base
    assert base.filename == store.get(made.loglik)
    assert not loglik_N.flags.writeable
    np.testing.assert_array_equal(loglik_N, safetensors.numpy.load_file(store.get(made.loglik))["loglik"])


def test_opening_a_column_reads_its_header_alone(tmp_path):
    path = tmp_path / "column"
    path.write_bytes(encode(-np.random.default_rng(0).random(500_000), np.ones(7, bool)))
    tracemalloc.start()
    parts = mapped(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < path.stat().st_size / 10
    assert {name: (one.dtype, len(one)) for name, one in parts.items()} == {"loglik": (np.float16, 500_000), "windows": (np.uint32, 7)}
    for broken in (path.read_bytes()[:-1], b"", b"\xff" * 40):
        path.with_suffix(".broken").write_bytes(broken)
        with pytest.raises(Damaged, match="score the model again"):
            mapped(path.with_suffix(".broken"))


def test_the_table_equals_the_live_ensemble(grown, held, columns):
    """Token by token before rounding; on average, and so in bits per byte, as it is kept."""
    store, partition, seed, experts = grown
    forest = Forest(seed=seed.digest, partition=partition.digest, experts=tuple(one.digest for one in experts))
    store.add(forest)
    kept_NE = np.column_stack([columns[1], columns[0]])
    exact_NE = np.column_stack([run(open_model(one, store, "cpu"), held) for one in (*experts, seed)])
    dist2_NK = evaluate.distances(held, partition, store)
    for top_k, seed_distance in ((1, None), (2, 1.0), (4, 0.9)):
        live_N = run(
            open_model(Ensemble(forest=forest.digest, top_k=top_k, temperature=0.3, seed_distance=seed_distance), store, "cpu"), held
        )
        weight_NE = weights(dist2_NK, "centroid", top_k, 0.3, seed_distance)
        np.testing.assert_allclose(evaluate.mix(exact_NE, weight_NE), live_N, atol=1e-5)
        mixed_N = evaluate.mix(kept_NE, weight_NE)
        assert abs(mixed_N.mean() - live_N.mean(dtype=np.float64)) < 1e-5
        two = [evaluate.bits_per_byte(one_N, held, ~held.tune_D).value for one_N in (mixed_N, live_N)]
        assert abs(two[0] - two[1]) < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2000))
def test_two_bytes_a_token_keep_every_sum(rng_seed, tokens):
    rng = np.random.default_rng(rng_seed)
    loglik_N = -rng.gamma(0.5, 8.0, tokens) * rng.integers(0, 2, tokens)
    kept_N = rounded(loglik_N)
    assert kept_N.dtype == np.float16
    assert (kept_N <= 0).all()
    assert np.abs(kept_N - loglik_N).max() <= 2 * np.spacing(np.float16(np.abs(loglik_N).max() + 0.1))
    last = np.spacing(np.float16(np.abs(loglik_N).max() + 0.1))
    for start in range(0, tokens, RUN):
        assert abs(kept_N[start : start + RUN].astype(float).sum() - loglik_N[start : start + RUN].sum()) <= last


def test_columns_of_single_precision_stay_readable(grown, held, columns):
    store, _, seed, _ = grown
    loglik_N = columns[0].astype(np.float32)
    old = Score(
        model=seed.digest, holdout=held.name, protocol=held.protocol, tokens=len(loglik_N), nats=1.0,
        loglik=store.put(safetensors.numpy.save({"loglik": loglik_N})),
    )  # fmt: skip
    assert (evaluate.column(old, held, store) == loglik_N).all()


def test_windows_come_one_by_one_and_nothing_is_run_twice(grown, held, columns, tmp_path):
    _, _, seed, _ = grown
    store, grown_store = Store(tmp_path), grown[0]
    model = tiny_seed(store)
    one = evaluate.Partial(model, lambda: open_model(model, store, "cpu"), held, store)
    one.fill(np.array([3, 1]))
    first = one.seal()
    assert first.windows == 2
    loglik_N = evaluate.column(first, held, store)
    there_N = np.isin(held.window_N, [1, 3])
    assert np.isnan(loglik_N[~there_N]).all()
    np.testing.assert_allclose(loglik_N[there_N], columns[0][there_N], atol=0.01)
    again = evaluate.Partial(model, lambda: pytest.fail("opened again"), held, store)
    again.fill(np.array([1, 3]))
    assert evaluate.bring([seed], held, grown_store, store) == 0  # what is here stays
    other = Store(tmp_path / "other")
    assert evaluate.bring([seed], held, grown_store, other) == 1
    score = evaluate.score(seed, lambda: pytest.fail("opened again"), held, other)
    assert score.windows is None
    assert (evaluate.column(score, held, other) == columns[0]).all()
    whole = evaluate.score(model, lambda: open_model(model, store, "cpu"), held, store)
    assert (whole.tokens, whole.windows) == (len(held.document_N), None)


def test_a_column_from_elsewhere_is_looked_at(grown, held, tmp_path):
    _, _, seed, _ = grown
    source = Store(tmp_path / "source")
    false = Score(model="0" * 64, holdout=held.name, protocol=held.protocol, loglik=source.put(b"x"), tokens=1, nats=0.0)
    source.finish(fingerprint("score", seed.digest, held.name), false)
    with pytest.raises(Damaged, match="here instead"):
        evaluate.bring([seed], held, source, Store(tmp_path / "mine"))


# ---- table


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_mixing(experts, rng_seed):
    rng = np.random.default_rng(rng_seed)
    loglik_NE, weight_NE = -50 * rng.random((20, experts)), rng.dirichlet(np.ones(experts), 20)
    expected = np.log((np.exp(loglik_NE) * weight_NE).sum(1))
    np.testing.assert_allclose(evaluate.mix(loglik_NE, weight_NE), expected)
    np.testing.assert_allclose(evaluate.mix(np.repeat(loglik_NE[:, :1], experts, 1), weight_NE), loglik_NE[:, 0])
    one_hot = np.eye(experts)[rng.integers(experts, size=20)]
    np.testing.assert_allclose(evaluate.mix(loglik_NE, one_hot), (loglik_NE * one_hot).sum(1))


def test_an_unlikely_expert_without_weight_changes_nothing():
    assert evaluate.mix(np.array([[-1e5, -3.0], [-1e5, -1e5]]), np.array([[0.0, 1.0], [1.0, 0.0]])).tolist() == [-3.0, -1e5]


def test_standard_errors_are_those_of_resampled_documents(held):
    rng = np.random.default_rng(1)
    documents = 400
    size_D = rng.integers(50, 500, documents)
    rate_D = rng.normal(2, 0.3, documents)
    wide = held._replace(document_N=np.arange(documents), bytes_D=size_D)
    all_D = np.ones(documents, bool)
    loss = evaluate.bits_per_byte(-rate_D * size_D * np.log(2), wide, all_D)
    assert loss.value == pytest.approx((rate_D * size_D).sum() / size_D.sum())
    drawn = rng.integers(documents, size=(2000, documents))
    resampled = (rate_D * size_D)[drawn].sum(1) / size_D[drawn].sum(1)
    assert loss.standard_error == pytest.approx(resampled.std(), rel=0.1)


def test_a_difference_is_paired(held, columns):
    seed_N, expert_NK = columns
    both = difference(expert_NK[:, 0], seed_N, held)
    losses = [evaluate.bits_per_byte(one, held, ~held.tune_D) for one in (expert_NK[:, 0], seed_N)]
    assert both.value == pytest.approx(losses[0].value - losses[1].value)
    assert difference(seed_N, seed_N, held) == (0, 0)


# ---- fit


def test_minimise_finds_the_bottom():
    calls = []
    assert minimise(lambda x: calls.append(x) or (x - 0.3) ** 2, np.linspace(-1, 1, 9)) == pytest.approx(0.3, abs=0.01)
    assert len(calls) <= 20


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 4]))
def test_a_fit_is_never_worse_than_where_it_started(rng_seed, top_k):
    rng = np.random.default_rng(rng_seed)
    dist2_NK = 2 * rng.random((50, 3))
    loglik_NE = -5 * rng.random((50, 4))
    for router, signal_NS in (("centroid", dist2_NK), ("sparse", dist2_NK), ("posterior", posterior_scores(loglik_NE))):
        found = evaluate.fit(loglik_NE, signal_NS, top_k, router)
        assert found.router == router
        assert found.nats == pytest.approx(-evaluate.mix(loglik_NE, weights(signal_NS, *found[:4])).mean())
        for temperature in (0.3, 1.0, 10.0):
            assert found.nats <= -evaluate.mix(loglik_NE, weights(signal_NS, router, top_k, temperature, None)).mean() + 1e-3


def test_weights_have_a_column_for_the_seed_either_way():
    dist2_NK = np.array([[0.5, 1.0]])
    assert weights(dist2_NK, "centroid", 1, 0.1, None).tolist() == [[1, 0, 0]]
    assert weights(dist2_NK, "centroid", 1, 0.1, 0.2).tolist() == [[0, 0, 1]]
    score_NE = np.array([[-3.0, -4.0, -2.0]])  # nats, the seed last
    assert weights(score_NE, "posterior", 1, 1.0, None).tolist() == [[1, 0, 0]]
    assert weights(score_NE, "posterior", 1, 1.0, 0.9).tolist() == [[0, 0, 1]]
    assert weights(score_NE, "posterior", 1, 1.0, 1.1).tolist() == [[1, 0, 0]]


# ---- compare


def test_the_table_has_every_control(grown, held, columns):
    store, partition, _, _ = grown
    seed_N, expert_NK = columns
    cost = evaluate.Cost(batch=8, steps=10, tokens=300, machine_seconds=3.0, wall_seconds=1.0)
    sparse2_NK = evaluate.distances(held, partition, store, signal="sparse")
    side = evaluate.Side(expert_NK, evaluate.distances(held, partition, store), cost, sparse2_NK=sparse2_NK)
    dense = [evaluate.Control("dense", expert_NK[:, 1] + 0.1, cost), evaluate.Control("dense, large batch", expert_NK[:, 1])]
    made = evaluate.compare(held, seed_N, side, dense, random=side)
    named = {one.name: one for one in made.rows}
    assert [one.role for one in made.rows] == ["seed", *["control"] * 5, *["result"] * 5, "bound"]
    assert {"seed", "dense", "uniform routing", "random clusters, uniform", "c-BTM top-1", "c-BTM top-2", "c-BTM all"} <= set(named)
    assert named["dense"].gain is None
    assert named["dense, large batch"].gain < 0
    assert named["c-BTM top-1"].gain == pytest.approx(named["dense"].bits_per_byte - named["c-BTM top-1"].bits_per_byte)
    assert named["c-BTM top-1"].tokens == 300
    bytes_K = np.bincount(held.domain_D[~held.tune_D], held.bytes_D[~held.tune_D], K)
    for one in made.rows:
        assert len(one.domains) == K
        loss_K = np.array([value or 0.0 for value in one.domains])
        assert one.macro == pytest.approx(loss_K[bytes_K > 0].mean())
        assert one.bits_per_byte == pytest.approx(np.average(loss_K, weights=bytes_K))
    assert named["uniform routing"].bits_per_byte == named["random clusters, uniform"].bits_per_byte
    np.testing.assert_allclose(np.sum(made.routing, 1), 1)
    assert made.best in made.fits
    assert made.fitted["top_k"] == made.best.top_k
    assert [one.router for one in made.fits] == ["centroid"] * 3 + ["sparse", "posterior"]
    for name in ("sparse", "posterior"):
        asked = evaluate.compare(held, seed_N, side, router=name)
        assert asked.best.router == name
        assert asked.chosen.startswith(f"{name} routing")
        assert asked.fitted[f"{name} temperature"] == asked.fitted["temperature"] == asked.best.temperature
    assert made.best.router != "posterior"
    with pytest.raises(BadInput, match="routed by 'oracle'"):
        evaluate.compare(held, seed_N, side, router="oracle")


def test_settings_do_not_look_at_the_test_half(grown, held, columns):
    store, partition, _, _ = grown
    seed_N, expert_NK = columns
    dist2_NK = evaluate.distances(held, partition, store)
    spoiled_NK = np.where(held.tune_N[:, None], expert_NK, -9.0)
    fits = [evaluate.compare(held, seed_N, evaluate.Side(column, dist2_NK)).fits for column in (expert_NK, spoiled_NK)]
    assert fits[0] == fits[1]


def test_columns_of_another_holdout_are_refused(held, columns):
    seed_N, expert_NK = columns
    with pytest.raises(BadInput, match="score the model on this holdout"):
        evaluate.compare(held, seed_N[:-1], evaluate.Side(expert_NK, expert_NK))


def test_top_k_goes_as_far_as_there_are_experts():
    assert [top_ks(n) for n in (1, 2, 4, 6)] == [[2], [1, 3], [1, 2, 5], [1, 2, 4, 7]]
