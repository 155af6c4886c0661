"""Words of texts in any script, and a quick way to them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from topics import texts

from elmwood.domains.words import Lexicon, complete_words, spans, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Read_file2(x) = 7", ["read", "file"]),
        ("don’t “Stop”", ["don", "stop"]),
        ("船长今天", ["船长", "长今", "今天"]),
        ("データ GPT模型", ["デー", "ータ", "gpt", "模型"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("Ёлка, ДОМ", ["ёлка", "дом"]),
        ("", []),
    ],
)
def test_words_of_many_scripts(text, expected):
    assert words(text) == expected


@given(texts)
def test_the_quick_way_to_words_finds_the_same(text):
    known = {word: place for place, word in enumerate(dict.fromkeys(words(text)))}
    lexicon = Lexicon(lambda word: known[word])
    row_W, count_W = lexicon.steps(text)
    expected = spans(text)
    assert sorted(row for row in lexicon.rows(text).tolist() if row >= 0) == sorted(known[word] for word, _ in expected)
    found = [(int(row), int(count)) for row, count in zip(row_W, count_W, strict=True) if row >= 0]
    assert found == [(known[word], count) for word, count in expected]


@given(texts, st.integers(0, 60))
def test_a_prefix_has_the_words_that_are_finished_in_it(text, cut):
    assert words(complete_words(text[:cut])) == [word for word, count in spans(text) if count <= min(cut, len(text))]
