"""The Python of README and of docs/python.md runs, in order, in a folder that has only a small corpus in it."""

import json
import random
import re
from pathlib import Path

import pytest

import elmwood as ew

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "python.md").read_text()
README = (ROOT / "README.md").read_text()
TOPICS = (
    "the river carries a boat past the mill and under the old stone bridge to the sea",
    "int main returns a value when the function ends and prints a line of text without an error",
    "boil the onions with salt and butter then stir the soup slowly until it is thick and hot",
)

ONE_CORE = """import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
"""


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def write_notes(path: Path) -> None:
    """150 documents on three topics."""
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(150):
            words = TOPICS[number % 3].split()
            sentences = (" ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + "." for _ in range(25))
            file.write(json.dumps({"text": " ".join(sentences) + f" Note {number}."}) + "\n")


@pytest.fixture(scope="module")
def run(forked):
    def stdout(code: str, folder: Path) -> str:
        """Of a script of these lines, which has no `if __name__ == "__main__"`."""
        done = forked(code, cwd=folder)
        assert not done.returncode, done.stderr
        return done.stdout

    return stdout


@pytest.fixture(scope="module")
def told(run, tmp_path_factory) -> tuple[str, Path]:
    """What the tutorial prints, and where it ran."""
    folder = tmp_path_factory.mktemp("tutorial")
    write_notes(folder / "notes.jsonl")
    return run(ONE_CORE + "".join(blocks(TUTORIAL)), folder), folder  # README's has more: each worker process imports torch anew


def test_the_tutorial_runs(told):
    printed, folder = told
    assert "The river" in printed
    assert "oracle routing" in printed
    assert re.search(r"^(better|not better|undecided) [+-]", printed, re.M)
    assert (folder / "expert-0" / "model.safetensors").is_file()
    assert "oracle routing" in (folder / "report.html").read_text()


def test_the_tutorial_names_every_function():
    table = re.search(r"\| command \| Python \|\n(.*?)\n\n", TUTORIAL + "\n\n", re.S)
    assert table
    assert set(re.findall(r"`(?:ew\.)?(\w+)`", table[1])) >= set(ew.PLACES)


def test_from_text_to_a_sentence_takes_eight_lines(run, told, tmp_path):
    """The example of README, with smaller numbers."""
    (example,) = blocks(README)
    assert len([line for line in example.splitlines() if line.strip()]) <= 8
    write_notes(tmp_path / "my.jsonl")
    store = ew.Store(told[1] / ".elmwood")
    ew.export(store.load("seed"), tmp_path / "path" / "to" / "checkpoint", store=store)
    assert "Once upon a time" in run(example.replace("domains=8", "domains=3").replace('"2M"', '"8k"'), tmp_path)
