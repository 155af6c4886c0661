"""`import elmwood as ew`: the verbs of the command line as functions, imported when they are used."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import elmwood as ew

HOUSE = Path(ew.__file__).parent
ROOMS = {path.name for path in HOUSE.iterdir() if path.is_dir()}


def test_importing_elmwood_is_free():
    script = "import sys; before = set(sys.modules); import elmwood; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names} == {"elmwood"}


def test_names_are_listed_and_found():
    assert sorted(ew.__all__) == sorted(ew.FACE) == sorted(set(dir(ew)) & set(ew.FACE))
    for name, module in ew.FACE.items():
        assert getattr(ew, name) is getattr(import_module(module), name), name
    with pytest.raises(AttributeError, match="it has Store"):
        _ = ew.absent


def test_the_type_checker_sees_the_same_names():
    """The names under TYPE_CHECKING, with the modules they come from."""
    tree = ast.parse((HOUSE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == ew.FACE


@pytest.mark.parametrize("name", sorted(ew.FACE))
def test_functions_are_typed_and_documented(name):
    found = getattr(ew, name)
    assert inspect.getdoc(found)
    if inspect.isfunction(found):
        signature = inspect.signature(found)
        untyped = [one.name for one in signature.parameters.values() if one.annotation is one.empty]
        assert not untyped
        assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", sorted(set(ew.FACE) & ROOMS))
def test_a_verb_keeps_the_name_it_shares_with_a_room(name):
    """Whatever is imported first, `ew.merge` is the verb."""
    import_module(f"elmwood.{name}")
    script = f"import elmwood.{name}, elmwood as ew; assert callable(ew.{name}); import elmwood.{name}; assert callable(ew.{name})"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert not isinstance(getattr(ew, name), ModuleType)
