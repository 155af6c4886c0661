"""Messages of errors: whatever they quote, they can be read, and they still end in the cure."""

import pickle

import pytest

from elmwood import errors
from elmwood.errors import LONGEST, BadInput, ElmwoodError, UnknownName
from elmwood.merge.mergekit import read
from elmwood.merge.rules.table import RULES
from elmwood.registry import lookup

KINDS = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ElmwoodError)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_bounded_whatever_it_quotes(kind):
    error = kind(f"no rule {'x' * 20_000!r}: choose another")
    assert len(str(error)) == LONGEST
    assert str(error).startswith("no rule 'xxx")
    assert str(error).endswith("xxx': choose another")
    assert "characters left out" in str(error)
    again = pickle.loads(pickle.dumps(error))  # as it comes from a worker
    assert type(again) is kind
    assert str(again) == str(error)
    assert str(kind("n" * LONGEST)) == "n" * LONGEST
    assert str(kind(f"{error}")) == str(error)


def test_names_and_settings_of_strangers_are_quoted_within_bounds():
    """The method of a state, and the keys and values of a file for mergekit."""
    with pytest.raises(UnknownName, match=r"pass 'module:function'$") as caught:
        lookup(RULES, "x" * 20_000, "merge rule")
    assert len(str(caught.value)) <= LONGEST
    for text in (f"merge_method: {'x' * 20_000}", f"{'y' * 20_000}: 1", f"merge_method: linear\nmodels: [{{model: a, {'z' * 20_000}: 1}}]"):
        with pytest.raises(BadInput) as caught:
            read(text)
        assert len(str(caught.value)) <= LONGEST
