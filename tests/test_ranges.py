"""Numbers out of range are refused before any work, with the option, the value and the range."""

import math
from typing import Annotated

import pytest

from elmwood.errors import BadInput
from elmwood.ranges import Between, Count, Documents, ErrorRate, RngSeed, checked


@checked
def work(*, alpha: ErrorRate = 0.05, cap: Count = 5, documents: Documents = None, clip: Annotated[float, Between(0, inside=True)] = 0.5,
         min_effect: Annotated[float, Between(0)] = 0.0, heat: Annotated[float, Between(0.001, 10, zero=True)] = 1.0,
         rng_seed: RngSeed = 0) -> str:  # fmt: skip
    """Does some work."""
    return "done"


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("alpha", (0, 1, 2, -0.1, math.nan, math.inf)),
        ("cap", (0, -1)),
        ("documents", (0, 3)),
        ("clip", (0, -1, math.inf, math.nan)),
        ("min_effect", (-1, math.nan)),
        ("heat", (1e-320, 11, math.nan)),
        ("rng_seed", (-1, 2**70)),
    ],
)
def test_what_is_out_of_range_is_refused(option, values):
    for value in values:
        with pytest.raises(BadInput) as refused:
            work(**{option: value})
        assert str(refused.value).startswith(f"{option.replace('_', '-')} is {value}: choose ")


def test_what_is_in_range_passes():
    assert work() == "done"
    assert work(alpha=0.5, cap=1, documents=4, clip=9, min_effect=0, heat=0, rng_seed=2**32 - 1) == "done"
    assert work.__doc__ == "Does some work."


def test_ranges_in_words():
    assert str(Between(0, 1, inside=True)) == "a number between 0 and 1"
    assert str(Between(0, inside=True)) == "a number above 0"
    assert str(Between(2)) == "2 or more"
    assert str(Between(0.001, 10, zero=True)) == "0, or a number from 0.001 to 10"
