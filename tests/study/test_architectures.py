"""The whole path of tiny models of many kinds, held against plain transformers and PEFT: rows of the table in docs/seeds.md."""

import shutil
from pathlib import Path

import pytest

from benches.sources.architectures import CASES, HEAD, line, prepare, run

PAGE = (Path(__file__).parents[2] / "docs" / "seeds.md").read_text()
# one of each kind; `python -m benches.sources.architectures` runs all rows
CORE = (
    "Llama 3", "Mixtral", "Gemma 3", "OPT-350M", "BLOOM", "GPT-1", "Jamba", "RWKV", "GPT-2 with hub names",
    "Llama in three dtypes", "Llama, tied, with a stored head", "Llama, pickled only", "Tokenizer: sentencepiece Unigram, bytes",
    "Tokenizer: WordPiece",
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("name", CORE)
def test_a_row_of_the_table_is_as_it_says(name, prepared, tmp_path):
    """`run` compares every number; what is refused, and why, is in the table."""
    row = run(name, *prepared, tmp_path / "row")
    shutil.rmtree(tmp_path)
    assert line(row) in PAGE.splitlines()


def test_the_table_has_all_rows():
    assert HEAD in PAGE
    assert [one.split(" | ")[0][2:] for one in PAGE.partition(HEAD)[2].split("<!--")[0].strip().splitlines()] == list(CASES)
