"""The story, end to end, as a newcomer types it: real files, nothing but the command line. Commands that run models share this process,
since torch takes seconds to import; the demo and the verbs also run as processes of their own in tests/house/test_package.py."""

import io
import json
import re
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from sources import write_sample
from transformers import AutoModelForCausalLM, AutoTokenizer

from elmwood import cli
from elmwood.study.demo_seed import PACKAGED

WITHOUT_TORCH = """
import sys
from elmwood.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules, "torch was loaded where nothing had to be run"
"""


def elmwood(*words: str, cwd: Path, fails: bool = False, known: bool = False, alone: bool = False) -> str:
    """Run one command; its stdout, or its stderr where it is meant to fail. `alone`: in a process of its own. `known`: there too, and
    since all is known already, it never waits for torch."""
    code, out, err = run_alone(words, cwd, known) if alone or known else run_here(words, cwd)
    assert (code != 0) == fails, f"elmwood {' '.join(words)}:\n{out}\n{err}"
    return err if fails else out


def run_alone(words: tuple[str, ...], cwd: Path, known: bool = False) -> tuple[int, str, str]:
    how = ["-c", WITHOUT_TORCH] if known else ["-m", "elmwood"]
    done = subprocess.run([sys.executable, *how, *words], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def run_here(words: tuple[str, ...], cwd: Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["elmwood", *words])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


SIZE = ("--domains", "3", "--tokens", "14k", "--learning-rate", "5e-4")
QUICK = ("demo", "--quick", "--corpus", "small.jsonl", "--seed", "packaged", *SIZE, "--workers", "1")


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder in which the demo has run, on a little of its text (how it takes its own seed: tests/study/test_demo.py)."""
    folder = tmp_path_factory.mktemp("story")
    write_sample(folder / "small.jsonl")
    elmwood("seed", "import", str(PACKAGED), "--name", "packaged", cwd=folder)
    elmwood(*QUICK, cwd=folder)
    return folder


def files(here: Path) -> dict[Path, int]:
    """Blobs and logs, and when they were written."""
    return {path: path.stat().st_mtime_ns for part in ("blobs", "logs") for path in (here / ".elmwood" / part).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def again(here) -> tuple[dict, bool]:
    """The table of a second run, and whether it wrote a blob or a task logged anything."""
    before = files(here)
    table = json.loads(elmwood(*QUICK, "--json", cwd=here, known=True))
    return table, files(here) != before


def test_the_demo_shows_every_control(again):
    table, _ = again
    rows = {row["name"]: row for row in table["rows"]}
    for part in ("seed", "experts' batch", "a batch between", "k times the batch", "random clusters, live", "uniform routing", "oracle",
                 "live routing, top-1", "live routing, top-2", "posterior"):  # fmt: skip
        assert any(part in name for name in rows), part
    k = len(table["routing"])
    assert len({row["tokens"] for row in rows.values() if row["tokens"]}) == 1, "every side trains on as many tokens"
    assert all(row["standard_error"] > 0 and len(row["domains"]) == k for row in rows.values())
    assert all(row["machine_seconds"] >= row["wall_seconds"] > 0 for row in rows.values() if row["tokens"])
    # what four steps are enough for: the experts that are near the text do no harm, where all alike do; a gain takes more of them
    others = ("uniform routing", "oracle routing", *(name for name in rows if name.startswith("dense") and "+" not in name))
    chosen = rows[table["chosen"]]["bits_per_byte"]
    assert chosen < min(rows[name]["bits_per_byte"] for name in others)
    assert chosen < rows["seed"]["bits_per_byte"] + 1e-3


def test_running_it_again_reuses_everything(again):
    _, wrote = again
    assert not wrote


def test_the_report_stands_alone(here):
    page = (here / "report.html").read_text()
    assert "oracle routing" in page
    fetched = re.search(r"""(?:src|href|action)=["'](?!\#|data:)|url\((?!\#|["']?data:)|@import|<script|<link""", page)
    assert not fetched, page[fetched.start() - 80 : fetched.end() + 80]  # an address within a document's text is only text


def test_show_verify_and_damage(here, tmp_path):
    assert "demo/forest" in elmwood("show", cwd=here, known=True)
    lineage = elmwood("show", "demo/forest", cwd=here, alone=True)
    assert lineage.count("expert") >= 3
    assert "corpus" in lineage
    assert elmwood("verify", cwd=here, alone=True) == ""
    tokenizer = next(path for path in (here / ".elmwood" / "blobs").rglob("*") if path.is_file() and path.read_bytes()[:1] == b"{")
    original = tokenizer.read_bytes()
    tokenizer.write_bytes(original + b" ")
    assert tokenizer.name in run_here(("verify",), here)[1]
    tokenizer.write_bytes(original)
    elmwood("verify", cwd=here)


def test_chat_says_who_spoke(here, forked):
    said = json.loads(elmwood("chat", "demo/ensemble", "--prompt", "func main() {", "--max-tokens", "12", "--json", cwd=here))
    assert said["text"]
    assert sum(said["experts"].values()) == pytest.approx(1, abs=1e-3)
    words = ("chat", "demo/ensemble", "--prompt", "func main() {", "--max-tokens", "12", "--json")
    again = json.loads(forked("from elmwood.cli import main; main()", *words, cwd=here).stdout)  # another process says the same
    assert said == again


def test_eval_agrees_with_the_demo(here, again):
    table, _ = again
    rows = {row["name"]: row["bits_per_byte"] for row in table["rows"]}
    forest = json.loads(elmwood("eval", "demo/forest", "--documents", "40", "--json", cwd=here, known=True))
    found = {row["name"]: row["bits_per_byte"] for row in forest["rows"]}
    assert {name: rows[name] for name in found} == found
    live = json.loads(elmwood("eval", "demo/ensemble", "demo/seed", "--documents", "40", "--json", cwd=here))
    better = elmwood("compare", "demo/seed", "demo/ensemble", "--documents", "40", "--json", cwd=here, known=True)
    assert json.loads(better)["models_run"] == 0
    # as the table has it, but for documents of several windows: a live window also counts the tokens carried into it
    assert live["rows"][0]["bits_per_byte"] == pytest.approx(rows[table["chosen"]], abs=2e-3)
    assert live["rows"][1]["bits_per_byte"] == pytest.approx(rows["seed"], abs=1e-6)


def test_your_own_text_your_own_seed_lora(here, tmp_path):
    """The verbs one by one: cluster, import, train, forest, eval, chat, export, fit."""
    text = here / "notes"
    text.mkdir()
    for number in range(40):
        words = ("the river and the boat", "int main returns value")[number % 2]
        (text / f"{number}.txt").write_text(f"{words} {number} " * 30 + f"unlike note {number * 7919}")
    elmwood("export", "demo/seed", "seed-folder", cwd=here)
    model = AutoModelForCausalLM.from_pretrained(here / "seed-folder")
    tokenizer = AutoTokenizer.from_pretrained(here / "seed-folder")
    assert model(torch.tensor([tokenizer.encode("the river")])).logits.isfinite().all()

    elmwood("seed", "import", "seed-folder", "--name", "mine/seed", cwd=here)
    elmwood("cluster", "notes", "--domains", "2", "--holdout", "0.3", "--name", "mine/domains", cwd=here)
    size = ("--tokens", "8k", "--length", "64", "--workers", "1")
    elmwood("train", "mine/domains", "--seed", "mine/seed", *size, "--name", "mine/expert", cwd=here)
    elmwood("forest", "mine/domains", "mine/expert/", "--name", "mine/forest", cwd=here)
    table = json.loads(elmwood("eval", "mine/forest", "--name", "mine/ensemble", "--json", cwd=here))
    rows = {row["name"]: row["bits_per_byte"] for row in table["rows"]}
    assert rows["oracle routing"] < rows["seed"]
    said = json.loads(elmwood("chat", "mine/ensemble", "--prompt", "the river and the boat", "--max-tokens", "8", "--json", cwd=here))
    assert max(said["experts"].values()) > 0.5, "the text is near one of the two domains"
    elmwood("export", "mine/expert/0", "adapter", cwd=here)
    assert (here / "adapter" / "adapter_model.safetensors").is_file()
    answer = json.loads(elmwood("fit", "mine/seed", "--memory", "24GB", "--json", cwd=here))
    assert answer["fits"] is True


def test_errors_are_one_line_with_the_cure(here):
    for words, part in (
        (["show", "absent"], "elmwood show"),
        (["cluster", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["cluster", "small.jsonl", "--domains", "5000"], "fewer"),
        (["export", "demo/seed", ".elmwood"], "never overwrites"),
        (["train", "demo/partition", "--seed", "demo/seed", "--domains", "9"], "numbered from 0"),
        (["seed", "import", ".elmwood"], "config.json"),
    ):
        said = elmwood(*words, cwd=here, fails=True)
        assert part in said, said
        assert "Traceback" not in said
