"""Verbs of training: seeds, experts, adapters made elsewhere, and what a run will take."""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from elmwood.cli.live_table import live_table
from elmwood.cli.options import (
    BELOW,
    CorpusArgument,
    EngineOption,
    ExpertsArgument,
    NameOption,
    Output,
    RecipeOptions,
    RngSeedOption,
    ScheduleOptions,
    WorkersOption,
    typed_options,
)
from elmwood.cli.screen import bars, emit, is_first, made, out, talk
from elmwood.cli.screen import table as draw
from elmwood.cli.text import print_corpus
from elmwood.engine import silent
from elmwood.errors import BadInput
from elmwood.records import Corpus
from elmwood.store import Store
from elmwood.study import fitting, mixing, seeds, training
from elmwood.study.trial import say_limits, why_no_gguf
from elmwood.train.seeds.shapes import SHAPES
from elmwood.units import duration, short

if TYPE_CHECKING:
    from elmwood.train.fit.gpu_table import CardRecipe

# options of `train` that say how experts branch from a seed, and nothing about a mixture
EXPERTS = {"seed", "domains", "rank", "alpha", "targets", "late", "together", "report_to", "statistics", "workers", "engine", "commands"}
EXPERTS |= {"checkpointed"}


def seed_import(
    model: Annotated[str, Argument(help="A transformers checkpoint folder, a GGUF file, or a hub id (downloads it).")],
    separator: Annotated[str | None, Option(help="The token before each document.")] = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Import a causal language model of transformers as a seed. It is tried: what it cannot be used for is said, with the reason."""
    with bars() as progress:
        seed = seeds.import_seed(model, separator=separator, name=name, store=output.store, progress=progress)
    for change in seed.changes:
        talk.print(change, soft_wrap=True)
    for line in say_limits(seed):
        talk.print(f"{seed.name} {line}", style="yellow", soft_wrap=True)
    if reason := why_no_gguf(seed, Store(output.store)):
        talk.print(f"{seed.name} cannot be exported to GGUF: {reason}", style="dim", soft_wrap=True)
    made(seed, name, output.as_json)


def seed_train(
    corpus: CorpusArgument,
    like: Annotated[str | None, Option(help=f"The shape of a published model: {', '.join(SHAPES)}.")] = None,
    config: Annotated[Path | None, Option(help="A config.json of transformers, of any causal LM.")] = None,
    mix: Annotated[list[str] | None, Option(help="A further corpus and its share of the text, e.g. code.jsonl=0.3 (repeatable).")] = None,
    tokens: Annotated[str, Option(help="Training tokens, e.g. 10M. 0: random weights, and a tokenizer.")] = "3M",
    layers: Annotated[int, Option(help="Transformer layers of a small Llama.")] = 3,
    width: Annotated[int, Option(help="Its width; heads and feed-forward follow from it.")] = 128,
    vocabulary: Annotated[
        int | None, Option(help="Of the byte-level BPE trained on the corpus. Default: 2048; with --like or --config, the config's.")
    ] = None,
    length: Annotated[int | None, Option(help="Tokens per sequence. Default: 256; with --like or --config, at most 1024.")] = None,
    batch: Annotated[int, Option(help="Sequences per step, of all processes together.")] = 8,
    learning_rate: Annotated[float | None, Option(help="Peak; default: 3e-3, less for larger shapes.")] = None,
    schedule: Annotated[str, Option(help="cosine, linear, constant or wsd.")] = "cosine",
    accumulate: Annotated[int, Option(help="Passes per step, whose gradients are added.")] = 1,
    checkpointing: Annotated[bool, Option("--checkpointing", help="Recompute activations: less memory, more time.")] = False,
    keep_every: Annotated[int | None, Option(help="Store a seed after every so many steps: NAME-step-500, ...")] = None,
    sharded: Annotated[bool, Option("--sharded", help="Under torchrun: divide the model among the processes (FSDP2).")] = False,
    rng_seed: RngSeedOption = 0,
    threads: Annotated[int | None, Option(help="CPU threads of a process: float sums, and so the digest, depend on them.")] = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Train a seed from scratch, with its own tokenizer: a small Llama or any architecture, also under torchrun."""
    store, first = Store(output.store), is_first()
    with bars() if first else nullcontext(silent) as progress:
        seed = seeds.train_seed(
            corpus, like=like, config=config, mix=mix or (), tokens=tokens, layers=layers, width=width, vocabulary=vocabulary,
            length=length, batch=batch, learning_rate=learning_rate, schedule=schedule, accumulate=accumulate,
            checkpointing=checkpointing, keep_every=keep_every, sharded=sharded, rng_seed=rng_seed, threads=threads, name=name,
            store=store, progress=progress,
        )  # fmt: skip
    if first:
        print_corpus(store.load(str(seed.corpus), Corpus))
        made(seed, name, output.as_json)


def seed_from(
    model: Annotated[str, Argument(help="A merge or an expert: name or digest. An adapter is folded into its own seed.")],
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Make a merge, or one expert, the seed of the next round. Its lineage has all seeds and experts before it."""
    with bars() as progress:
        made(seeds.seed_from(model, output.store, name=name, progress=progress), name, output.as_json)


def seed_diloco(
    seed: Annotated[str, Argument(help="Name or digest of the seed to go on from.")],
    lighthouse: Annotated[str, Option(help="http://HOST:PORT of torchft_lighthouse, in the VPN of the sites.")],
    site: Annotated[int, Option(help="Number of this one, from 0.")],
    sites: Annotated[int, Option(help="How many there are.")] = 4,
    corpus: Annotated[str | None, Option(help="Name or digest; default: what the seed was trained on.")] = None,
    tokens: Annotated[str, Option(help="Training tokens of all sites together, e.g. 100M.")] = "10M",
    steps: Annotated[int, Option(help="Steps of a site from one exchange of a weight to its next.")] = 100,
    batch: Annotated[int, Option(help="Sequences per step of a site.")] = 8,
    length: Annotated[int | None, Option(help="Tokens per sequence; default: the seed's context, at most 1024.")] = None,
    learning_rate: Annotated[float | None, Option(help="Peak; default: by the size of the seed.")] = None,
    schedule: Annotated[str, Option(help="cosine, linear, constant or wsd.")] = "wsd",
    fragments: Annotated[int, Option(help="Exchange the layers in so many parts, one after the other (Streaming DiLoCo).")] = 1,
    delay: Annotated[int, Option(help="Steps during which an exchange goes on.")] = 0,
    keep: Annotated[float, Option(help="Share of a site's own weights in what it goes on with after an exchange.")] = 0.0,
    rate: Annotated[float, Option(help="Of the outer step.")] = 0.7,
    momentum: Annotated[float, Option(help="Of the outer step.")] = 0.9,
    accumulate: Annotated[int, Option(help="Passes per step, whose gradients are added.")] = 1,
    checkpointing: Annotated[bool, Option("--checkpointing", help="Recompute activations: less memory, more time.")] = False,
    wait: Annotated[float, Option(help="Seconds that a site waits for others, at most.")] = 3600.0,
    rng_seed: RngSeedOption = 0,
    threads: Annotated[int | None, Option(help="CPU threads of a site; the same at all of them.")] = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Train a seed further at several trusted sites over slow links (DiLoCo, by torchft). Each runs this; interrupted ones resume."""
    with bars() as progress:
        made_here = seeds.diloco(
            seed, lighthouse, site, sites=sites, corpus=corpus, tokens=tokens, steps=steps, batch=batch, length=length,
            learning_rate=learning_rate, schedule=schedule, fragments=fragments, delay=delay, keep=keep, rate=rate, momentum=momentum,
            accumulate=accumulate, checkpointing=checkpointing, wait=wait, rng_seed=rng_seed, threads=threads, name=name,
            store=output.store, progress=progress,
        )  # fmt: skip
    made(made_here, name, output.as_json)


def train(
    context: typer.Context,
    partition: Annotated[str, Argument(help="Name or digest; with --method router the mixture to tune.")],
    recipe: RecipeOptions = RecipeOptions(),
    schedule: ScheduleOptions = ScheduleOptions(),
    seed: Annotated[str | None, Option(help="Name or digest; a mixture knows its own.")] = None,
    domains: Annotated[str, Option(help="'all', or numbers: 0,3-5. 'pooled' trains one control on everything.")] = "all",
    report_to: Annotated[list[str] | None, Option(help="tensorboard, trackio, wandb or mlflow (repeatable).")] = None,
    statistics: Annotated[bool, Option("--statistics", help="Leave what merges need to know of the text, beside each expert.")] = False,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    commands: Annotated[bool, Option("--commands", help="Print the command of each expert instead: the same tasks, for anywhere.")] = False,
    name: Annotated[str | None, Option("--name", help="Call the experts NAME/0, NAME/1, ..."), BELOW] = None,
    output: Output = Output(),
) -> None:
    """Train one expert per domain from the seed, without communication; or tune a mixture. Interrupted runs resume."""
    store, typed = Store(output.store), typed_options(context)
    if recipe.method == "router":
        tune(partition, recipe, schedule, typed, name, output)
        return
    if seed is None:
        raise BadInput("experts branch from a seed: name it with --seed; a mixture is tuned, with --method router")
    if wrong := typed & {"tuned", "balance"}:
        raise BadInput(f"--{min(wrong)} is of mixtures: leave it out, or tune one with --method router")
    fields = recipe._asdict() | schedule._asdict()
    fields = {field: value for field, value in fields.items() if field not in ("tuned", "balance")}
    plan = training.plan_training(partition, seed, domains=domains, report_to=report_to or (), workers=workers, store=store, **fields)
    if commands:
        more = ["--statistics"] * statistics + (["--name", name] if name else []) + ["--store", str(output.store)]
        for words in plan.commands():
            out.print(shlex.join([*words, *more]), soft_wrap=True)
        return
    first = is_first()
    with live_table(plan.experts(store), store) if first else nullcontext(silent) as progress:
        experts = training.run_plan(plan, engine=engine, name=name, store=store, progress=progress)
    if statistics and first:
        with bars() as progress:
            training.run_statistics(experts, store, workers=plan.workers, engine=engine, progress=progress)
    for expert in experts if first else ():
        made(expert, training.expert_name(name, expert), output.as_json)


def tune(mixture: str, recipe: RecipeOptions, schedule: ScheduleOptions, typed: set[str], name: str | None, output: Output) -> None:
    """Tune the routers, or more, of a mixture."""
    if wrong := typed & EXPERTS:
        option = min(wrong).replace("_", "-")
        raise BadInput(f"--{option} is of experts that branch from a seed, and means nothing to a mixture (--method router): leave it out")
    with bars() as progress:
        done = mixing.tune(
            mixture, output.store, tokens=schedule.tokens, batch=recipe.batch, length=recipe.length, learning_rate=schedule.learning_rate,
            schedule=schedule.schedule, tuned=recipe.tuned, balance=schedule.balance, accumulate=recipe.accumulate,
            checkpointing=recipe.checkpointing, optimiser=recipe.optimiser, patience=schedule.patience, rng_seed=schedule.rng_seed,
            threads=1 if schedule.threads is None else schedule.threads, name=name, progress=progress,
        )  # fmt: skip
    talk.print(done.summary(), soft_wrap=True)
    made(done.record, name, output.as_json)


def adopt(
    source: Annotated[str, Argument(help="A folder that PEFT or transformers wrote, or a hub id (downloads it).")],
    seed: Annotated[str, Option(help="What it grew from: name or digest.")],
    partition: Annotated[str | None, Option(help="Whose domain it serves: name or digest.")] = None,
    domain: Annotated[int | None, Option(help="The number of that domain.")] = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Take a LoRA or DoRA adapter, or a full fine-tune, made elsewhere as an expert."""
    made(training.adopt(source, seed, partition=partition, domain=domain, name=name, store=output.store), name, output.as_json)


def statistics(
    experts: ExpertsArgument,
    rows: Annotated[int, Option(help="Of each expert's own training documents, as long as in its recipe.")] = 64,
    workers: WorkersOption = None,
    output: Output = Output(),
) -> None:
    """Compute Gram and Fisher matrices of experts on their own text, for merge rules that need them."""
    with bars() as progress:
        found = training.compute_statistics(experts, rows=rows, workers=workers, store=output.store, progress=progress)
    for record in found:
        made(record, None, output.as_json)


def fit(
    seed: Annotated[
        str | None, Argument(help="A seed or mixture here, a config.json or its folder, a shape of `seed train --like`, or a hub id.")
    ] = None,
    recipe: RecipeOptions = RecipeOptions(),
    processes: Annotated[int, Option(help="What one of so many takes (torchrun): --batch is of all.")] = 1,
    memory: Annotated[str | None, Option(help="What there is, e.g. 24GB; default: this machine's.")] = None,
    device: Annotated[str | None, Option(help="cpu or cuda; default: a GPU where this machine has one.")] = None,
    measure: Annotated[bool, Option("--measure", help="Train two steps, and hold what they took against the prediction.")] = False,
    table: Annotated[bool, Option("--table", help="What fits cards of 8 to 80 GB, for seeds of 0.1 to 13 billion parameters.")] = False,
    output: Output = Output(),
) -> None:
    """Predict the memory and time of a training run, and what would fit. The seed's config is enough."""
    if table:
        print_gpu_table(output.as_json)
        return
    if seed is None:
        raise BadInput("fit needs a seed: name one, a folder with its config.json, or a hub id; or ask for --table")
    found = fitting.fit(seed, **recipe._asdict(), processes=processes, memory=memory, device=device, measure=measure, store=output.store)
    if output.as_json:
        measured = {"measured": found.measured._asdict() | {"predicted": found.predicted}} if found.measured else {}
        emit(found.answer.model_dump(mode="json") | measured)
    else:
        print_prediction(seed, found)


# ---- printing ----------------------------------------------------------------------------------------------------


def print_prediction(seed: str, found: fitting.Fitting) -> None:
    """The components of memory, the speed and the verdict; and what two real steps took."""
    answer, what = found.answer, f"{found.recipe.method} on {seed}"
    if found.recipe.method == "router":
        what = f"{found.recipe.tuned} of {seed}"
    trained = "tuned" if found.recipe.method == "router" else "trained"
    join = f", {short(answer.trained)} of them {trained}"
    if found.recipe.method not in ("full", "router"):
        join = f" and {short(answer.trained)} that are trained"
    rows = [(part, short(size) + "B") for part, size in answer.components.items() if size]
    draw(f"{what}: {short(answer.parameters)} parameters{join}", (f"peak memory, {answer.device}", ""),
         [*rows, ("total", short(answer.total) + "B")])  # fmt: skip
    speed = answer.tokens_per_second
    if found.speeds:
        least, most = found.speeds
        out.print(f"{short(least)} to {short(most)} tokens/s here; a million tokens take {duration(1e6 / most)} to {duration(1e6 / least)}")
    if found.measured:
        took = found.measured
        out.print(
            f"measured over two steps: {short(took.peak)}B, prediction {found.predicted / took.peak - 1:+.1%}; "
            f"{short(took.tokens_per_second)} tokens/s" + (f", prediction {speed / took.tokens_per_second - 1:+.0%}" if speed else "")
        )
    out.print(answer.verdict)


MARKS = {(True, "adamw"): "¹", (True, "adamw8bit"): "²", (False, "adamw"): ""}
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def print_gpu_table(as_json: bool) -> None:
    """What fits which card: the table of the documentation, as Markdown."""
    memory, found = fitting.gpu_table()
    if as_json:
        emit({
            name: [choice and choice._asdict() | {"recipe": choice.recipe.model_dump(mode="json")} for choice in row] for name, row in found
        })  # fmt: skip
        return
    out.print("| seed | " + " | ".join(f"{size} GB" for size in memory) + " |", soft_wrap=True)
    out.print("|---" * (len(memory) + 1) + "|", soft_wrap=True)
    for name, row in found:
        out.print(f"| {name} | " + " | ".join(_cell(choice) for choice in row) + " |", soft_wrap=True)


def _cell(choice: "CardRecipe | None") -> str:
    """'LoRA¹ 5.4': the recipe and its gigabytes."""
    if choice is None:
        return "no"
    mark = MARKS[choice.recipe.checkpointing, choice.recipe.optimiser]
    return f"{METHODS[choice.recipe.method]}{mark} {choice.total / 1e9:.1f}"
