"""The package as others get it: what it declares, what its wheel and sdist hold, and that they run without the repository."""

import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_seed

import elmwood
from elmwood.store import Store
from elmwood.train.tasks import TRACKERS

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "elmwood"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "report.html")
TOPICS = ("the river carries a boat past the mill", "int main returns a value without error", "boil the onions and stir the soup")


def distributions(requirements: list[str]) -> set[str]:
    """The names of requirements, spelled one way."""
    return {normal(re.split(r"[\s<>=!~;\[]", requirement)[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def provider(module: str) -> str:
    """The distribution that a module comes with; one that is not installed here is taken to be named as its module."""
    return normal(installed().get(module, [module])[0])


@cache
def installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def imported() -> dict[str, set[str | None]]:
    """Distribution -> the extras through which the package asks for it; None stands for a plain import.

    Importing `elmwood.hub` asks for the extra `hub`, so its modules may import plainly what that brings.
    """
    found: dict[str, set[str | None]] = {}
    extras = PROJECT["optional-dependencies"]
    for path in HOUSE.rglob("*.py"):
        own = distributions([*extras["hub"], *extras["postgres"]]) if "hub" in path.relative_to(HOUSE).parts else set()
        for node in ast.walk(ast.parse(path.read_text())):
            for module, extra in asked(node):
                top = module.split(".")[0]
                if top not in {*sys.stdlib_module_names, "elmwood"}:
                    if extra is None and (name := provider(top)) in own:
                        extra = "hub" if name in distributions(extras["hub"]) else "postgres"
                    found.setdefault(provider(top), set()).add(extra)
    found.setdefault(provider("s3fs"), set()).add("s3")  # fsspec imports it for s3://
    for name in ("httptools", "uvloop"):  # uvicorn imports them
        found.setdefault(name, set()).add("hub")
    for name, module in TRACKERS.items():
        found.setdefault(provider(module), set()).add(name)
    return found


def asked(node: ast.AST) -> list[tuple[str, str | None]]:
    """Modules that one node of the syntax tree imports, with the extra it names."""
    if isinstance(node, ast.Import):
        return [(alias.name, None) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "", None)]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "require" and isinstance(node.args[0], ast.Constant):
        return [(str(node.args[0].value), str(ast.literal_eval(node.args[1])))]
    return []


def test_every_import_is_declared():
    plain, extras = distributions(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    for name, ways in imported().items():
        named = {way for way in ways if way is not None}
        assert name in plain or named, f"{name} is imported and not declared"
        for extra in named:
            assert name in distributions(extras[extra]), f"{name} is asked for as extra {extra}, which does not bring it"


def test_every_declared_dependency_is_imported():
    found = imported()
    used = {name for name, ways in found.items() if None in ways}
    assert distributions(PROJECT["dependencies"]) <= used
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra not in ("dev", "docs"):  # tools, which nothing imports
            assert distributions(requirements) - {"elmwood"} <= set(found), f"extra {extra} brings what nothing imports"


def test_the_constraints_pin_every_dependency():
    pinned = distributions((ROOT / "constraints.txt").read_text().split())
    assert distributions(PROJECT["dependencies"]) <= pinned


def test_the_citation_and_the_interpreters_agree_with_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == elmwood.__version__
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    said = {row.rpartition(" ")[2] for row in PROJECT["classifiers"] if row.startswith("Programming Language :: Python :: 3.")}
    assert set(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == said
    assert PROJECT["requires-python"] == f">={min(said, key=lambda one: int(one.split('.')[1]))}"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of a copy of this tree, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT)
    hook(folder / "tree", "sdist", folder)
    sdist = next(folder.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    hook(next((folder / "unpacked").iterdir()), "wheel", folder)
    return sdist, next(folder.glob("*.whl"))


def hook(tree: Path, form: str, into: Path) -> None:
    """What `python -m build` calls (PEP 517), with the setuptools of this environment."""
    script = f"from setuptools import build_meta; build_meta.build_{form}({str(into)!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_the_wheel_holds_the_package_and_nothing_else(built):
    """Every module, the sample corpus and its notices, templates, styles, py.typed."""
    own = {path.relative_to(ROOT).as_posix() for path in HOUSE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        beside = {name.partition(".dist-info/")[2] for name in wheel.namelist()} - {""}
    assert names == own
    assert {"elmwood/py.typed", "elmwood/corpus/sample/NOTICE", "elmwood/report/page.jinja", "elmwood/report/page.css"} <= own
    assert {"licenses/LICENSE", "licenses/elmwood/corpus/sample/NOTICE", "entry_points.txt"} <= beside


def test_the_sdist_holds_what_tests_it(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for part in ("tests", "docs", "benches", "examples") for path in (ROOT / part).rglob("*")]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix in (".py", ".md", ".svg", ".ipynb")}
    assert wanted <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "Makefile", "pyproject.toml"} <= names


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory) -> Path:
    """A fresh environment with the wheel in it, which sees the libraries of this one but not the repository."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(built[1])]
    subprocess.run([sys.executable, *install], check=True, env=outside())
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # a path only: no .pth file there is read
    return folder


def outside() -> dict[str, str]:
    """The environment without anything that leads back to the repository."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def run(elsewhere: Path, *words: str) -> str:
    (elsewhere / "empty").mkdir(exist_ok=True)
    command = [str(elsewhere / "venv" / "bin" / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=elsewhere / "empty", env=outside(), capture_output=True, text=True)
    assert not done.returncode, f"{' '.join(words)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_installed_package_is_not_the_repository(elsewhere):
    where = run(elsewhere, "python", "-c", "import elmwood, elmwood.cli; print(elmwood.__file__)")
    assert Path(where.strip()).is_relative_to(elsewhere / "venv")
    assert run(elsewhere, "elmwood", "--version").strip() == elmwood.__version__
    assert run(elsewhere, "elmwood", "show").strip() == ""


def test_the_installed_package_runs_the_demo(elsewhere):
    """The whole experiment on a corpus and a seed so small that it takes seconds, and the page at its end."""
    (elsewhere / "empty").mkdir(exist_ok=True)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(TOPICS[n % len(TOPICS)].split(), k=120)) + f" {n}" for n in range(90)]
    (elsewhere / "empty" / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = Store(elsewhere / "empty" / ".elmwood")
    store.name("seed", tiny_seed(store).digest)  # made here: each command there imports torch anew
    small = ["--corpus", "text.jsonl", "--seed", "seed", "--domains", "2", "--tokens", "8k", "--workers", "1"]
    table = json.loads(run(elsewhere, "elmwood", "demo", "--quick", *small, "--json"))
    assert {"seed", "uniform routing", "oracle routing"} <= {row["name"] for row in table["rows"]}
    assert "oracle routing" in (elsewhere / "empty" / "report.html").read_text()
    assert "demo/forest" in run(elsewhere, "elmwood", "show")
