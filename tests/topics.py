"""Texts that tests make up, of five topics and of everything people write; corpora and folders of them."""

import shutil
from pathlib import Path

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


def build_corpus(folder: Path, store: Store, found) -> Corpus:
    """A corpus of these texts, each in a file of its own."""
    folder.mkdir()
    for n, text in enumerate(found):
        (folder / f"{n}.txt").write_text(text)
    return build([str(folder)], store)


def export_partition(one: Partition, store: Store, folder: Path) -> Path:
    """A partition as a folder without its text."""
    shutil.copytree(store.folder(files_without_text(one, store)), folder)
    write_records(one, store, folder)
    return folder
