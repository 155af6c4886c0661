"""The command line: lazy verbs, records of options."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from elmwood import cli

TABLES = {"": cli.VERBS, "seed": cli.SEED_VERBS, "state": cli.STATE_VERBS}


@pytest.mark.parametrize(("group", "verb"), [(group, verb) for group, table in TABLES.items() for verb in table])
def test_the_help_line_of_a_verb_is_the_first_of_its_docstring(group, verb):
    place, line = TABLES[group][verb]
    module, _, function = place.partition(":")
    found = getattr(__import__(f"elmwood.cli.{module}", fromlist=[function]), function)
    assert (found.__doc__ or "").splitlines()[0] == line


def test_help_imports_no_verb():
    script = "import sys; sys.argv = ['elmwood', '--help']\nfrom elmwood.cli import app\ntry:\n    app()\nexcept SystemExit:\n    pass\n"
    script += "print(sorted(name for name in sys.modules if name.startswith('elmwood')), 'pydantic' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "['elmwood', 'elmwood.cli', 'elmwood.errors'] False"


def test_an_unknown_verb_is_named():
    found = CliRunner().invoke(cli.app, ["grow"])
    assert found.exit_code == 2
    assert "No such command 'grow'" in found.output


def test_options_may_come_before_or_after_arguments(tmp_path):
    for words in (["show", "--json", "--store", str(tmp_path)], ["--version"]):
        assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert isinstance(cli.app, typer.Typer)
