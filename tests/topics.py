"""Texts that tests make up, of five topics and of everything people write; corpora and folders of them."""

import shutil
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from elmwood.corpus.build import build
from elmwood.domains.publish import files_without_text, write_records
from elmwood.records import Corpus, Partition
from elmwood.store import Store

TOPICS = (
    "the {0} sailed over the sea with its captain and crew toward the harbour",
    "def read_{0}(path): return open(path).read() if path else None",
    "le {0} mange une pomme dans le jardin de la maison avec plaisir",
    "船长{0}今天带着船员在大海上航行",
    "капитан {0} и его команда плывут по морю домой",
)
# with more words made up, for texts of sentences
SENTENCES = ("the {0} sailed over the sea with captain {1}", "def {0}(path): return open({1}).read()", "le {0} mange une pomme — {1} aussi")
# what people write: words of several scripts, code, quotation marks, digits, broken pieces
PIECES = (
    "the",
    "sea",
    "café",
    "read_file2",
    "“quoted”",
    "don’t",
    "漢字かな交じり",
    "데이터",
    "हिन्दी",
    "ΑΣ",
    "x",
    "12",
    "\n",
    "—",
    ".",
    "İ",
    "e\u0301",
    "\ud800",
)
texts = st.one_of(st.text(max_size=60), st.lists(st.one_of(st.sampled_from(PIECES), st.just(" ")), max_size=30).map("".join))


def some_texts(topics, each, rng):
    """Texts on each topic, with words made up."""
    made = []
    for n in range(each * len(topics)):
        new = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(6)]
        made.append(" ".join(topics[n % len(topics)].format(word) for word in new))
    return made


def topic_of(text):
    """Which of TOPICS a text is on."""
    return next(place for place, topic in enumerate(TOPICS) if topic[-6:] in text)


def some_sentences(topics, each, sentences, letters=("abcdefghij",)):
    """Texts of so many sentences on each topic, with words made up of the letters of the topic."""
    rng, k = np.random.default_rng(0), len(topics)
    for n in range(each * k):
        alphabet = list(letters[n % len(letters)])
        made = (topics[n % k].format(*("".join(rng.choice(alphabet, 4)) for _ in range(2))) for _ in range(sentences))
        yield ". ".join(made)


def build_corpus(folder: Path, store: Store, found, **options) -> Corpus:
    """A corpus of these texts, each in a file of its own."""
    folder.mkdir()
    for n, text in enumerate(found):
        (folder / f"{n}.txt").write_text(text)
    return build([str(folder)], store, **options)


def export_partition(one: Partition, store: Store, folder: Path) -> Path:
    """A partition as a folder without its text."""
    shutil.copytree(store.folder(files_without_text(one, store)), folder)
    write_records(one, store, folder)
    return folder
