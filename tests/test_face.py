"""`import elmwood as ew`: the verbs of the command line as functions, imported when they are used."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from typer.models import ParameterInfo

import elmwood as ew
from elmwood.cli import COMPUTING, SEED_VERBS, STATE_VERBS, VERBS
from elmwood.cli.options import command, computing, flags
from elmwood.engine import named_device

HOUSE = Path(ew.__file__).parent
# verb of the command line -> function, where the names differ
RENAMED = {"eval": "evaluate", "chat": "generate", "seed train": "train_seed", "seed import": "import_seed", "seed from": "seed_from"}
RENAMED |= {"seed diloco": "diloco"}
RENAMED |= {f"state {verb}": f"state_{verb}" for verb in STATE_VERBS}
PLACES = (
    # functions of elmwood.hub.client and elmwood.serve
    {verb: place for verb, place in VERBS.items() if not place[0].startswith("volunteer:") and verb not in ("serve", "gateway")}
    | {f"seed {verb}": place for verb, place in SEED_VERBS.items()}
    | {f"state {verb}": place for verb, place in STATE_VERBS.items()}
)
BEYOND = {
    "Store": "what --store names",
    "benchmark": "`eval --tasks`",
    "build": "the first half of `cluster`",
    "open_model": "the first half of `chat`",
    "survey": "`cluster --with`",
    "tune": "`train --method router`",
}
# functions that run no model; `fit` has a device that it predicts for
NOT_COMPUTING = ["Store", "build", "export", "fit", "forest", "report", "seed_from", "show", "state_add", "state_finalize",
                 "state_make", "state_remove", "verify"]  # fmt: skip
TERMINAL = {"json", "context", "plot"}  # options that are about the terminal and its files
CALLED = {"store", "progress", "on_text", "on_submission", "on_phase"}  # parameters that stand for what the command line does itself
# options that are named or spelled otherwise in Python; all of them, and by verb
MAPPING = {"set", "settings"}  # --set NAME=VALUE, and a mapping of these
OTHERWISE = {
    "train": {"commands", "tuned", "balance"},  # `commands` prints; the others are of `tune`
    "chat": {"prompt"},
    "cluster": {"with"},  # `survey`
    "demo": {"corpus", "report"},  # the bundled corpus is spelled out; `ew.report` writes the page
    "eval": {"tasks", "limit", "tasks_folder", "download", "bos"},  # `benchmark`
    "fit": {"table"},  # a table of cards
    "table": {"from", "source"},  # `from` is a word of Python
    "mix": {"scale", "without"},  # numbers and lists where the command line has text
    "state make": {"part", "weights"},
    "statistics": {"engine"},  # `train --statistics` hands its own on
}
ROOMS = {path.name for path in HOUSE.iterdir() if path.is_dir()}


def test_importing_elmwood_is_free():
    script = "import sys; before = set(sys.modules); import elmwood; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names} == {"elmwood"}


def test_names_are_listed_and_found():
    assert ew.__all__ == sorted(ew.PLACES) == sorted(set(dir(ew)) & set(ew.PLACES))
    for name, (module, function) in ew.PLACES.items():
        assert getattr(ew, name) is getattr(import_module(module), function), name
    with pytest.raises(AttributeError, match="it has Store"):
        _ = ew.absent


def test_the_type_checker_sees_the_same_names():
    """The names under TYPE_CHECKING, with the modules they come from."""
    tree = ast.parse((HOUSE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [(node.module, alias) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert {alias.asname or alias.name: (module, alias.name) for module, alias in imports} == ew.PLACES


@pytest.mark.parametrize("name", sorted(ew.PLACES))
def test_functions_are_typed_and_documented(name):
    found = getattr(ew, name)
    assert inspect.getdoc(found)
    if inspect.isfunction(found):
        signature = inspect.signature(found)
        untyped = [one.name for one in signature.parameters.values() if one.annotation is one.empty]
        assert not untyped
        assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", sorted(set(ew.PLACES) & ROOMS))
def test_a_verb_keeps_the_name_it_shares_with_a_room(name):
    """Whatever is imported first, `ew.merge` is the verb."""
    import_module(f"elmwood.{name}")
    script = f"import elmwood.{name}, elmwood as ew; assert callable(ew.{name}); import elmwood.{name}; assert callable(ew.{name})"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert not isinstance(getattr(ew, name), ModuleType)


def test_verbs_agree_with_the_command_line():
    verbs = {RENAMED.get(verb, verb) for verb in PLACES}
    assert verbs | set(BEYOND) == set(ew.PLACES)
    assert not verbs & set(BEYOND)


@pytest.mark.parametrize("verb", PLACES)
def test_options_agree_with_the_command_line(verb):
    """Every option is a parameter of the same name with the same default, and the other way round."""
    module, _, name = PLACES[verb][0].partition(":")
    called = command(getattr(import_module(f"elmwood.cli.{module}"), name))
    typed = options(computing(called) if PLACES[verb][0] in COMPUTING else called)
    known = {name: one.default for name, one in inspect.signature(getattr(ew, RENAMED.get(verb, verb))).parameters.items()}
    skipped = TERMINAL | MAPPING | OTHERWISE.get(verb, set())
    assert set(typed) - skipped <= set(known)
    assert set(known) - skipped - CALLED <= set(typed)
    for option in set(typed) - skipped - CALLED:
        mine, theirs = (None if one[option] in (inspect.Parameter.empty, (), []) else one[option] for one in (known, typed))
        assert mine == theirs, f"{option}: {mine!r} in Python, {theirs!r} on the command line"


class Asked(Exception):
    """A store was asked for, while this device was named."""


class NoStore:
    """Given as a store, says which device is named where a function opens it, which all do before they compute."""

    def __fspath__(self):
        raise Asked(named_device())


@pytest.mark.parametrize("name", sorted(set(ew.PLACES) - set(NOT_COMPUTING)))
def test_functions_that_compute_do_so_where_they_are_told(name, monkeypatch):
    monkeypatch.setenv("ELMWOOD_DEVICE", "cpu")
    known = inspect.signature(getattr(ew, name)).parameters
    given = ["x" for one in known.values() if one.default is one.empty]
    for device, said in (("cuda:1", "cuda:1"), (None, "cpu")):
        with pytest.raises(Asked, match=f"^{said}$"):
            getattr(ew, name)(*given, store=NoStore(), device=device)
    assert named_device() == "cpu"


@pytest.mark.parametrize("name", NOT_COMPUTING)
def test_functions_that_run_no_model_take_no_device(name):
    assert ("device" in inspect.signature(getattr(ew, name)).parameters) == (name == "fit")


def options(called: Callable[..., None]) -> dict[str, Any]:
    """The arguments and options of a command, as they are typed, with their defaults."""
    found = {}
    for parameter in inspect.signature(called).parameters.values():
        # typer keeps the first spelling, Option("--json"), where a default would be
        declared = [flag for one in get_args(parameter.annotation)[1:] if isinstance(one, ParameterInfo) for flag in flags(one)]
        spelled = next((flag[2:] for flag in declared if flag.startswith("--")), parameter.name)
        found[spelled.replace("-", "_")] = parameter.default
    return found
