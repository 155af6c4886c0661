"""Packed tokens become batches, by step; learning rates follow the step."""

import math
from itertools import islice

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_training import FULL, packed_of

from elmwood.corpus.tokens import Packed
from elmwood.errors import BadCorpus
from elmwood.records import Recipe
from elmwood.train.data import UNSCORED, batches, count_scored, split_batch, split_validation
from elmwood.train.loop import rate


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), length=st.integers(2, 16), batch=st.integers(1, 5), skip=st.integers(0, 9)
)
def test_the_position_in_the_data_is_the_step(sizes, length, batch, skip):
    packed, recipe = packed_of(*sizes), Recipe(steps=9, batch=batch, length=length, rng_seed=3)
    from_start = list(islice(batches(packed, recipe), skip, skip + 3))
    for one, two in zip(from_start, islice(batches(packed, recipe, skip), 3), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), length=st.integers(2, 16))
def test_an_epoch_scores_every_token_once_but_separators_and_the_rest_of_a_row(sizes, length):
    packed = packed_of(*sizes)
    rows = (sum(sizes) - 1) // length
    assume(rows)
    targets = np.concatenate([one.targets_BL.ravel() for one in islice(batches(packed, Recipe(steps=1, batch=1, length=length)), rows)])
    scored = targets[targets != UNSCORED]
    assert 0 not in scored
    assert len(set(scored.tolist())) == len(scored)
    assert sum(sizes) - len(scored) <= len(sizes) + length


def test_positions_restart_and_targets_follow_within_a_document():
    batch = next(batches(packed_of(*[7] * 9), Recipe(steps=1, batch=3, length=20)))
    for tokens, targets, positions in zip(*batch, strict=True):
        for place in range(20):
            if tokens[place] == 0:
                assert positions[place] == 0
            elif place:
                assert positions[place] == positions[place - 1] + 1
            assert targets[place] == UNSCORED or targets[place] == tokens[place] + 1 or tokens[place] == 0


def test_a_domain_smaller_than_a_row_is_repeated():
    batch = next(batches(packed_of(3, 4), Recipe(steps=1, batch=2, length=64)))
    assert batch.tokens_BL.shape == (2, 64)
    assert set(batch.tokens_BL.ravel().tolist()) == {0, 2, 3, 5, 6, 7}


def test_no_tokens_is_an_error():
    with pytest.raises(BadCorpus, match="no tokens"):
        next(batches(Packed(np.empty(0, "<u2"), np.empty(0, "<i8"), 0), FULL))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@given(steps=st.integers(1, 300), warmup=st.floats(0, 1), final=st.floats(0, 1))
def test_schedules_rise_to_the_peak_and_end_where_they_should(schedule, steps, warmup, final):
    recipe = Recipe(steps=steps, warmup=warmup, final=final, schedule=schedule, learning_rate=0.5)
    rates = [rate(recipe, step) for step in range(steps)]
    warm = math.ceil(warmup * steps)
    assert all(0 <= one <= 0.5 + 1e-12 for one in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert all(a >= b - 1e-12 for a, b in zip(rates[warm:], rates[warm + 1 :], strict=False))
    if warm < steps:
        assert rates[-1] == pytest.approx(0.5 if schedule == "constant" else 0.5 * final)


@given(rows=st.integers(1, 9), count=st.integers(1, 12))
def test_parts_are_the_batch(rows, count):
    batch = next(batches(packed_of(*[7] * 9), Recipe(steps=1, batch=rows, length=5)))
    split = list(split_batch(batch, count))
    assert len(split) == min(rows, count)
    assert all(np.array_equal(np.concatenate(pieces), whole) for pieces, whole in zip(zip(*split, strict=True), batch, strict=True))
    assert sum(map(count_scored, split)) == count_scored(batch)


@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=30))
def test_documents_to_validate_on_are_chosen_by_what_they_hold(sizes):
    packed = packed_of(*sizes)
    kept, held = split_validation(packed)
    assert len(kept)
    assert len(held)
    assert sorted([*kept, *held]) == list(range(len(sizes)))
    seen = np.concatenate([batch.tokens_BL.ravel() for batch in islice(batches(packed, FULL, 0, kept), 3)])
    ends = np.append(packed.starts[1:], len(packed.tokens))
    assert not set(seen.tolist()) - {0} & {int(token) for one in held for token in packed.tokens[packed.starts[one] + 1 : ends[one]]}


def test_one_document_cannot_be_validated_on():
    with pytest.raises(BadCorpus, match="at least two"):
        split_validation(packed_of(9))
