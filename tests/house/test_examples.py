"""The notebooks in examples/ run from top to bottom, with what comes with elmwood and nothing else, on less text and for fewer steps."""

import json
from pathlib import Path

import pytest
from sources import write_sample

SMALLER = {'"sample"': '"small.jsonl"', '"200k"': '"20k"', '"30k"': '"12k"'}  # in the first cells; each stands there once
EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# As a kernel does: cells share their names, and the value of a last expression is shown. Prints one JSON line per value.
KERNEL = """
import ast, json, sys

names = {}
for number, source in enumerate(json.load(sys.stdin)):
    lines = ast.parse(source)
    last = lines.body.pop() if isinstance(lines.body[-1], ast.Expr) else None
    exec(compile(lines, f"cell {number}", "exec"), names)
    if last:
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        print(json.dumps([number, type(value).__name__, getattr(value, "_repr_html_", lambda: None)()]))
"""


def cells(notebook: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_no_output(notebook):
    book = json.loads(notebook.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in book["cells"]]
    assert len(names) == len(set(names))
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in book["cells"] if cell["cell_type"] == "code")
    assert notebook.stat().st_size < 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a little of the bundled text at first. All three begin alike, so those that follow find their seed and experts."""
    made = tmp_path_factory.mktemp("notebooks")
    write_sample(made / "small.jsonl")
    return made


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, folder, forked):
    """On a text of the reader's own, which a cell names in place of the bundled one. Warnings are errors, as in every test."""
    code = "\0".join(cells(notebook))
    assert code.count('text = "sample"') == 1
    for written, smaller in SMALLER.items():
        assert code.count(written) == 1
        code = code.replace(written, smaller)
    done = forked(KERNEL, cwd=folder, stdin=json.dumps(code.split("\0")))
    assert not done.returncode, done.stderr
    shown = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert shown
    assert [name for _, name, html in shown if html is None and name != "str"] == [], "what a cell ends in shows itself"


def test_there_are_three_notebooks_and_a_list_of_them():
    listed = (EXAMPLES / "README.md").read_text()
    assert len(NOTEBOOKS) == 3
    assert all(f"({path.name})" in listed for path in NOTEBOOKS)
