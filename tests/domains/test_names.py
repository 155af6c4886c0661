"""Names of domains: nouns and names that tell one domain from the others, safe to print."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from topics import TOPICS, some_texts, topic_of

from elmwood.domains import names
from elmwood.domains.code import is_code, language
from elmwood.domains.words import words


def name_all(found, label_N, k):
    """Terms and names of k domains."""
    reading, label_N = names.read(found), np.asarray(label_N)
    terms = names.top_terms(reading, label_N, k)
    return terms, names.names(terms, names.code_names(reading.languages, label_N, k))


def test_names_are_distinctive_not_merely_frequent():
    found = [f"{text} and and and" for text in some_texts(TOPICS, 10, np.random.default_rng(0))]
    terms, _ = name_all(found, [topic_of(text) for text in found], 5)
    assert set(" ".join(terms[0]).split()) <= set(words(TOPICS[0])) - {"and"}
    assert "pomme" in " ".join(terms[2])
    assert "船长" in terms[3]
    assert "капитан" in " ".join(terms[4])


SERVER = "The Apache HTTP Server reads its directives when it starts. Using the directive, a server answers quickly. See the {0} page."
PLANTS = "A genus of plants from the United States, {0} and others. The plants are showy. Contributed by Mary van der Berg, 3-Jun-2014."


def test_names_are_nouns_and_phrases():
    found = [text.format(f"{n}th") for text in (SERVER, PLANTS) for n in range(6)]
    terms, made = name_all(found, np.repeat([0, 1], 6), 2)
    assert "Apache HTTP Server" in terms[0]
    assert "United States" in terms[1]
    assert {"genus", "plants"} <= set(terms[1])
    for some, name in zip(terms, made, strict=True):
        assert not {"using", "quickly", "showy", "contributed", "berg", "mary", "jun"} & {word.lower() for word in name.split()}
        assert not {"mary", "van der berg"} & {term.lower() for term in some}


RUST = "// Sorts {0} cheaply, without a heap.\npub fn {0}(mut n: usize) -> usize {{\n    let x = n;\n    n = x;\n}}\n"
GO = "// The scheduler wakes {0}.\npackage {0}\n\nfunc {0}(n int) {{\n    defer close(n)\n    m := n\n}}\n"


def test_code_is_named_by_its_languages():
    found = [text.format(word) for text in (RUST, GO, SERVER) for word in ("alpha", "beta", "gamma", "delta")]
    assert [is_code(text) for text in found] == [True] * 8 + [False] * 4
    assert {language(RUST), language(GO), language("x = 1")} == {"Rust", "Go", ""}
    _, made = name_all(found, np.repeat([0, 0, 1], 4), 2)
    assert made[0].startswith("Go and Rust code")
    assert "code" not in made[1]


def test_names_differ():
    assert names.names([("a", "b", "c"), ("a", "b", "c"), ()], ["", "", ""], taken=["a b c"]) == ["a b c 2", "a b c 3", "domain 2"]
    assert names.names([("a", "b", "c"), ("one two three", "d e f")], ["Go code", ""]) == ["Go code: a b", "one two three"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=80), min_size=4, max_size=12), st.integers(0, 5))
def test_names_of_any_text_are_unique_and_safe_to_print(found, rng_seed):
    label_N = np.random.default_rng(rng_seed).integers(0, 3, len(found))
    terms, made = name_all(found, label_N, 3)
    assert made == name_all(found, label_N, 3)[1]
    assert len(set(made)) == 3
    assert all(name.strip() == name and name.isprintable() and not set(name) & set("[]<>&\"'`\\/$") for name in made)
    assert all(len(some) <= names.TERMS for some in terms)


def test_a_term_reveals_no_single_document():
    found = ["the secret Zanzibar plan of the captain", *["the captain of the ship"] * 3, *["the apple of the garden"] * 4]
    terms, _ = name_all(found, [0] * 4 + [1] * 4, 2)
    assert "captain" in terms[0]
    assert not any("zanzibar" in term.lower() or "secret" in term for some in terms for term in some)
