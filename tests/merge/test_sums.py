"""Exact sums: the laws of integers, the compiled loops against numpy, rounding, and what is read past the cache."""

import math
import os
import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from elmwood.errors import BadInput
from elmwood.merge.rules.base import Local
from elmwood.merge.rules.elementwise import split_votes, trim
from elmwood.merge.sums.kth import Kth
from elmwood.weights import exact, kernels
from elmwood.weights.tensors import Files, ReadAhead, decode, encode, places


@given(st.lists(st.floats(-900, 900), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_sums_have_the_same_bits_in_any_order_and_addends_come_out_again(values, shuffle):
    def total(order, minus=()):
        total_N = np.zeros(1, np.int64)
        for sign, one in [*((1.0, v) for v in order), *((-1.0, v) for v in minus)]:
            exact.add(total_N, np.array([one]), sign)
        return int(total_N[0])

    other = random.Random(shuffle).sample(values, len(values))
    assert total(values) == total(other)
    assert total(values, minus=values[:1]) == total(values[1:])
    assert abs(total(values) * exact.LSB - np.sum(values)) < 1e-12 * max(1, len(values))


@pytest.mark.parametrize("weights", [[1.0] * 300, [0.3, 2.0, 0.3, 0.7] * 4, [100.0, 1.0, -0.5]])
def test_a_ballot_is_four_sums(weights):
    """Many votes, weights that change, numbers beyond the quick way of rounding."""
    rng, numbers = np.random.default_rng(len(weights)), 50
    total_4N, plain_4N = np.zeros((4, numbers), np.int64), np.zeros((4, numbers), np.int64)
    for weight in weights:
        part_N = rng.standard_normal(numbers) * (rng.random(numbers) < 0.6) * weight
        exact.vote(total_4N, part_N, weight)
        for total_N, each_N in zip(plain_4N, split_votes(part_N, weight), strict=True):
            exact.add(total_N, each_N)
    assert np.array_equal(total_4N, plain_4N)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_compiled_loops_give_the_bits_of_their_formulas(dtype):
    """Held against numpy, or whole numbers of any size: nothing is contracted or put in another order."""
    rng, numbers = np.random.default_rng(5), 999
    part_N = (rng.standard_normal(numbers) * 10.0 ** rng.integers(-12, 2, numbers)).astype(dtype)
    start_N = rng.integers(-(2**61), 2**61, numbers) >> rng.integers(0, 60, numbers)
    exact.add(total_N := start_N.copy(), part_N, 0.3)
    wanted = [round(Fraction(float(np.float64(one) * 0.3)) * 2**44) for one in part_N]
    assert (total_N - start_N).tolist() == wanted
    bits_N = encode(part_N.astype(np.float64), "BF16").view(np.uint16)
    for weight in (0.3, 30.0):  # and where the quick way of rounding ends
        exact.add(left_N := start_N.copy(), bits_N, weight)
        exact.add(right_N := start_N.copy(), decode(bits_N.view(np.uint8), "BF16"), weight)
        assert np.array_equal(left_N, right_N)
    assert np.array_equal(exact.value(total_N), total_N.astype(np.float64) * exact.LSB)
    assert exact.reach(part_N) == float(np.abs(part_N).max())
    for bad in (np.nan, np.inf, -np.inf):
        assert not exact.reach(np.append(part_N, dtype(bad))) < np.inf
    magnitude_N, inside_N = np.abs(part_N), np.empty(numbers + 1)
    above, inside = kernels.window(magnitude_N, 1e-6, 1e-3, inside_N)
    kept_N = (magnitude_N >= 1e-6) & (magnitude_N < 1e-3)
    assert above == (magnitude_N >= 1e-3).sum()
    assert np.array_equal(inside_N[:inside], magnitude_N[kept_N])
    (trimmed_N,) = trim(part_N.astype(np.float64), 0.3, Local(1e-6, 1e-3), {})
    assert np.array_equal(trimmed_N, part_N.astype(np.float64) * 0.3 * kept_N)


@given(st.integers(0, 999), st.integers(-1, 1100), st.sampled_from([0, 3, 12]), st.sampled_from([0, 20, 1000]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_threshold_is_the_number_at_its_rank(rng_seed, rank, digits, sampled):
    """In pieces, more of them than may wait; of few values or many; with a sample that helps, misleads, or is not there."""
    rng = np.random.default_rng(rng_seed)
    magnitude_N = np.abs(np.round(rng.standard_normal(1000), digits))
    kth = Kth(1000, rank, rng.choice(magnitude_N, sampled) if sampled else None, waiting=64)
    for _ in range(5):
        for piece_N in np.split(magnitude_N, 10):
            kth.push(piece_N)
        kth.settle()
    assert kth.found == (np.inf if rank <= 0 else 0.0 if rank >= 1000 else np.sort(magnitude_N)[::-1][rank - 1])


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_wide_sums_keep_small_beside_large(values, shuffle):
    def total(order):
        sums = [sum(int(part[0]) for part in side) for side in zip(*(exact.wide(np.array([one])) for one in order), strict=True)]
        return sums, float(exact.wide_value(*(np.array([side]) for side in sums))[0])

    assert total(values) == total(random.Random(shuffle).sample(values, len(values)))
    assert total([1e-12, *values, *(-one for one in values)])[1] == pytest.approx(1e-12, abs=2**-64)
    assert abs(total(values)[1] - math.fsum(values)) <= 2**-60 * len(values) + 2**-51 * abs(math.fsum(values))


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_inner_products_are_good_to_the_largest_product(pairs):
    x_N, y_N = np.array(pairs).T
    largest = np.abs(x_N).max() * np.abs(y_N).max()
    assert abs(exact.inner(x_N, y_N) - math.fsum(x * y for x, y in pairs)) <= len(pairs) * largest * 2**-44 + 1e-280


@pytest.mark.parametrize("count", [1, 2, 7])
def test_inner_products_of_many_are_those_of_each_pair(count):
    """Magnitudes of every size, points of nothing, and more values than are taken at a time."""
    rng = np.random.default_rng(count)
    point_EN = rng.standard_normal((count, 9999)) * 10.0 ** rng.integers(-160, 100, (count, 1)) * 10.0 ** rng.integers(-9, 9, 9999)
    point_EN[count // 2] *= count != 2
    found_EE = exact.block_gram(point_EN)
    assert found_EE.tolist() == [[exact.block_inner(x_N, y_N) for y_N in point_EN] for x_N in point_EN]


def test_what_cannot_be_added_is_refused():
    for bad in (np.inf, np.nan, 1e9):
        with pytest.raises(BadInput):
            exact.add(np.zeros(1, np.int64), np.array([bad]))
    with pytest.raises(BadInput, match="fewer experts"):
        exact.check_room(exact.ROOM)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64, min_value=-1e30, max_value=1e30), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_bf16_is_the_nearest(values):
    value_N = np.array(values)
    got_N = decode(encode(value_N, "BF16"), "BF16").astype(np.float64)
    bits_N = encode(value_N, "BF16").view(np.uint16)
    for step in (-1, 1):
        other_N = decode((bits_N + np.uint16(step % 65536)).view(np.uint8), "BF16").astype(np.float64)
        assert all(abs(g - v) <= abs(o - v) or not np.isfinite(o) for g, o, v in zip(got_N, other_N, value_N, strict=True))


def test_bf16_remembers_the_side_of_the_middle():
    middle = 1 + 2.0**-8  # between 1 and 1 + 2^-7
    near_N = np.array([middle, middle + 2.0**-40, middle - 2.0**-40, -middle - 2.0**-40])
    assert decode(encode(near_N, "BF16"), "BF16").tolist() == [1, 1 + 2.0**-7, 1, -1 - 2.0**-7]
    single_N = np.random.default_rng(1).integers(0, 0x7F800000, 9999).astype(np.uint32).view(np.float32)  # of any size
    single_N = np.concatenate([single_N, -single_N, near_N.astype(np.float32)])
    assert np.array_equal(encode(single_N, "BF16"), encode(single_N.astype(np.float64), "BF16"))


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_read_past_the_cache_is_the_same_bytes(cached, tmp_path):
    """Parts that begin and end anywhere, of tensors that stand where no page begins, and the last byte of the file."""
    path, chance = tmp_path / "model.safetensors", np.random.default_rng(0)
    tensors = {name: torch.from_numpy(chance.standard_normal(size)).float() for name, size in (("a", 5001), ("b", 1), ("c", 300_000))}
    save_file(tensors | {"d": torch.arange(7, dtype=torch.bfloat16)}, path)
    if not cached:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found, files = places([path]), Files()
    ends = {name: sorted({0, one.numbers, *chance.integers(0, one.numbers + 1, 4).tolist()}) for name, one in found.items()}
    requests = [(found[name], *span) for name, cuts in ends.items() for span in pairwise(cuts)]
    with ReadAhead(4 * 300_000) as reader:
        for step, raws in zip([requests, requests[::-1]], reader.stream([requests, requests[::-1]]), strict=True):
            kept = [raw.copy() for raw in raws]
            past = not reader.cached[path]
            assert not (cached and past)
            for request, raw in zip(step, kept, strict=True):
                np.testing.assert_array_equal(raw, files.read(*request))
