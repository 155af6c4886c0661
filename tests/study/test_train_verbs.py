"""The verbs of training, as they are typed: recipes, groups, adapters made elsewhere."""

import json
import shlex
import signal

import pytest
from tiny_models import save_adapter
from typer.testing import CliRunner

from elmwood.cli import app
from elmwood.corpus.build import documents
from elmwood.errors import BadInput, ElmwoodError, UnknownName
from elmwood.lm.experts import Experts
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model
from elmwood.records import Expert, Mixture, Partition, Recipe, Seed
from elmwood.store import Store

SHORT = ["--tokens", "500", "--length", "32", "--batch", "4", "--rank", "4", "--workers", "1"]


def typed(home: Store, *words: str) -> str:
    """Run a command in this process; its stdout. Raises what it raises."""
    done = CliRunner().invoke(app, [*words, *([] if "--store" in words else ["--store", str(home.root)])])
    if done.exception:
        raise done.exception
    return done.stdout


def trained(home: Store, *words: str) -> list[str]:
    return [line.split()[0] for line in typed(home, "train", "domains", "--seed", "seed", *SHORT, *words).splitlines()]


def test_every_option_reaches_the_recipe(home):
    words = "--domains 1 --learning-rate 0.01 --schedule wsd --alpha 8 --targets q_proj,v_proj --late 0.5 --accumulate 2 --checkpointing"
    (digest,) = trained(home, *words.split(), "--patience", "9", "--rng-seed", "3", "--name", "all")
    assert home.load("all/1", Expert).digest == digest
    assert home.load(digest, Expert).recipe == Recipe(
        method="lora", steps=3, batch=4, length=32, learning_rate=0.01, schedule="wsd", rank=4, alpha=8, targets=("q_proj", "v_proj"),
        late=0.5, accumulate=2, checkpointing=True, patience=9, rng_seed=3, threads=1,
    )  # fmt: skip


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from elmwood.cli import main
def watch():
    while not list(Path(sys.argv[-1], "logs").glob("*.jsonl")):
        threading.Event().wait(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
main()
"""


def test_a_seed_whose_training_is_killed_goes_on_to_the_same_digest(home, forked, tmp_path):
    """A process is killed as soon as it trains; this one goes on."""
    sizes = ["--tokens", "60k", "--width", "32", "--layers", "2", "--length", "64", "--vocabulary", "300"]
    command = ["seed", "train", str(home.root.parent / "text.jsonl"), *sizes, "--store"]
    whole = typed(home, *command, str(tmp_path / "whole"))
    assert forked(KILLED, *command, str(tmp_path / "killed"), cwd=tmp_path).returncode == -signal.SIGKILL
    assert whole == typed(home, *command, str(tmp_path / "killed"))


@pytest.mark.parametrize("together", ["1", "2"])
def test_the_command_of_each_task_makes_the_same_expert(home, together):
    made = trained(home, "--together", together)
    assert len(set(made)) == 3
    printed = typed(home, "train", "domains", "--seed", "seed", *SHORT, "--together", together, "--commands").splitlines()
    assert len(printed) == {"1": 3, "2": 2}[together]
    again = Store(home.root.with_name(f"again-{together}"))
    for path in home.root.rglob("*"):
        if path.is_file() and "done" not in path.parts:
            place = again.root / path.relative_to(home.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    alone = [typed(again, *shlex.split(line)[1:-2], "--store", str(again.root)) for line in printed]
    assert [line.split()[0] for one in alone for line in one.splitlines()] == made


def test_ray_makes_the_same_experts(home, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    whole = trained(home, "--domains", "0,2", "--rng-seed", "7")
    for done in (home.root / "refs" / "done").iterdir():
        done.unlink()
    try:
        assert trained(home, "--domains", "0,2", "--rng-seed", "7", "--engine", "ray") == whole
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--method foo", "--method foo"),
        ("--late 0", "--late 0"),
        ("--together 2 --method dora", "dora"),
        ("--domains 9", "numbered from 0"),
    ],
)
def test_what_cannot_be_is_named(home, words, named):
    with pytest.raises(BadInput, match=named):
        trained(home, *words.split())


def test_an_adapter_made_elsewhere_is_adopted(home, tmp_path):
    seed = home.load("seed", Seed)
    save_adapter(load_model(seed, home, device="cpu"), str(tmp_path), 0, r=4, lora_alpha=8, target_modules=["q_proj"])
    typed(home, "adopt", str(tmp_path), "--seed", "seed", "--partition", "domains", "--domain", "2", "--name", "found")
    expert = home.load("found", Expert)
    assert (expert.seed, expert.domain, expert.recipe.rank) == (seed.digest, 2, 4)
    assert "found" in typed(home, "show")
    for words in (["--domain", "2"], ["--partition", "domains"], ["--partition", "domains", "--domain", "3"]):
        with pytest.raises(ElmwoodError):
            typed(home, "adopt", str(tmp_path), "--seed", "seed", *words)


def test_a_seed_from_a_gguf_file_is_trained_and_speaks(home, tmp_path):
    typed(home, "export", "seed", str(tmp_path / "out"), "--format", "gguf")
    typed(home, "seed", "import", str(tmp_path / "out" / "model.gguf"), "--name", "found")
    (digest,) = trained(home, "--seed", "found", "--domains", "1", "--learning-rate", "0.05", "--name", "grown")
    seed, expert = home.load("found", Seed), home.load("grown/1", Expert)
    assert (expert.digest, expert.seed, seed.digest == home.load("seed", Seed).digest) == (digest, seed.digest, False)
    own = [document.text for document in documents(home.load("domains", Partition).domains[1].holdout, home)]
    tokens_T = [seed.separator, *tokenizer(seed, home).encode(own[0], add_special_tokens=False).ids][: seed.context]
    lms = Experts(seed, [expert], home, device="cpu")
    assert lms.score(0, [tokens_T]).sum() > lms.score(1, [tokens_T]).sum() + 1  # nats, over text that nobody trained on
    first, other = (typed(home, "chat", name, "--prompt", own[0][:8], "--max-tokens", "8", "--json") for name in ("grown/1", "found"))
    assert json.loads(first)["text"] != json.loads(other)["text"]


def test_a_mixture_is_tuned_under_its_own_name_and_again(home):
    trained(home, "--name", "part")
    typed(home, "forest", "domains", "part/", "--name", "parts")
    typed(home, "mix", "parts", "--gates", "random", "--name", "mixed")
    words = ("train", "mixed", "--method", "router", "--tokens", "128", "--batch", "2", "--length", "32", "--name")
    first = typed(home, *words, "tuned")
    assert typed(home, *words, "tuned") == first
    with pytest.raises(UnknownName, match="other names begin with 'part/'"):
        typed(home, *words, "part", "--rng-seed", "1")
    assert sum(isinstance(home.read(digest), Mixture) for digest in home.records()) == 2  # it was refused before the work
