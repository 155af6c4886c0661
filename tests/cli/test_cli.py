"""The command line: lazy verbs, records of options."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from typer.models import OptionInfo
from typer.testing import CliRunner

from elmwood import cli
from elmwood.cli import options
from elmwood.errors import BadInput

TABLES = {"": cli.VERBS, "hub": cli.HUB_VERBS, "seed": cli.SEED_VERBS, "star": cli.STAR_VERBS, "state": cli.STATE_VERBS}


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


def test_verbs_that_run_models_say_where(tmp_path, monkeypatch):
    monkeypatch.setenv("ELMWOOD_DEVICE", "cpu")
    having = {place for table in TABLES.values() for verb, (place, _) in table.items()
              if any("--device" in one.opts for one in cli._command(verb, place).params)}  # fmt: skip
    assert having == cli.COMPUTING | {"train:fit"}
    found = CliRunner().invoke(cli.app, ["chat", "nothing", "--device", "mps:7", "--store", str(tmp_path)])
    assert "nothing" in str(found.exception)
    assert os.environ["ELMWOOD_DEVICE"] == "mps:7"


def test_options_may_come_before_or_after_arguments(tmp_path):
    for words in (["show", "--json", "--store", str(tmp_path)], ["--version"]):
        assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert isinstance(cli.app, typer.Typer)


def options_of(function):
    """Options of a verb that name a result or a file of it, found in its signature."""
    for name, parameter in inspect.signature(options.command(function)).parameters.items():
        base, *marks = get_args(parameter.annotation) or (None,)
        flags = [flag for mark in marks if isinstance(mark, OptionInfo) for flag in options.flags(mark) or [f"--{name}"]]
        if "--name" in flags or (flags and Path in (base, *get_args(base)) and not READ & {*flags}):
            yield flags[0]


# folders and files that are read, or made where they are missing
READ = {"--store", "--from", "--tasks-folder", "--folder", "--key", "--api-key-file", "--upstream_key_file", "--adapters"}
VERBS_OF = [(group, verb) for group, table in TABLES.items() for verb in table]


@pytest.mark.parametrize(("group", "verb"), VERBS_OF)
def test_names_and_files_of_results_are_refused_before_any_work(group, verb, tmp_path):
    """The inputs do not exist either, and nothing has looked at them yet."""
    module, _, name = TABLES[group][verb][0].partition(":")
    function = getattr(__import__(f"elmwood.cli.{module}", fromlist=[name]), name)
    store = tmp_path / "store"
    (store / "refs" / "taken").mkdir(parents=True)
    (store / "refs" / "taken" / "0").write_text("0" * 64)
    (tmp_path / "file").write_text("")
    needed = []
    for name, one in inspect.signature(options.command(function)).parameters.items():
        if one.default is one.empty and get_args(one.annotation):
            needed += [f"--{name}"] * isinstance(get_args(one.annotation)[1], OptionInfo)
            needed.append("1" if get_args(one.annotation)[0] is int else "nothing")
    if verb == "export":
        needed[-1] = str(tmp_path / "file" / "below")
    for flag in [*options_of(function), *(["folder"] if verb == "export" else [])]:
        bad = ["a b", "taken/0/x", "x" * 300] if flag == "--name" else [str(tmp_path / "none" / "x.svg"), str(tmp_path / "file" / "x"),
                                                                         str(tmp_path)]  # fmt: skip
        for value in bad if flag != "folder" else [""]:
            words = [*([group] if group else []), verb, *needed, "--store", str(store), *([flag, value] if value else [])]
            found = CliRunner().invoke(cli.app, words)
            assert isinstance(found.exception, BadInput), (words, found.output, found.exception)
            assert "nothing here is called" not in str(found.exception)
            assert any(word in str(found.exception) for word in ("name", "choose")), found.exception


def test_a_locale_without_utf8_shows_what_it_can_and_writes_files_in_utf8(tmp_path):
    """Comparison, page and JSON of names and signs that ASCII has not."""
    script = """
import sys
from elmwood.cli import main
from elmwood.records import Comparison, Row
from elmwood.store import Store
store = Store(sys.argv[1])
rows = [Row(name=name, bits_per_byte=2.0, standard_error=0.1, perplexity=9.0) for name in ("caf\\u00e9 \\u00b1", "\\u732b")]
store.name("c", store.add(Comparison(holdout="h", rows=rows)))
sys.argv = ["elmwood", *sys.argv[2:], "--store", sys.argv[1]]
main()
"""
    page = tmp_path / "page.html"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    env = clean | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (["report", "c", "-o", str(page)], ["show"], ["show", "c", "--json"]):
        command = [sys.executable, "-c", script, str(tmp_path / "store"), *words]
        done = subprocess.run(command, capture_output=True, env=env)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        done.stdout.decode("ascii")
    assert json.loads(done.stdout)["record"]["rows"][1]["name"] == "猫"
    assert "café ±" in page.read_text(encoding="utf-8")
