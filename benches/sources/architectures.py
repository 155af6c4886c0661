"""Which seeds can be used for what: tiny models of many architectures, storage forms and tokenizers through the whole path.

    python -m benches.sources.architectures [ROW …] [--write docs/seeds.md]

Each row makes a checkpoint of random weights with transformers, imports it, grows a LoRA and a full expert, scores and continues
text, merges both, exports them, and holds every log-probability against plain transformers and PEFT. Prints a JSON line for each
row: `""` is as good as the reference, other texts are the reason that elmwood gives. `--write` puts the table into a page.
"""

import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benches.common import parser, say
from benches.sources.architecture_cases import CASES, TEXTS, make_checkpoint
from elmwood.corpus.build import build
from elmwood.errors import ElmwoodError
from elmwood.lm.experts import Experts
from elmwood.lm.files import tokenizer
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.export.folder import export
from elmwood.merge.layer_weights import everywhere
from elmwood.records import Corpus, Expert, Recipe, Seed
from elmwood.store import Store
from elmwood.study.seeds import import_seed
from elmwood.study.trial import check_use
from elmwood.train.tasks import train

EQUAL, NEAR = 1e-5, 1e-2  # largest difference, as a share of the largest log-probability: of float32; of half precision, which rounds
MOVED = 1e-3  # an expert must change some log-probability by more, or its row would prove nothing


class Row(NamedTuple):
    """What came out: by use, "" where it equals the reference, else the reason why not."""

    name: str
    uses: Mapping[str, str]
    seconds: float


UNREACHED = "not reached"  # since what it needs was refused
USES = ("import", "lora", "full", "merge", "chat", "transformers", "peft", "gguf")


# ---- the path ---------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """What the steps of one row share."""

    folder: Path
    store: Store
    seed: Seed
    corpus: Corpus
    tokens_BT: torch.Tensor
    equal: float


def run(name: str, store: Store, corpus: Corpus, folder: Path) -> Row:
    """The whole path of one row. Raises AssertionError where a number is not that of the reference."""
    started, uses, case = process_time(), dict.fromkeys(USES, UNREACHED), CASES[name]
    make_checkpoint(case, folder / "seed")
    if seed := attempt(uses, "import", lambda: import_seed(str(folder / "seed"), store)):
        equal = EQUAL if case.dtype is torch.float32 else NEAR
        _path(Made(folder, store, seed, corpus, some_tokens(seed, store), equal), uses)
    return Row(name, uses, process_time() - started)


def attempt(uses: dict[str, str], use: str, step: Callable[[], Any]) -> Any:
    """What a step returns; None where it is refused, with the reason noted."""
    try:
        made = step()
        uses[use] = ""
        return made
    except ElmwoodError as error:
        uses[use] = " ".join(str(error).split())


def some_tokens(seed: Seed, store: Store) -> torch.Tensor:
    """Two rows of text, each after the separator."""
    words = tokenizer(seed, store)
    rows = [[seed.separator, *words.encode(text * 2, add_special_tokens=False).ids][:40] for text in TEXTS[:2]]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


def _path(at: Made, uses: dict[str, str]) -> None:
    original = _open(at.folder / "seed")
    wanted_BT = logp(original, at.tokens_BT)
    grown = {method: attempt(uses, method, lambda method=method: grow(at, method)) for method in ("lora", "full")}  # type: ignore[misc]
    experts = [one for one in grown.values() if one]
    held = Experts(at.seed, experts, at.store, "cpu")
    live = {one.recipe.method: held.score(held.experts.index(one), at.tokens_BT)[:, 1:] for one in experts}
    check(held.score(len(experts), at.tokens_BT)[:, 1:], wanted_BT, at.equal)
    for method, found_BT in live.items():
        assert float((found_BT - wanted_BT).abs().max()) > MOVED, f"{method} changes nothing"
    attempt(uses, "chat", lambda: follow(at, held))
    lora, full = grown["lora"], grown["full"]
    if full:
        state = attempt(uses, "transformers", lambda: whole(at, full, live["full"]))
        other = lora or grow(at, "full", rng_seed=1)
        attempt(uses, "merge", lambda: average(at, [full, other], [state, whole(at, other, live.get("lora"))], original))
    if lora:
        attempt(uses, "peft", lambda: adapter(at, lora, live["lora"]))
    attempt(uses, "gguf", lambda: export(at.seed, at.store, at.folder / "gguf", "gguf"))


def _open(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logp(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    """log p of each token but the first [B, T - 1], by plain transformers."""
    with torch.no_grad():
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits.float()
    return logits_BTV.log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]


def check(found: torch.Tensor, wanted: torch.Tensor, equal: float) -> None:
    """Equal but for rounding, which grows with the numbers. Raises AssertionError."""
    worst, largest = float((found - wanted).abs().max()), max(1.0, float(wanted.abs().max()))
    assert worst <= equal * largest, f"differs by {worst:.2g}, where the largest log-probability is {largest:.3g}"


def grow(at: Made, method: Any, rng_seed: int = 0) -> Expert:
    check_use(at.seed, method)
    recipe = Recipe(method=method, steps=2, batch=2, length=32, learning_rate=0.03, rank=2, rng_seed=rng_seed)
    return train(at.seed, at.corpus.train, recipe, at.store, device="cpu")


def follow(at: Made, held: Experts) -> None:
    """Text that grows a few tokens at a time has the log-probabilities of text that is read at once."""
    check_use(at.seed, "generate")
    active, text = list(range(len(held))), held.start()
    for first, last in ((0, 9), (9, 10), (10, 20), (20, 21)):
        logp_AV, _ = held.extend(active, at.tokens_BT[0, first:last].tolist(), text)
        for e in active:
            check(logp_AV[e, at.tokens_BT[0, last]], held.score(e, at.tokens_BT[:1, : last + 1])[0, -1], EQUAL)


def whole(at: Made, expert: Expert, live_BT: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
    """The parameters of an expert exported as a checkpoint; plain transformers gives with them what elmwood gives."""
    if expert.recipe.method == "lora":
        check_use(at.seed, "merge")
    out = at.folder / f"whole-{expert.digest[:8]}"
    export(expert, at.store, out, "transformers")
    model = _open(out)
    if live_BT is not None:
        check(logp(model, at.tokens_BT), live_BT, at.equal)
    return model.state_dict()


def average(at: Made, experts: Sequence[Expert], states: Sequence[Mapping[str, torch.Tensor]], model: Any) -> None:
    """The mean of both, against the mean of what plain transformers loads of each; `model` is changed for that."""
    check_use(at.seed, "merge")
    (made,) = merge(at.seed, {one.digest: everywhere(1.0) for one in experts}, [Answer("average", {})], at.store)
    export(made, at.store, at.folder / "merged", "transformers")
    found_BT = logp(_open(at.folder / "merged"), at.tokens_BT)
    model.load_state_dict({name: (one + states[1][name]) / 2 for name, one in states[0].items()})
    check(found_BT, logp(model, at.tokens_BT), at.equal)


def adapter(at: Made, expert: Expert, live_BT: torch.Tensor) -> None:
    """Exported as an adapter, PEFT over the original checkpoint gives what elmwood gives."""
    export(expert, at.store, at.folder / "adapter", "peft")
    check(logp(PeftModel.from_pretrained(_open(at.folder / "seed"), at.folder / "adapter"), at.tokens_BT), live_BT, at.equal)


def prepare(folder: Path) -> tuple[Store, Corpus]:
    """A store, and the text that experts are trained on."""
    (folder / "texts").mkdir()
    for n, words in enumerate(("sea captain crew harbour sails", "def read path return open", "pomme jardin maison café")):
        (folder / "texts" / f"{n}.txt").write_text(" ".join(f"{word} {word[::-1]}{i * n}" for i in range(9) for word in words.split()))
    store = Store(folder / "store")
    return store, build([str(folder / "texts")], store)


# ---- the table --------------------------------------------------------------------------------------------------

HEAD = "| | LoRA | full | merge | chat | transformers | PEFT | GGUF | remark |\n|---|---|---|---|---|---|---|---|---|"


def line(row: Row) -> str:
    """A row of the table, as Markdown: what is refused, and why."""
    cells = ["yes" if not row.uses[use] else "no" if row.uses[use] != UNREACHED else "" for use in USES[1:]]
    reasons = dict.fromkeys(_short(said) for use, said in row.uses.items() if said and said != UNREACHED and use != "gguf")
    return f"| {' | '.join([row.name, *cells, '; '.join(reasons)])} |"


def _short(said: str) -> str:
    """A reason without the place of a file and the name of a seed, up to its cure."""
    said = re.sub(r"^seed cannot [^:]*: ", "", re.sub(r"/\S*?/seed\b", "the folder", said))
    said = re.sub(r"^the folder:? ", "", said)
    return re.split("; use another seed|: ", said.replace("Error: ", "Error, "))[0].replace("|", "/").strip()[:200]


def write_table(page: Path, rows: Sequence[Row]) -> None:
    """Put these rows into the table between the two comments of a page; others stay as they are."""
    begin, end = "<!-- table: begin -->", "<!-- table: end -->"
    before, _, rest = page.read_text().partition(begin)
    old, _, after = rest.partition(end)
    lines = {one.split(" | ")[0][2:]: one for one in old.strip().splitlines()[2:]} | {row.name: line(row) for row in rows}
    table = "\n".join([HEAD, *(lines[name] for name in CASES if name in lines)])
    page.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("rows", nargs="*", metavar="ROW", help="default: all of them")
    options.add_argument("--write", type=Path, help="the page whose table gets these rows")
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        store, corpus = prepare(Path(scratch))
        for n, name in enumerate(chosen.rows or CASES):
            try:
                rows.append(run(name, store, corpus, Path(scratch) / str(n)))
                say("architectures", row=name, seconds=round(rows[-1].seconds, 2), **rows[-1].uses)
            except AssertionError as error:
                say("architectures", row=name, wrong=str(error))
            shutil.rmtree(Path(scratch) / str(n))
    if chosen.write:
        write_table(chosen.write, rows)


if __name__ == "__main__":
    main()
