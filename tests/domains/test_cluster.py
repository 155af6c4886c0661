"""Balanced k-means: the cheapest assignment of equal sizes, as good as scikit-learn's, whatever the blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from elmwood.domains import cluster
from elmwood.errors import BadInput


def cost_of(cost_KN, label_N):
    return cost_KN[label_N, np.arange(len(label_N))].sum(dtype=np.float64)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 2**32 - 1), st.sampled_from(["normal", "ties", "lopsided"]))
def test_assignment_is_the_cheapest_of_equal_sizes(k, more, rng_seed, kind):
    n = k + more
    rng = np.random.default_rng(rng_seed)
    cost_KN = rng.normal(size=(k, n)).astype(np.float32)
    if kind == "ties":
        cost_KN = np.round(cost_KN)
    if kind == "lopsided":
        cost_KN[0] -= 10
    label_N, _ = cluster.assign_balanced(cost_KN)
    low = n // k
    slots = np.concatenate([np.repeat(np.arange(k), low), np.arange(k) if n % k else np.zeros(0, int)])
    padded = cost_KN[slots].astype(np.float64)
    padded[low * k :] += 1e4  # every domain first fills what it must have
    rows, columns = linear_sum_assignment(padded)
    best_N = np.empty(n, int)
    best_N[columns] = slots[rows]
    sizes = np.bincount(label_N, minlength=k)
    assert sizes.max() - sizes.min() <= 1
    assert cost_of(cost_KN, label_N) <= cost_of(cost_KN, best_N) + 1e-4


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (103, 7), (500, 16), (511, 16)])
def test_balanced_sizes_differ_by_at_most_one(n, k):
    x_ND = np.random.default_rng(0).normal(size=(n, 4))
    found = cluster.kmeans(x_ND, k)
    assert max(found.sizes) - min(found.sizes) <= 1
    again = cluster.kmeans(x_ND, k)
    np.testing.assert_array_equal(found.centroid_KD, again.centroid_KD)
    own = np.square(x_ND - np.array([x_ND[found.label_N == label].mean(0) for label in range(k)])[found.label_N]).sum(1).mean()
    assert found.objective == pytest.approx(own, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("size_K", [[9, 9, 2], [1, 1, 18]])
def test_assignment_is_the_cheapest_of_given_sizes(size_K):
    cost_KN = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    label_N, _ = cluster.assign_balanced(cost_KN, size_K=np.array(size_K))
    slots = np.repeat(np.arange(3), size_K)
    rows, columns = linear_sum_assignment(cost_KN[slots])
    assert np.bincount(label_N, minlength=3).tolist() == size_K
    assert cost_of(cost_KN, label_N) == pytest.approx(cost_KN[slots][rows, columns].sum(), abs=1e-4)


@pytest.mark.parametrize(("n", "k"), [(500, 23), (511, 100)])
def test_many_domains_are_found_in_groups(n, k, monkeypatch):
    x_ND = blobs(n, np.random.default_rng(0))
    flat = cluster.kmeans(x_ND, k)
    monkeypatch.setattr(cluster, "MANY", 10)
    found = cluster.kmeans(x_ND, k)
    assert max(found.sizes) - min(found.sizes) <= 1
    assert flat.objective < found.objective < 1.2 * flat.objective
    np.testing.assert_allclose(found.centroid_KD, [x_ND[found.label_N == label].mean(0) for label in range(k)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("balanced", [True, False])
def test_no_domain_is_empty(balanced):
    x_ND = np.zeros((20, 3), np.float32)
    x_ND[0] = 1
    assert min(cluster.kmeans(x_ND, 5, balanced=balanced).sizes) >= 1
    with pytest.raises(BadInput, match="21 domains of 20 documents"):
        cluster.kmeans(x_ND, 21)


def blobs(n, rng):
    x_ND = rng.normal(size=(20, 8))[rng.integers(20, size=n)] + 0.4 * rng.normal(size=(n, 8))
    return x_ND.astype(np.float32)


def test_plain_clusters_are_as_good_as_scikit_learns():
    x_ND = blobs(3000, np.random.default_rng(0))
    theirs = KMeans(10, n_init=1, random_state=0).fit(x_ND).inertia_ / len(x_ND)
    assert cluster.kmeans(x_ND, 10, balanced=False).objective < 1.02 * theirs


@pytest.mark.parametrize("balanced", [True, False])
def test_neither_blocks_nor_their_order_decide(balanced, monkeypatch, tmp_path):
    x_ND = blobs(3000, np.random.default_rng(0))
    whole = cluster.kmeans(x_ND, 6, balanced=balanced)
    monkeypatch.setattr(cluster, "BLOCK", 1000)
    start_KD = whole.centroid_KD
    on_disk = np.memmap(tmp_path / "x", np.float32, "w+", shape=x_ND.shape)
    on_disk[:] = x_ND
    for x, rng_seed in ((on_disk, 0), (x_ND[::-1], 0), (x_ND, 1)):
        found = cluster.kmeans(x, 6, balanced=balanced, rng_seed=rng_seed, start_KD=start_KD)
        np.testing.assert_allclose(found.centroid_KD, start_KD, atol=0.1)
        assert found.objective == pytest.approx(whole.objective, rel=0.01)
        assert not balanced or max(found.sizes) - min(found.sizes) <= 1


def test_progress_says_which_trial_runs_and_moves_within_it():
    events: list[tuple[str, float]] = []
    cluster.kmeans(np.random.default_rng(0).normal(size=(300, 5)), 4, progress=lambda what, done, *_: events.append((what, done)))
    trials = [done for what, done in events if what == "try starts"]
    assert trials == sorted(trials)
    assert {*range(cluster.STARTS + 1)} <= {*trials}
    assert len({*trials}) > 2 * cluster.STARTS
    assert list(dict(events)) == ["try starts", "cluster", "equal sizes"]
