"""Verbs of training: seeds, experts, adapters made elsewhere, and what a run will take."""

from typing import Annotated

import typer
from typer import Argument, Option

from elmwood.cli import old_fitting, old_mix, old_training
from elmwood.cli.options import (
    AccumulateOption,
    BatchOption,
    CheckpointingOption,
    CorpusArgument,
    EngineOption,
    ExpertsArgument,
    LateOption,
    LengthOption,
    MethodOption,
    NameOption,
    OptimiserOption,
    Output,
    RankOption,
    RngSeedOption,
    TogetherOption,
    TunedOption,
    WorkersOption,
    typed_options,
)
from elmwood.errors import BadInput


def seed_import(
    model: Annotated[str, Argument(help="A transformers checkpoint folder, a GGUF file, or a hub id (downloads it).")],
    separator: Annotated[str | None, Option(help="The token that stands before each document.")] = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Import a causal language model of transformers as a seed."""
    old_training.seed_import(model=model, separator=separator, name=name, store=output.store, as_json=output.as_json)


def seed_train(
    corpus: CorpusArgument,
    tokens: Annotated[str, Option(help="Training tokens, e.g. 10M.")] = "3M",
    layers: Annotated[int, Option(help="Transformer layers.")] = 3,
    width: Annotated[int, Option(help="Model width; heads and feed-forward follow from it.")] = 128,
    vocabulary: Annotated[int, Option(help="Size of the byte-level BPE vocabulary trained on the corpus.")] = 2048,
    length: Annotated[int, Option(help="Tokens per sequence.")] = 256,
    batch: Annotated[int, Option(help="Sequences per step.")] = 8,
    learning_rate: Annotated[float, Option(help="Peak learning rate.")] = 3e-3,
    rng_seed: RngSeedOption = 0,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Train a small Llama from scratch, with its own tokenizer."""
    old_training.seed_train(corpus=corpus, tokens=tokens, layers=layers, width=width, vocabulary=vocabulary, length=length,
          batch=batch, learning_rate=learning_rate, rng_seed=rng_seed, name=name, store=output.store, as_json=output.as_json)  # fmt: skip


def train(
    context: typer.Context,
    partition: Annotated[str, Argument(help="Name or digest; with --method router the mixture to tune.")],
    seed: Annotated[str | None, Option(help="Name or digest; a mixture knows its own.")] = None,
    domains: Annotated[str, Option(help="'all', or numbers: 0,3-5. 'pooled' trains one control on everything.")] = "all",
    method: MethodOption = "lora",
    tokens: Annotated[str, Option(help="Training tokens per expert, e.g. 2M.")] = "1M",
    batch: BatchOption = 8,
    length: LengthOption = None,
    learning_rate: Annotated[float | None, Option(help="Peak; default: by method and size of the seed.")] = None,
    schedule: Annotated[str, Option(help="cosine, linear, constant or wsd.")] = "cosine",
    rank: RankOption = 16,
    alpha: Annotated[float | None, Option(help="Adapters are scaled by alpha / rank; default: rank-stabilised.")] = None,
    targets: Annotated[str, Option(help="Modules that get adapters, e.g. q_proj,v_proj.")] = "all-linear",
    late: LateOption = 1.0,
    accumulate: AccumulateOption = 1,
    checkpointing: CheckpointingOption = False,
    optimiser: OptimiserOption = "adamw",
    patience: Annotated[int | None, Option(help="Stop after so many looks at a validation loss without a better one.")] = None,
    together: TogetherOption = 1,
    report_to: Annotated[list[str] | None, Option(help="tensorboard, trackio, wandb or mlflow (repeatable).")] = None,
    tuned: TunedOption = "routers",
    balance: Annotated[float, Option(help="Of a mixture: weight of the load-balancing loss.")] = 0.01,
    rng_seed: RngSeedOption = 0,
    statistics: Annotated[bool, Option("--statistics", help="Leave what merges need to know of the text, beside each expert.")] = False,
    threads: Annotated[int | None, Option(help="CPU threads of each; default: one for a small seed, else a worker's share.")] = None,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    commands: Annotated[bool, Option("--commands", help="Print the command of each expert instead: the same tasks, for anywhere.")] = False,
    name: Annotated[str | None, Option("--name", help="Call the experts NAME/0, NAME/1, ...")] = None,
    output: Output = Output(),
) -> None:
    """Train one expert per domain from the seed, without communication; or tune a mixture. Interrupted runs resume."""
    if method == "router":
        old_mix.tune_verb(given=typed_options(context), mixture=partition, tokens=tokens, batch=batch, length=length,
              learning_rate=learning_rate, schedule=schedule, tuned=tuned, balance=balance, rng_seed=rng_seed, threads=threads or 1,
              accumulate=accumulate, checkpointing=checkpointing, optimiser=optimiser, patience=patience, name=name, store=output.store,
              as_json=output.as_json)  # fmt: skip
        return
    if seed is None:
        raise BadInput("experts branch from a seed: name it with --seed; a mixture is tuned, with --method router")
    if wrong := typed_options(context) & {"tuned", "balance"}:
        raise BadInput(f"--{min(wrong)} is of mixtures: leave it out, or tune one with --method router")
    old_training.train(partition=partition, seed=seed, domains=domains, method=method, tokens=tokens, batch=batch, length=length,
          learning_rate=learning_rate, schedule=schedule, rank=rank, alpha=alpha, targets=targets, late=late, accumulate=accumulate,
          checkpointing=checkpointing, optimiser=optimiser, patience=patience, together=together, report_to=report_to or [],
          rng_seed=rng_seed, statistics=statistics, threads=threads, workers=workers, engine=engine, commands=commands, name=name,
          store=output.store, as_json=output.as_json)  # fmt: skip


def adopt(
    adapter: Annotated[str, Argument(help="A folder that PEFT's save_pretrained wrote, or a hub id (downloads it).")],
    seed: Annotated[str, Option(help="What it grew from: name or digest.")],
    partition: Annotated[str | None, Option(help="Whose domain it serves: name or digest.")] = None,
    domain: Annotated[int | None, Option(help="The number of that domain.")] = None,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Take a LoRA or DoRA adapter trained elsewhere as an expert."""
    old_training.adopt(
        adapter=adapter, seed=seed, partition=partition, domain=domain, name=name, store=output.store, as_json=output.as_json
    )


def statistics(
    experts: ExpertsArgument,
    rows: Annotated[int, Option(help="Of each expert's own training documents, as long as in its recipe.")] = 64,
    workers: WorkersOption = None,
    output: Output = Output(),
) -> None:
    """Compute Gram and Fisher matrices of experts on their own text, for merge rules that need them."""
    old_training.statistics(experts=experts, rows=rows, workers=workers, store=output.store, as_json=output.as_json)


def fit(
    seed: Annotated[
        str | None, Argument(help="A seed or mixture here, a folder with config.json, or a hub id (downloads its config).")
    ] = None,
    method: MethodOption = "lora",
    batch: BatchOption = 8,
    length: LengthOption = None,
    rank: RankOption = 16,
    late: LateOption = 1.0,
    accumulate: AccumulateOption = 1,
    checkpointing: CheckpointingOption = False,
    optimiser: OptimiserOption = "adamw",
    together: TogetherOption = 1,
    tuned: TunedOption = "routers",
    memory: Annotated[str | None, Option(help="What there is, e.g. 24GB; default: this machine's.")] = None,
    device: Annotated[str | None, Option(help="cpu or cuda; default: a GPU where this machine has one.")] = None,
    measure: Annotated[bool, Option("--measure", help="Train two steps, and hold what they took against the prediction.")] = False,
    table: Annotated[bool, Option("--table", help="What fits cards of 8 to 80 GB, for seeds of 0.1 to 13 billion parameters.")] = False,
    output: Output = Output(),
) -> None:
    """Predict the memory and time of a training run, and what would fit. The seed's config is enough."""
    old_fitting.fit(seed=seed, method=method, batch=batch, length=length, rank=rank, late=late, accumulate=accumulate,
          checkpointing=checkpointing, optimiser=optimiser, together=together, tuned=tuned, memory=memory, device=device,
          measure=measure, table=table, store=output.store, as_json=output.as_json)  # fmt: skip
