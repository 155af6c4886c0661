"""The house stands: imports point down, and the torch-free half stays free of torch."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import elmwood

HOUSE = Path(__file__).parents[2] / "elmwood"
FLOORS = {
    "compiled": 1, "errors": 1, "ranges": 1, "records": 1, "registry": 1, "threads": 1, "units": 1,
    "store": 2, "engine": 2,
    "ahead": 3, "corpus": 3, "domains": 3, "lm": 3, "outer": 3, "weights": 3,
    "train": 4, "merge": 4, "ensemble": 4, "evaluate": 4, "report": 4,
    "study": 5,
    "hub": 6, "serve": 6,
    "cli": 7, "__main__": 8,
}  # fmt: skip
# Within a floor: rooms of the first three may use the ones below; here are the neighbours they may use beside that.
NEIGHBOURS = {
    ("records", "errors"), ("ranges", "errors"), ("registry", "errors"), ("units", "errors"),
    ("store", "engine"), ("domains", "corpus"), ("lm", "corpus"), ("weights", "lm"), ("outer", "weights"),
}  # fmt: skip
TORCH_FREE = {
    "ahead", "compiled", "errors", "ranges", "records", "registry", "threads", "units", "store", "engine",
    "corpus", "domains", "outer", "evaluate", "report", "study", "hub", "serve", "cli",
}  # fmt: skip
LIGHT = (
    "lm/files.py",
    "lm/checkpoint.py",
    "lm/adapters/peft_config.py",
    "lm/mixture_card.py",
    "train/seeds/shapes.py",
    "train/task_names.py",
    "ensemble/batch/interface.py",
    "ensemble/guide.py",
)  # of the other rooms
SLOW = ("torch", "transformers", "peft", "accelerate", "sklearn", "pandas", "datasets", "datasketch", "matplotlib", "numba")


def room(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


class Nodes(NamedTuple):
    """What the tests look at in a file."""

    imports: list[ast.Import | ast.ImportFrom]
    calls: list[ast.Call]

    @property
    def called(self) -> list[str]:
        return [ast.unparse(call.func) for call in self.calls if isinstance(call.func, ast.Name | ast.Attribute)]


@cache
def nodes(path: Path) -> Nodes:
    """Every file is read once for all tests."""
    found = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return Nodes(*([node for node in found if isinstance(node, kind)] for kind in ((ast.Import, ast.ImportFrom), ast.Call)))


@pytest.fixture(scope="module", autouse=True)
def forget():
    yield
    nodes.cache_clear()


def imports(path: Path) -> set[str]:
    """Rooms of ours that a file imports, anywhere in it."""
    names = []
    for node in nodes(path).imports:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path}: relative import; name the room"
            names += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "elmwood" else [node.module or ""]
    return {name.split(".")[1] for name in names if name.startswith("elmwood.") and name != "elmwood.__version__"}


def files() -> list[Path]:
    return [path for path in sorted(HOUSE.rglob("*.py")) if path != HOUSE / "__init__.py"]


def test_every_room_has_a_floor():
    assert {room(path) for path in files()} <= set(FLOORS)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(HOUSE).as_posix())
def test_imports_point_down(path):
    here = room(path)
    for there in imports(path) - {here}:
        assert FLOORS[there] < FLOORS[here] or (here, there) in NEIGHBOURS, f"{path.name} on floor {FLOORS[here]} imports {there}"


def test_torch_free_half_and_the_verbs_start_fast():
    """No room of the torch-free half and no module of a verb imports what takes a second or more: that waits for whoever needs it."""
    paths = [path for path in files() if room(path) in TORCH_FREE] + [HOUSE / path for path in LIGHT]
    modules = [".".join(("elmwood", *path.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__") for path in paths]
    assert {"elmwood.cli", "elmwood.study.quality.contest", "elmwood.evaluate.columns"} <= set(modules)
    script = """
import sys, importlib
slow, *modules = sys.argv[1:]
for name in modules:
    importlib.import_module(name)
    if found := set(slow.split(",")) & set(sys.modules):
        sys.exit(f"{name} imports {', '.join(sorted(found))}")
"""
    done = subprocess.run([sys.executable, "-c", script, ",".join(SLOW), *modules], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_nothing_is_pickled():
    for path in files():
        assert not {"torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dump", "joblib.load", "np.load"} & {
            *nodes(path).called
        }, path


def test_models_of_others_come_through_one_door():
    """Only lm/pretrained.py lets transformers and PEFT open files: no other module takes what opens them, or calls it."""
    openers = {"from_pretrained", "from_config", "_from_config", "load_adapter", "load_pretrained_model", "load_checkpoint_and_dispatch"}
    for path in files():
        if path == HOUSE / "lm" / "pretrained.py":
            continue
        for call in nodes(path).calls:
            called = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            assert called not in openers, f"{path}: {ast.unparse(call)[:80]}: go through elmwood.lm.pretrained"
        for node in nodes(path).imports:
            taken = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            found = [name for name in taken if name.startswith("Auto") or name in {"GenerationConfig", "PeftModel", "PeftConfig"}]
            assert not found or node.module.partition(".")[0] not in {"transformers", "peft"}, f"{path}: {found}: elmwood.lm.pretrained"


@pytest.mark.parametrize("path", [path for path in files() if room(path) != "cli"], ids=lambda path: path.relative_to(HOUSE).as_posix())
def test_only_the_command_line_prints(path):
    """Below it nothing writes to stdout or stderr, and nothing opens a progress bar: that is what `progress` is for."""
    for node in nodes(path).imports:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        assert not {name.partition(".")[0] for name in names} & {"rich", "tqdm", "typer", "click"}, path
    for called in nodes(path).called:
        assert not re.match(r"print$|sys\.std(out|err)\.", called), f"{path}: {called}"


# Tests of the command line, and those that type commands because a command is what they are about.
OF_THE_COMMAND_LINE = ("tests/cli/", "tests/house/test_docs.py", "tests/test_face.py", "tests/test_story.py")
OF_VERBS = ("tests/study/test_train_verbs.py", "tests/study/test_contest.py", "tests/study/test_admission_of_experts.py")


def test_benches_and_tests_use_the_library():
    """The command line is for people: no bench and no test imports it, but those that test it."""
    root = HOUSE.parent
    found = {
        path.relative_to(root).as_posix()
        for folder in ("benches", "tests")
        for path in (root / folder).rglob("*.py")
        if "cli" in imports(path)
    }
    found = {path for path in found if not path.startswith((*OF_THE_COMMAND_LINE, *OF_VERBS))}
    assert not found, f"import elmwood.study instead: {sorted(found)}"


def test_a_room_that_shares_its_name_with_a_verb_is_imported_by_its_modules():
    """`from elmwood import evaluate` gives the verb."""
    for path in [*HOUSE.rglob("*.py"), *HOUSE.parent.glob("tests/**/*.py"), *HOUSE.parent.glob("benches/**/*.py")]:
        for node in nodes(path).imports:
            if isinstance(node, ast.ImportFrom) and node.module == "elmwood":
                found = {alias.name for alias in node.names} & set(elmwood.PLACES) & set(FLOORS)
                assert not found, f"{path}: write `from elmwood.evaluate.comparison import Side`, not `from elmwood import {min(found)}`"


def test_text_files_have_their_encoding_named():
    """Else a locale without UTF-8 decides what is written."""
    for path in HOUSE.rglob("*.py"):
        for call in nodes(path).calls:
            if _opens_text(call):
                assert any(word.arg == "encoding" for word in call.keywords), f"{path}:{call.lineno} names no encoding"


def _opens_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in ("open", "fdopen"):
        return name in ("read_text", "write_text")
    place = 0 if name == "open" and isinstance(call.func, ast.Attribute) else 1  # of the mode: path.open("r"), open(path, "r")
    modes = [word.value for word in call.keywords if word.arg == "mode"] or call.args[place : place + 1]
    text = [one.value for one in modes if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return isinstance(call.func, ast.Name) if not modes else bool(text) and set(text[0]) <= set("rwaxt+")
