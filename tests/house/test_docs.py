"""Documentation that can rot is generated or looked at here."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import elmwood
from elmwood import records
from elmwood.cli import app
from elmwood.corpus.kinds import KINDS
from elmwood.corpus.quality import FILTERS
from elmwood.corpus.unpack import PACKED
from elmwood.domains.embed import EMBEDDERS
from elmwood.domains.route import ROUTERS
from elmwood.merge.rules.table import RULES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MERGING = (ROOT / "docs" / "merging.md").read_text()
FORMATS = (ROOT / "docs" / "formats.md").read_text()


def test_the_command_reference_is_as_generated():
    """`make docs` writes it."""
    command = [sys.executable, "-m", "typer", "elmwood.cli", "utils", "docs", "--name", "elmwood"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert (ROOT / "docs" / "commands.md").read_text().strip() == made.stdout.strip()


@pytest.mark.parametrize("kind", sorted(records.KINDS))
def test_every_record_and_field_is_documented(kind):
    section = re.search(rf"^## {records.KINDS[kind].__name__}\n(.*?)(?=^## |\Z)", FORMATS, re.M | re.S)
    assert section, f"docs/formats.md has no section on {kind}"
    for field in set(records.KINDS[kind].model_fields) - {"kind", "format"}:
        assert f"`{field}`" in section[1], f"docs/formats.md does not name {kind}.{field}"


@pytest.mark.parametrize("value", [records.Shard, records.Embedder, records.Domain, records.Recipe, records.Point, records.Row])
def test_every_inner_value_and_field_is_documented(value):
    for field in value.model_fields:
        assert f"`{field}`" in FORMATS, f"docs/formats.md does not name {value.__name__}.{field}"


@pytest.mark.parametrize("row", [*EMBEDDERS, *ROUTERS])
def test_every_table_row_is_documented(row):
    assert f"`{row}`" in (ROOT / "docs" / "domains.md").read_text()


def test_every_kind_of_file_is_documented():
    text = (ROOT / "docs" / "text.md").read_text()
    for name, kind in KINDS.items():
        endings = " ".join(f"`{ending}`" for ending in kind.endings)
        assert f"| {name} | {endings} | {kind.document} |" in text
    assert all(f"`{one.endings[0]}`" in text for one in PACKED.values())
    assert all(f"| `{name}` |" in text for name in FILTERS)


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_merge_rule_is_documented_with_its_settings(name):
    row = re.search(rf"^\| `{name}` \|.*$", MERGING, re.M)
    assert row, f"docs/merging.md has no row on {name}"
    for setting in [*RULES[name].begins, *RULES[name].ends]:
        assert f"`{setting}` (" in row[0], f"docs/merging.md does not name {setting} of {name}"
    assert RULES[name].paper.split()[0] in row[0]


def commands(text: str) -> list[str]:
    """The elmwood commands of a document's shell blocks, continued lines joined."""
    blocks = re.findall(r"```(?:sh|console|bash)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines if line.startswith("elmwood ")]


DOCUMENTS = [ROOT / "README.md", *(path for path in sorted(ROOT.glob("docs/**/*.md")) if path.name != "commands.md")]


@pytest.mark.parametrize("command", sorted({command for path in DOCUMENTS for command in commands(path.read_text())}))
def test_every_command_in_the_docs_parses(command):
    """Its verb and options exist. Running them is the story's task."""
    words = command.split()[1:]
    depth = 2 if words[0] in ("seed", "state", "hub") else 1
    asked = CliRunner().invoke(app, [*words[:depth], "--help"])
    assert asked.exit_code == 0, command
    for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", command):
        assert re.search(rf"(?<!\S){option}\b", asked.stdout), f"{option} in: {command}"


def test_readme_names_every_room():
    rooms = [path.name for path in (ROOT / "elmwood").iterdir() if path.is_dir() or path.suffix == ".py"]
    for name in set(rooms) - {"__pycache__", "__init__.py"}:
        assert name in README, f"README's file tree does not name {name}"


LOG = sorted(path for path in ROOT.glob("docs/log/*.md") if path.name != "index.md")


@pytest.mark.parametrize("path", LOG, ids=lambda path: path.stem)
def test_every_entry_of_the_lab_book_has_a_date_a_commit_a_claim_and_a_verdict(path):
    index = (ROOT / "docs" / "log" / "index.md").read_text()
    title, *entries = re.split(r"^## ", path.read_text(), flags=re.M)
    assert title.startswith("# ")
    assert entries
    for entry in entries:
        name, _, body = entry.partition("\n\n")
        assert re.match(r"\d{4}-\d\d-\d\d · commits? `[0-9a-f]{7}`", body), f"{path.name}: {name} has no date and commit"
        for part in ("Claim", "Verdict"):
            assert f"\n\n**{part}.** " in body, f"{path.name}: {name} has no {part.lower()}"
        assert f"[{name}]({path.name}#" in index, f"docs/log/index.md does not list {name} of {path.name}"


def calls(path: Path) -> list[ast.Call]:
    """Calls of `ew.…` in a document's Python blocks."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    return [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("ew.")]


@pytest.mark.parametrize("call", sorted({ast.unparse(call) for path in DOCUMENTS for call in calls(path)}))
def test_every_call_in_the_docs_binds(call):
    """Its function exists and takes these arguments. docs/python.md is run by a test of its own."""
    (node,) = (node for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Call) and ast.unparse(node) == call)
    function = eval(ast.unparse(node.func), {"ew": elmwood})
    inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords if word.arg})


def test_every_attack_and_fault_names_a_test_or_a_bench_that_exists():
    """The table of docs/verification.md: 40 numbers, and H1 to H11."""
    table = (ROOT / "docs" / "verification.md").read_text().partition("## What is tried")[2]
    rows = [line.split(" | ") for line in table.splitlines() if re.match(r"\| H?\d", line)]
    numbers = []
    for first, *_, tests, benches in rows:
        assert "`" in tests + benches, first
        low, *high = first.strip("| ").split(" – ")
        numbers += [str(n) for n in range(int(low), int(high[0]) + 1)] if high else low.split(", ")
        for path, name in re.findall(r"`([\w/]+\.py)::(\w+)`", tests):
            assert f"def {name}(" in (ROOT / "tests" / "hub" / path).read_text(), f"{first}: {path} has no {name}"
        for module in re.findall(r"`benches\.hub\.(\w+)`", benches):
            assert (ROOT / "benches" / "hub" / f"{module}.py").exists(), f"{first}: no {module}"
    assert sorted(numbers) == sorted([*map(str, range(1, 41)), *(f"H{n}" for n in range(1, 12))])
