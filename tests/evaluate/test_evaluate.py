"""Evaluate: the holdout, columns scored once, and the arithmetic of the table."""

import shutil
import tempfile
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_models import tiny_seed

from elmwood.corpus.build import build, documents
from elmwood.domains.partition import partition as divide
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, Damaged
from elmwood.evaluate.columns import RUN, column, encode, open_tensors, round_to_half
from elmwood.evaluate.holdout import AUDITED, GATE, TUNE, HoldoutSpec, blocks, halve, open_holdout
from elmwood.evaluate.losses import bits_per_byte, block_nats, mix, nats
from elmwood.evaluate.losses import difference as paired_difference
from elmwood.evaluate.partial import Partial, bring, claimed, task_names
from elmwood.evaluate.partial import score as score_model
from elmwood.lm.files import tokenizer
from elmwood.records import Ensemble, Score, fingerprint
from elmwood.store import Store

K = 3


def spec(partition, seed, **fields):
    return HoldoutSpec(partition=partition.digest, seed=seed.digest, **{"length": 48, **fields})


def difference(one, two, holdout):
    return paired_difference(one, two, holdout, ~holdout.tune_D)


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
    other = open_holdout(spec(random, seed), store)
    assert other.name == held.name
    assert (other.document_N == held.document_N).all()
    assert (other.domain_D != held.domain_D).any()
    assert open_holdout(spec(partition, seed, length=40), store).name != held.name


def test_fewer_documents_are_a_fixed_choice_of_all(grown, held):
    store, partition, seed, _ = grown
    few = open_holdout(spec(partition, seed, documents=8), store)
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
        open_holdout(spec(partition, seed), store)


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
    assert block_nats(loglik_N, held).sum() == pytest.approx(-loglik_N.sum())


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
    score = score_model(seed, lambda: pytest.fail("opened again"), held, store)
    assert score.tokens == len(held.document_N)
    assert score.nats == pytest.approx(nats(columns[0], held).sum())
    with pytest.raises(Damaged, match="score the model again"):
        column(score, held._replace(name="holdout-other"), store)


def test_ensembles_scored_by_the_window_are_scored_again(grown, held):
    """Under the rules of an older elmwood; experts and seeds keep their Scores."""
    _, _, seed, _ = grown
    ensemble = Ensemble(forest="0" * 64)
    assert task_names(seed, held.name) == [fingerprint(kind, seed.digest, held.name) for kind in ("score", "partial")]
    assert task_names(ensemble, held.name)[0] != fingerprint("score", ensemble.digest, held.name)


def test_a_complete_column_is_a_read_only_memory_map_of_its_blob(grown, held, columns):
    store, _, seed, _ = grown
    made = score_model(seed, lambda: pytest.fail("opened again"), held, store)
    loglik_N = column(made, held, store)
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
    parts = open_tensors(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < path.stat().st_size / 10
    assert {name: (one.dtype, len(one)) for name, one in parts.items()} == {"loglik": (np.float16, 500_000), "windows": (np.uint32, 7)}
    for broken in (path.read_bytes()[:-1], b"", b"\xff" * 40):
        path.with_suffix(".broken").write_bytes(broken)
        with pytest.raises(Damaged, match="score the model again"):
            open_tensors(path.with_suffix(".broken"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2000))
def test_two_bytes_a_token_keep_every_sum(rng_seed, tokens):
    rng = np.random.default_rng(rng_seed)
    loglik_N = -rng.gamma(0.5, 8.0, tokens) * rng.integers(0, 2, tokens)
    kept_N = round_to_half(loglik_N)
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
    assert (column(old, held, store) == loglik_N).all()


def test_a_run_killed_before_its_score_was_kept_leaves_the_same_score(grown, held, columns, tmp_path):
    """All windows are scored, and nothing was sealed: the next to open the column finds what an undisturbed run keeps."""
    seed, store = grown[2], Store(tmp_path)
    Partial(seed, lambda: open_model(seed, grown[0], "cpu"), held, store).fill(np.arange(len(held.count_W)))
    again = Partial(seed, lambda: pytest.fail("opened again"), held, store)
    assert again.score == score_model(seed, lambda: pytest.fail("opened again"), held, store)
    assert again.loglik_N.dtype == columns[0].dtype
    assert (again.loglik_N == columns[0]).all()


def test_two_at_the_same_score_end_in_the_same(grown, held, tmp_path, monkeypatch):
    """One keeps the whole Score, and removes what it was made from, while another looks at that, and another adds to it."""
    seed, store, every = grown[2], Store(tmp_path), np.arange(len(held.count_W))
    load_file, mkstemp = safetensors.numpy.load_file, tempfile.mkstemp

    def lm():
        return open_model(seed, grown[0], "cpu")

    first, second = Partial(seed, lm, held, store), Partial(seed, lm, held, store)
    first.fill(every)
    monkeypatch.setattr(safetensors.numpy, "load_file", lambda path: (first.seal(), load_file(path))[1])
    third = Partial(seed, lm, held, store)
    monkeypatch.setattr(tempfile, "mkstemp", lambda dir, suffix: (shutil.rmtree(dir), mkstemp(dir=dir, suffix=suffix))[1])
    for one in (second, third):
        one.fill(every)
    monkeypatch.undo()
    assert first.seal() == second.seal() == third.seal()


def test_windows_come_one_by_one_and_nothing_is_run_twice(grown, held, columns, tmp_path):
    _, _, seed, _ = grown
    store, grown_store = Store(tmp_path), grown[0]
    model = tiny_seed(store)
    one = Partial(model, lambda: open_model(model, store, "cpu"), held, store)
    one.fill(np.array([3, 1]))
    first = one.seal()
    assert first.windows == 2
    loglik_N = column(first, held, store)
    there_N = np.isin(held.window_N, [1, 3])
    assert np.isnan(loglik_N[~there_N]).all()
    np.testing.assert_allclose(loglik_N[there_N], columns[0][there_N], atol=0.01)
    again = Partial(model, lambda: pytest.fail("opened again"), held, store)
    again.fill(np.array([1, 3]))
    assert bring([seed], held, grown_store, store) == 0  # what is here stays
    other = Store(tmp_path / "other")
    assert bring([seed], held, grown_store, other) == 1
    score = score_model(seed, lambda: pytest.fail("opened again"), held, other)
    assert score.windows is None
    assert (column(score, held, other) == columns[0]).all()
    whole = score_model(model, lambda: open_model(model, store, "cpu"), held, store)
    assert (whole.tokens, whole.windows) == (len(held.document_N), None)


def test_a_column_from_elsewhere_is_looked_at(grown, held, tmp_path):
    _, _, seed, _ = grown
    source = Store(tmp_path / "source")
    false = Score(model="0" * 64, holdout=held.name, protocol=held.protocol, loglik=source.put(b"x"), tokens=1, nats=0.0)
    source.finish(fingerprint("score", seed.digest, held.name), false)
    with pytest.raises(Damaged, match="here instead"):
        bring([seed], held, source, Store(tmp_path / "mine"))


@pytest.mark.parametrize("claim", ["positive", "nan", "infinite", "short", "tokens", "nats", "protocol", "twice"])
def test_a_column_that_could_not_be_true_is_refused_with_rule_value_and_cure(claim, grown, held, columns, tmp_path):
    _, _, seed, _ = grown
    source, mine = Store(tmp_path / "source"), Store(tmp_path / "mine")
    loglik_N, fields = np.array(columns[0], np.float32), {}
    if claim in ("positive", "nan", "infinite"):
        loglik_N[7] = {"positive": 5.0, "nan": np.nan, "infinite": -np.inf}[claim]
    parts = {"loglik": loglik_N[:-1] if claim == "short" else loglik_N}
    if claim == "twice":  # the first window, claimed twice
        parts = {"loglik": loglik_N[: held.count_W[0]], "windows": np.array([0, 0], np.uint32)}
        fields["windows"] = 2
    fields["tokens"] = len(parts["loglik"]) + (claim == "tokens")
    fields["nats"] = -float(np.nan_to_num(parts["loglik"], neginf=0).sum()) + 100 * (claim == "nats")
    protocol = "windows-v0" if claim == "protocol" else held.protocol
    blob = source.put(safetensors.numpy.save(parts))
    source.finish(task_names(seed, held.name)[0], Score(model=seed.digest, holdout=held.name, protocol=protocol, loglik=blob, **fields))
    with pytest.raises(Damaged, match=r"finite and at most 0|here are|here instead|score the model again") as refused:
        bring([seed], held, source, mine)
    if claim == "positive":
        assert "+5" in str(refused.value)
    assert not mine.has(blob)


def test_what_another_scored_is_a_claim_and_a_bad_one_is_scored_again(grown, held, tmp_path):
    store, _, seed, _ = grown
    mine = Store(tmp_path)
    shutil.copytree(store.root / "blobs", mine.root / "blobs", symlinks=True)
    mine.add(seed)
    assert bring([seed], held, store, mine) == 1
    assert claimed([seed.digest], held.name, mine) == [seed.digest]
    assert claimed([seed.digest], held.name, store) == []
    bad = np.full(int(held.count_W.sum()), 5, np.float32)
    record = Score(model=seed.digest, holdout=held.name, protocol=held.protocol, loglik=mine.put(safetensors.numpy.save({"loglik": bad})),
                   tokens=len(bad), nats=-float(bad.sum()))  # fmt: skip
    mine.finish(task_names(seed, held.name)[0], record)
    again = score_model(seed, lambda: open_model(seed, mine, "cpu"), held, mine)
    assert again.nats > 0
    assert claimed([seed.digest], held.name, mine) == []


# ---- table


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_mixing(experts, rng_seed):
    rng = np.random.default_rng(rng_seed)
    loglik_NE, weight_NE = -50 * rng.random((20, experts)), rng.dirichlet(np.ones(experts), 20)
    expected = np.log((np.exp(loglik_NE) * weight_NE).sum(1))
    np.testing.assert_allclose(mix(loglik_NE, weight_NE), expected)
    np.testing.assert_allclose(mix(np.repeat(loglik_NE[:, :1], experts, 1), weight_NE), loglik_NE[:, 0])
    one_hot = np.eye(experts)[rng.integers(experts, size=20)]
    np.testing.assert_allclose(mix(loglik_NE, one_hot), (loglik_NE * one_hot).sum(1))


def test_an_unlikely_expert_without_weight_changes_nothing():
    assert mix(np.array([[-1e5, -3.0], [-1e5, -1e5]]), np.array([[0.0, 1.0], [1.0, 0.0]])).tolist() == [-3.0, -1e5]


def test_standard_errors_are_those_of_resampled_documents(held):
    rng = np.random.default_rng(1)
    documents = 400
    size_D = rng.integers(50, 500, documents)
    rate_D = rng.normal(2, 0.3, documents)
    wide = held._replace(document_N=np.arange(documents), bytes_D=size_D)
    all_D = np.ones(documents, bool)
    loss = bits_per_byte(-rate_D * size_D * np.log(2), wide, all_D)
    assert loss.value == pytest.approx((rate_D * size_D).sum() / size_D.sum())
    drawn = rng.integers(documents, size=(2000, documents))
    resampled = (rate_D * size_D)[drawn].sum(1) / size_D[drawn].sum(1)
    assert loss.standard_error == pytest.approx(resampled.std(), rel=0.1)


def test_a_difference_is_paired(held, columns):
    seed_N, expert_NK = columns
    both = difference(expert_NK[:, 0], seed_N, held)
    losses = [bits_per_byte(one, held, ~held.tune_D) for one in (expert_NK[:, 0], seed_N)]
    assert both.value == pytest.approx(losses[0].value - losses[1].value)
    assert difference(seed_N, seed_N, held) == (0, 0)
