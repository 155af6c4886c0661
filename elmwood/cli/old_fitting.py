"""What the verb `fit` does: say what training will take, and look."""

from typing import Any

from elmwood.cli.old_training import checked
from elmwood.cli.screen import count, duration, emit, out, short, table
from elmwood.engine import cores
from elmwood.errors import BadInput
from elmwood.records import Mixture, Recipe, Seed
from elmwood.store import Store


def fit(*, seed, length, memory, device, measure, table, tuned, store, as_json, **how) -> None:
    from elmwood.lm.load import best_device  # torch
    from elmwood.train.fit.predict import config_of
    from elmwood.train.fit.predict import fit as predict

    if table:
        return print_cards(as_json)
    if seed is None:
        raise BadInput("fit needs a seed: name one, a folder with its config.json, or a hub id; or ask for --table")
    home = Store(store)
    here = home.load(seed) if seed in home.names() or len(seed) == 64 else None
    if isinstance(here, Mixture) or how["method"] == "router":
        return fit_tuning(
            seed, here, home, length=length, memory=memory, device=device, measure=measure, tuned=tuned, as_json=as_json, **how
        )
    known = home.load(seed, Seed) if here else None
    length = length or min(known.context if known else 1024, 1024)
    recipe = checked(steps=1, length=length, threads=cores(), **how)
    answer = predict(known or seed, recipe, home, memory=memory and count(memory), device=device)
    found, told = None, 0
    if measure:
        from elmwood.train.fit.measure import foretold
        from elmwood.train.fit.measure import measure as take

        if answer.device != best_device().type:
            raise BadInput(f"there is no {answer.device} here to measure on: leave --device out")
        found = take(known or config_of(seed, home), recipe, home, answer.device)
        told = foretold(answer.components, found)
    if as_json:
        emit(answer.model_dump(mode="json") | ({"measured": found._asdict() | {"predicted": told}} if found else {}))
        return
    print_fit(seed, recipe, answer, found, told)


def fit_tuning(name, mixture, home, *, length, memory, device, measure, tuned, as_json, **how) -> None:
    """As `fit`, of a mixture that is tuned."""
    from elmwood.train.fit.mixture import fit_mixture  # torch

    if not isinstance(mixture, Mixture):
        raise BadInput(f"{name} is no mixture, and routers are of mixtures: make one with `elmwood mix`, or ask for another --method")
    if measure:
        raise BadInput("--measure is of seeds and experts: of a mixture there is a prediction only; leave it out")
    length = length or min(home.load(mixture.seed, Seed).context, 1024)
    kept = {option: how[option] for option in ("method", "batch", "accumulate", "optimiser", "checkpointing")}
    if wrong := [option for option in ("optimiser", "checkpointing") if kept[option] != Recipe.model_fields[option].default]:
        raise BadInput(f"--{wrong[0]}: predictions for mixtures do not know it yet; leave it out")
    answer = fit_mixture(
        mixture, checked(steps=1, length=length, threads=cores(), tuned=tuned, **kept), home, memory=memory and count(memory), device=device
    )  # fmt: skip
    if as_json:
        emit(answer.model_dump(mode="json"))
        return
    rows = [(what, short(size) + "B") for what, size in answer.components.items() if size]
    title = f"{tuned} of {name}: {short(answer.parameters)} parameters, {short(answer.trained)} of them tuned"
    table(title, (f"peak memory, {answer.device}", ""), [*rows, ("total", short(answer.total) + "B")])
    if answer.tokens_per_second:
        speed = answer.tokens_per_second
        out.print(f"{short(speed)} tokens/s here; a million tokens take {duration(1e6 / speed)}")
    out.print(answer.verdict)


def print_fit(seed: str, recipe: Any, answer: Any, found: Any, told: int) -> None:
    """The components, the time, the verdict; and what two steps really took."""
    rows = [(what, short(size) + "B") for what, size in answer.components.items() if size]
    title = f"{recipe.method} on {seed}: {short(answer.parameters)} parameters, {short(answer.trained)} of them trained"
    if recipe.method != "full":
        title = f"{recipe.method} on {seed}: {short(answer.parameters)} parameters and {short(answer.trained)} that are trained"
    table(title, (f"peak memory, {answer.device}", ""), [*rows, ("total", short(answer.total) + "B")])
    speed = answer.tokens_per_second
    if speed:
        out.print(f"{short(speed)} tokens/s here; a million tokens take {duration(1e6 / speed)}")
    if found:
        off = told / found.peak - 1
        out.print(
            f"measured over two steps: {short(found.peak)}B, prediction {off:+.1%}; {short(found.tokens_per_second)} tokens/s", end=""
        )
        out.print(f", prediction {speed / found.tokens_per_second - 1:+.0%}" if speed else "")
    out.print(answer.verdict)


MARKS = {(True, "adamw"): "¹", (True, "adamw8bit"): "²", (False, "adamw"): ""}
NAMES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def print_cards(as_json: bool) -> None:
    """The table of docs/training.md, as Markdown."""
    from elmwood.train.fit.gpu_table import MEMORY, cards  # torch

    found = cards()
    if as_json:
        plain = {
            name: [choice and choice._asdict() | {"recipe": choice.recipe.model_dump(mode="json")} for choice in row] for name, row in found
        }
        emit(plain)
        return
    out.print("| seed | " + " | ".join(f"{memory} GB" for memory in MEMORY) + " |", soft_wrap=True)
    out.print("|---" * (len(MEMORY) + 1) + "|", soft_wrap=True)
    for name, row in found:
        out.print(f"| {name} | " + " | ".join(cell(choice) for choice in row) + " |", soft_wrap=True)


def cell(choice: Any) -> str:
    """'LoRA¹ 5.4': the recipe and its gigabytes."""
    if choice is None:
        return "no"
    mark = MARKS[choice.recipe.checkpointing, choice.recipe.optimiser]
    return f"{NAMES[choice.recipe.method]}{mark} {choice.total / 1e9:.1f}"
