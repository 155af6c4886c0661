"""Every bench parses, stands in the list of benches, and imports nothing from the command line."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benches").rglob("*.py"))
MODULES = [path for path in FILES if "\ndef main() " in path.read_text()]


def name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def test_every_bench_prints_its_help(forked):
    """In one process, since each import of torch takes seconds."""
    script = """
import importlib, io, sys
sys.path.insert(0, '')
from contextlib import redirect_stdout
for name in sys.argv[1:]:
    module, text = importlib.import_module(name), io.StringIO()
    sys.argv = [name, "--help"]
    try:
        with redirect_stdout(text):
            module.main()
    except SystemExit as stopped:
        assert not stopped.code, name
    assert f"python -m {name}" in text.getvalue(), f"{name} --help does not say how it is run"
"""
    done = forked(script, *(name(path).replace("/", ".") for path in MODULES), cwd=ROOT)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_bench_is_in_the_list_and_leaves_the_command_line_alone(path):
    text = path.read_text()
    listed = path.relative_to(ROOT / "benches").as_posix()
    assert f"]({listed})" in (ROOT / "benches" / "README.md").read_text(), f"benches/README.md does not list {listed}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert not module.startswith("elmwood.cli"), f"{listed} imports {module}"


def test_folders_of_benches_stay_small():
    for folder in {path.parent for path in FILES}:
        assert len([path for path in FILES if path.parent == folder]) <= 12, folder
