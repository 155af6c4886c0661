"""The command line: verbs are the words of the pipeline. stdout is the thing made, stderr is the talk.

Only signatures stand here, so that `elmwood --help` needs neither torch nor any library of ours; each verb calls its
namesake in the module of its family.
"""

import errno
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from elmwood import __version__
from elmwood.errors import BadInput, ElmwoodError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
seed_app = typer.Typer(no_args_is_help=True, help="Make the shared starting model: train one from scratch, or import one.")
app.add_typer(seed_app, name="seed")
state_app = typer.Typer(
    no_args_is_help=True, help="Sums of experts that are not finished yet: they add and subtract exactly, in any order."
)
app.add_typer(state_app, name="state")

MixingOption = Annotated[str | None, typer.Option(help="Of an ensemble: outputs, or weights: adapters summed for each prompt.")]
StoreOption = Annotated[Path, typer.Option("--store", envvar="ELMWOOD_STORE", help="Folder of blobs, records and refs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
NameOption = Annotated[str | None, typer.Option("--name", help="Call the result this.")]
ExpertsArgument = Annotated[list[str], typer.Argument(help="A forest, or experts; NAME/ stands for all experts so named.")]
WeightsOption = Annotated[str | None, typer.Option(help="Of the experts, as named: 1,0.5; one for all; 0:1 is a gradient over depth.")]
SettingOption = Annotated[list[str] | None, typer.Option("--set", help="Any other setting of the rule: NAME=VALUE (repeatable).")]
LayersOption = Annotated[str | None, typer.Option(help="Merge these layers alone, e.g. 4-11; all else stays the seed's.")]
TensorsOption = Annotated[str, typer.Option(help="Merge only tensors with this in their name.")]
WorkersOption = Annotated[int | None, typer.Option(help="Processes side by side; default: one per core for small models, else 1.")]
EngineOption = Annotated[str, typer.Option(help="Where tasks run: local, or ray.")]
MethodOption = Annotated[str, typer.Option(help="full, lora, qlora (the seed in four bits) or dora; of a mixture: router.")]
BatchOption = Annotated[int, typer.Option(help="Sequences per step.")]
LengthOption = Annotated[int | None, typer.Option(help="Tokens per sequence; default: the seed's context, at most 1024.")]
RankOption = Annotated[int, typer.Option(help="Of adapters.")]
LateOption = Annotated[float, typer.Option(help="Adapters in the last share of the layers only, e.g. 0.33.")]
AccumulateOption = Annotated[int, typer.Option(help="Passes the sequences of a step are spread over: less memory.")]
CheckpointingOption = Annotated[
    bool, typer.Option("--checkpointing", help="Compute activations again instead of keeping them: less memory.")
]
OptimiserOption = Annotated[str, typer.Option(help="adamw, or adamw8bit: its moments in a quarter of the bytes.")]
TunedOption = Annotated[str, typer.Option(help="Of a mixture: routers, norms, shared or everything, each with those before it.")]
TogetherOption = Annotated[int, typer.Option(help="So many LoRA experts at once, over one copy of the seed.")]
ShardsOption = Annotated[int, typer.Option("--workers", help="Shards of text worked on at once; their number does not change the result.")]
STORE = Path(".elmwood")


def _verb(module: str, verb: str, **arguments: Any) -> None:
    getattr(import_module(f"elmwood.cli.{module}"), verb)(**arguments)


def _given(context: typer.Context) -> set[str]:
    """The options that were typed."""
    return {option for option in context.params if getattr(context.get_parameter_source(option), "name", "") == "COMMANDLINE"}


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Grow one language model out of many small experts."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="About two minutes: too short to show a gain.")] = False,
    corpus: Annotated[list[str] | None, typer.Option(help="Your own text instead of the bundled sample (repeatable).")] = None,
    seed: Annotated[str | None, typer.Option(help="A seed you have (name or digest) instead of one trained here.")] = None,
    domains: Annotated[int | None, typer.Option(help="How many domains and experts.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens shared by the experts, e.g. 2M.")] = None,
    method: Annotated[str, typer.Option(help="How experts are trained: full or lora.")] = "full",
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of experts and controls.")] = None,
    report: Annotated[Path, typer.Option(help="Where the report is written.")] = Path("report.html"),
    workers: WorkersOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Grow a forest from text and hold it against every control. Stop and re-run it as you like: it goes on."""
    _verb("study", "demo", quick=quick, corpus=corpus or [], seed=seed, domains=domains, tokens=tokens, method=method,
          learning_rate=learning_rate, report=report, workers=workers, store=store, as_json=as_json)  # fmt: skip


@app.command()
def cluster(
    corpus: Annotated[list[str], typer.Argument(help="JSONL, Parquet, folders of text, datasets:NAME, or 'sample'.")],
    partition: Annotated[
        str | None, typer.Option("--with", help="Only count which domains of this partition they belong to: a name, digest or folder.")
    ] = None,
    domains: Annotated[int, typer.Option(help="How many.")] = 8,
    embedder: Annotated[str, typer.Option(help="tfidf, hashing, cbtm, seed or sentence.")] = "tfidf",
    embedder_model: Annotated[
        str | None, typer.Option(help="For 'seed': its name or digest; for 'sentence': a folder, or a hub id (downloads it).")
    ] = None,
    method: Annotated[str, typer.Option(help="balanced, plain or random.")] = "balanced",
    holdout: Annotated[float, typer.Option(help="Share of documents nobody trains on.")] = 0.1,
    field: Annotated[str, typer.Option(help="The text column of JSONL and Parquet.")] = "text",
    rng_seed: Annotated[int, typer.Option(help="Where chance starts.")] = 0,
    workers: ShardsOption = 1,
    engine: EngineOption = "local",
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Read a corpus and discover its domains: makes a Partition. Interrupted, it goes on at the shard where it was."""
    _verb("domains", "cluster", corpus=corpus, partition=partition, domains=domains, embedder=embedder, embedder_model=embedder_model,
          method=method, holdout=holdout, field=field, rng_seed=rng_seed, workers=workers, engine=engine, name=name, store=store,
          as_json=as_json)  # fmt: skip


@app.command()
def split(
    partition: Annotated[str, typer.Argument(help="Name or digest.")],
    domain: Annotated[str, typer.Argument(help="Its number or name.")],
    parts: Annotated[int, typer.Option(help="How many.")] = 2,
    rng_seed: Annotated[int, typer.Option(help="Where chance starts.")] = 0,
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Part one domain in several; the experts of the others stay valid."""
    _verb("domains", "split", partition=partition, domain=domain, parts=parts, rng_seed=rng_seed, name=name, store=store, as_json=as_json)


@app.command()
def add(
    partition: Annotated[str, typer.Argument(help="Name, digest, or a folder written by export.")],
    corpus: Annotated[list[str], typer.Argument(help="JSONL, Parquet, folders of text, datasets:NAME, or 'sample'.")],
    domains: Annotated[int, typer.Option(help="How many new ones.")] = 1,
    holdout: Annotated[float, typer.Option(help="Share of documents nobody trains on.")] = 0.1,
    field: Annotated[str, typer.Option(help="The text column of JSONL and Parquet.")] = "text",
    rng_seed: Annotated[int, typer.Option(help="Where chance starts.")] = 0,
    workers: ShardsOption = 1,
    engine: EngineOption = "local",
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Let a corpus bring new domains to a partition; the experts of the old ones stay valid."""
    _verb("domains", "add", partition=partition, corpus=corpus, domains=domains, holdout=holdout, field=field, rng_seed=rng_seed,
          workers=workers, engine=engine, name=name, store=store, as_json=as_json)  # fmt: skip


@seed_app.command("import")
def seed_import(
    model: Annotated[str, typer.Argument(help="A transformers checkpoint folder, a GGUF file, or a hub id (downloads it).")],
    separator: Annotated[str | None, typer.Option(help="The token that stands before each document.")] = None,
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Take any causal language model of transformers as a seed."""
    _verb("training", "seed_import", model=model, separator=separator, name=name, store=store, as_json=as_json)


@seed_app.command("train")
def seed_train(
    corpus: Annotated[list[str], typer.Argument(help="JSONL, Parquet, folders of text, datasets:NAME, or 'sample'.")],
    tokens: Annotated[str, typer.Option(help="Training tokens, e.g. 10M.")] = "3M",
    layers: Annotated[int, typer.Option(help="Transformer layers.")] = 3,
    width: Annotated[int, typer.Option(help="Model width; heads and feed-forward follow from it.")] = 128,
    vocabulary: Annotated[int, typer.Option(help="Size of the byte-level BPE vocabulary trained on the corpus.")] = 2048,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    rng_seed: Annotated[int, typer.Option(help="Where chance starts.")] = 0,
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Train a small Llama from scratch, with its own tokenizer."""
    _verb("training", "seed_train", corpus=corpus, tokens=tokens, layers=layers, width=width, vocabulary=vocabulary, length=length,
          batch=batch, learning_rate=learning_rate, rng_seed=rng_seed, name=name, store=store, as_json=as_json)  # fmt: skip


@app.command()
def train(
    context: typer.Context,
    partition: Annotated[str, typer.Argument(help="Name or digest; with --method router the mixture to tune.")],
    seed: Annotated[str | None, typer.Option(help="Name or digest; a mixture knows its own.")] = None,
    domains: Annotated[str, typer.Option(help="'all', or numbers: 0,3-5. 'pooled' trains one control on everything.")] = "all",
    method: MethodOption = "lora",
    tokens: Annotated[str, typer.Option(help="Training tokens per expert, e.g. 2M.")] = "1M",
    batch: BatchOption = 8,
    length: LengthOption = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; default: by method and size of the seed.")] = None,
    schedule: Annotated[str, typer.Option(help="cosine, linear, constant or wsd.")] = "cosine",
    rank: RankOption = 16,
    alpha: Annotated[float | None, typer.Option(help="Adapters are scaled by alpha / rank; default: rank-stabilised.")] = None,
    targets: Annotated[str, typer.Option(help="Modules that get adapters, e.g. q_proj,v_proj.")] = "all-linear",
    late: LateOption = 1.0,
    accumulate: AccumulateOption = 1,
    checkpointing: CheckpointingOption = False,
    optimiser: OptimiserOption = "adamw",
    patience: Annotated[int | None, typer.Option(help="Stop after so many looks at a validation loss without a better one.")] = None,
    together: TogetherOption = 1,
    report_to: Annotated[list[str] | None, typer.Option(help="tensorboard, trackio, wandb or mlflow (repeatable).")] = None,
    tuned: TunedOption = "routers",
    balance: Annotated[float, typer.Option(help="Of a mixture: weight of the load-balancing loss.")] = 0.01,
    rng_seed: Annotated[int, typer.Option(help="Where chance starts.")] = 0,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Leave what merges need to know of the text, beside each expert.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each; default: one for a small seed, else a worker's share.")] = None,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the command of each expert instead: the same tasks, for anywhere.")
    ] = False,
    name: Annotated[str | None, typer.Option("--name", help="Call the experts NAME/0, NAME/1, ...")] = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Branch experts from the seed, one per domain, with no communication; or tune a mixture. Stop and re-run it: it goes on."""
    if method == "router":
        _verb("mix", "tune_verb", given=_given(context), mixture=partition, tokens=tokens, batch=batch, length=length,
              learning_rate=learning_rate, schedule=schedule, tuned=tuned, balance=balance, rng_seed=rng_seed, threads=threads or 1,
              accumulate=accumulate, checkpointing=checkpointing, optimiser=optimiser, patience=patience, name=name, store=store,
              as_json=as_json)  # fmt: skip
        return
    if seed is None:
        raise BadInput("experts branch from a seed: name it with --seed; a mixture is tuned, with --method router")
    if wrong := _given(context) & {"tuned", "balance"}:
        raise BadInput(f"--{min(wrong)} is of mixtures: leave it out, or tune one with --method router")
    _verb("training", "train", partition=partition, seed=seed, domains=domains, method=method, tokens=tokens, batch=batch, length=length,
          learning_rate=learning_rate, schedule=schedule, rank=rank, alpha=alpha, targets=targets, late=late, accumulate=accumulate,
          checkpointing=checkpointing, optimiser=optimiser, patience=patience, together=together, report_to=report_to or [],
          rng_seed=rng_seed, statistics=statistics, threads=threads, workers=workers, engine=engine, commands=commands, name=name,
          store=store, as_json=as_json)  # fmt: skip


@app.command()
def adopt(
    adapter: Annotated[str, typer.Argument(help="A folder that PEFT's save_pretrained wrote, or a hub id (downloads it).")],
    seed: Annotated[str, typer.Option(help="What it grew from: name or digest.")],
    partition: Annotated[str | None, typer.Option(help="Whose domain it serves: name or digest.")] = None,
    domain: Annotated[int | None, typer.Option(help="The number of that domain.")] = None,
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Take a LoRA or DoRA adapter made elsewhere as an expert."""
    _verb("training", "adopt", adapter=adapter, seed=seed, partition=partition, domain=domain, name=name, store=store, as_json=as_json)


@app.command()
def statistics(
    experts: ExpertsArgument,
    rows: Annotated[int, typer.Option(help="Of each expert's own training documents, as long as in its recipe.")] = 64,
    workers: WorkersOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Leave Gram matrices and squared gradients beside experts, for merges that weigh by them: the text stays where it is."""
    _verb("training", "statistics", experts=experts, rows=rows, workers=workers, store=store, as_json=as_json)


@app.command()
def fit(
    seed: Annotated[
        str | None, typer.Argument(help="A seed or mixture here, a folder with config.json, or a hub id (downloads its config).")
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
    memory: Annotated[str | None, typer.Option(help="What there is, e.g. 24GB; default: this machine's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where this machine has one.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Train two steps, and hold what they took against the prediction.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="What fits cards of 8 to 80 GB, for seeds of 0.1 to 13 billion parameters.")
    ] = False,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Say before a run what memory and time it will take, and what would fit. The config of the seed is enough."""
    _verb("fitting", "fit", seed=seed, method=method, batch=batch, length=length, rank=rank, late=late, accumulate=accumulate,
          checkpointing=checkpointing, optimiser=optimiser, together=together, tuned=tuned, memory=memory, device=device,
          measure=measure, table=table, store=store, as_json=as_json)  # fmt: skip


@app.command()
def forest(
    partition: Annotated[str, typer.Argument(help="Name or digest.")],
    experts: Annotated[list[str], typer.Argument(help="Names or digests; NAME/ stands for all experts so named.")],
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Gather a seed, a partition and its experts."""
    _verb("models", "forest", partition=partition, experts=experts, name=name, store=store, as_json=as_json)


@app.command()
def merge(
    experts: Annotated[list[str], typer.Argument(help="A forest, experts (NAME/ stands for all so named), or a mergekit YAML file.")],
    method: Annotated[str | None, typer.Option(help="A merge rule, default average; several: ties,dare.")] = None,
    weights: WeightsOption = None,
    scale: Annotated[str | None, typer.Option(help="What is added to the seed is multiplied by this; several: 0.3,0.5,1.")] = None,
    density: Annotated[str | None, typer.Option(help="Share of numbers that trimming keeps; several: 0.2,0.5.")] = None,
    rank: Annotated[str | None, typer.Option(help="Of an adapter that is made of adapters; several: 8,16.")] = None,
    settings: SettingOption = None,
    layers: LayersOption = None,
    tensors: TensorsOption = "",
    resize: Annotated[bool, typer.Option("--resize", help="Experts of another vocabulary: merge the rows they share.")] = False,
    choose: Annotated[bool, typer.Option("--choose", help="Of several answers name the best on the tune half of held-out text.")] = False,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="With --choose: go on from the best, layer by layer.")] = False,
    run: Annotated[int | None, typer.Option(help="With --choose: score only so many answers, the best by estimates.")] = None,
    partition: Annotated[str | None, typer.Option(help="Whose held-out text; default: the first expert's.")] = None,
    documents: Annotated[int | None, typer.Option(help="At most so many held-out documents.")] = None,
    parts: Annotated[int | None, typer.Option(help="Sum in so many tasks, each a share of every tensor.")] = None,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Make one checkpoint of experts, or one adapter of adapters. Several settings are several answers, from one reading."""
    _verb("merge", "merge_verb", experts=experts, method=method, weights=weights, scale=scale, density=density, rank=rank,
          settings=settings or [], layers=layers, tensors=tensors, resize=resize, choose=choose, per_layer=per_layer, run=run,
          partition=partition, documents=documents, parts=parts, workers=workers, engine=engine, name=name, store=store,
          as_json=as_json)  # fmt: skip


@app.command()
def mix(
    context: typer.Context,
    forest: Annotated[str, typer.Argument(help="Name or digest; or a mixture, to take experts out --without anything else.")],
    gates: Annotated[
        str,
        typer.Option(
            help="How experts are chosen at first: hidden (what each domain looks like to the seed), arrow (what adapters change), random."
        ),
    ] = "hidden",
    top_k: Annotated[int, typer.Option(help="Experts a token goes through; as many as there are is soft routing.")] = 2,
    scale: Annotated[
        str,
        typer.Option(help="Of the gates: the larger, the more the first choice counts; of several, 0.5,1,2, the best on held-out text."),
    ] = "1",
    method: Annotated[
        str, typer.Option(help="Of what all share: a merge rule, or seed. What no expert changed is the seed's anyway.")
    ] = "average",
    settings: SettingOption = None,
    low_rank: Annotated[bool, typer.Option("--low-rank", help="Keep adapters as factors over one shared feed-forward.")] = False,
    seed_expert: Annotated[bool, typer.Option(help="The seed's own feed-forward as one more expert.")] = True,
    seed_bias: Annotated[float, typer.Option(help="Of hidden gates: added to the logit of the seed's own expert.")] = 0.0,
    without: Annotated[list[str] | None, typer.Option(help="Leave this expert out (repeatable).")] = None,
    documents: Annotated[int | None, typer.Option(help="Held-out documents to choose a scale on, at most.")] = None,
    rng_seed: Annotated[int, typer.Option(help="Where chance starts.")] = 0,
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Make experts the experts of one mixture-of-experts model, in a standard architecture."""
    _verb("mix", "mix_verb", given=_given(context), forest=forest, gates=gates, top_k=top_k, scale=scale, method=method,
          settings=settings or [], low_rank=low_rank, seed_expert=seed_expert, seed_bias=seed_bias, without=without or [],
          documents=documents, rng_seed=rng_seed, name=name, store=store, as_json=as_json)  # fmt: skip


@app.command()
def loads(
    mixture: Annotated[str, typer.Argument(help="Name or digest.")],
    documents: Annotated[int, typer.Option(help="Held-out documents of each domain.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="Draw loads by layer and domain into this SVG file.")] = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Who does the work in a mixture: the weight that each expert has in each layer, on each domain's text, and who is dead."""
    _verb("mix", "loads_verb", mixture=mixture, documents=documents, plot=plot, store=store, as_json=as_json)


@state_app.command("make")
def state_make(
    experts: ExpertsArgument,
    method: Annotated[str, typer.Option(help="A merge rule.")] = "average",
    weights: WeightsOption = None,
    density: Annotated[str | None, typer.Option(help="Share of numbers that trimming keeps.")] = None,
    settings: SettingOption = None,
    layers: LayersOption = None,
    tensors: TensorsOption = "",
    part: Annotated[str, typer.Option(help="Sum this share of every tensor alone: 0/4 to 3/4.")] = "0/1",
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Sum experts, one or more: what another machine adds to its own sum."""
    _verb("merge", "state_make", experts=experts, method=method, weights=weights or "1", density=density, settings=settings or [],
          layers=layers, tensors=tensors, part=part, name=name, store=store, as_json=as_json)  # fmt: skip


@state_app.command("add")
def state_add(
    states: Annotated[list[str], typer.Argument(help="Names, digests, or folders written by export.")],
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Add states. An expert that came twice counts once."""
    _verb("merge", "state_add", states=states, name=name, store=store, as_json=as_json)


@state_app.command("remove")
def state_remove(
    state: Annotated[str, typer.Argument(help="Name, digest, or a folder written by export.")],
    experts: Annotated[list[str], typer.Argument(help="Names or digests; NAME/ stands for all experts so named.")],
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Take experts out again, exactly."""
    _verb("merge", "state_remove", state=state, experts=experts, name=name, store=store, as_json=as_json)


@state_app.command("finalize")
def state_finalize(
    states: Annotated[list[str], typer.Argument(help="A state, or all parts of one: names, digests, or folders written by export.")],
    scale: Annotated[str | None, typer.Option(help="What is added to the seed is multiplied by this; several: 0.3,0.5,1.")] = None,
    settings: SettingOption = None,
    name: NameOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Make the checkpoint. No expert is read."""
    _verb("merge", "state_finalize", states=states, scale=scale, settings=settings or [], name=name, store=store, as_json=as_json)


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Seeds, experts, merges, ensembles or forests: names or digests.")],
    mixing: MixingOption = None,
    partition: Annotated[str | None, typer.Option(help="Whose holdout; default: the first forest's or expert's.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window; default: the seed's context, at most 1024.")] = None,
    documents: Annotated[int | None, typer.Option(help="At most so many held-out documents.")] = None,
    router: Annotated[
        str | None, typer.Option(help="Of the fitted ensemble: centroid, sparse or posterior; default: the better of the first two.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Call the fitted ensemble of a forest this.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Standard benchmarks instead: tasks of lm-evaluation-harness, by comma.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task, the same for every model; default: all.")] = None,
    folder: Annotated[Path | None, typer.Option("--tasks-folder", help="Your own tasks: the harness's YAML files and their data.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Let tasks fetch their data.")] = False,
    workers: WorkersOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Bits per byte on held-out documents. A forest is shown as its seed, its ensembles and their bounds. With --tasks: benchmarks."""
    if tasks is not None:
        _verb("benchmarks", "benchmarks", models=models, mixing=mixing, tasks=tasks, limit=limit, folder=folder, download=download,
              store=store, as_json=as_json)  # fmt: skip
        return
    _verb("evaluation", "evaluate_verb", models=models, mixing=mixing, partition=partition, length=length, documents=documents,
          router=router, name=name, workers=workers, store=store, as_json=as_json)  # fmt: skip


@app.command()
def table(
    forest: Annotated[str, typer.Argument(help="A forest, or an ensemble of one: name or digest.")],
    choose: Annotated[int | None, typer.Option(help="Choose so many experts, one by one; default: as long as one more helps.")] = None,
    candidate: Annotated[list[str] | None, typer.Option(help="An expert that may join: would it help? (repeatable)")] = None,
    near: Annotated[int | None, typer.Option(help="Score experts only where they are among so many nearest; the rest is bounded.")] = None,
    top_k: Annotated[int, typer.Option(help="Experts that speak at once, for a forest.")] = 2,
    partition: Annotated[str | None, typer.Option(help="Whose holdout; default: the forest's.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window; default: the seed's context, at most 1024.")] = None,
    documents: Annotated[int | None, typer.Option(help="At most so many held-out documents.")] = None,
    budget: Annotated[str | None, typer.Option(help="Run at most so many tokens, e.g. 5M; run again to go on.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Run no longer than this.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Another store: take its columns of these models over.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw loss against the number of experts into this SVG.")] = None,
    workers: WorkersOption = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """What held-out text says of a forest's experts: best weights, what each is worth, which to keep. Models run once, then never."""
    _verb("table", "table", forest=forest, choose=choose, candidate=candidate or [], near=near, top_k=top_k, partition=partition,
          length=length, documents=documents, budget=budget, seconds=seconds, source=source, plot=plot, workers=workers, store=store,
          as_json=as_json)  # fmt: skip


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="What there is: a seed, expert, ensemble or forest; name or digest.")],
    b: Annotated[str, typer.Argument(help="What may be better, of the same seed.")],
    partition: Annotated[str | None, typer.Option(help="Whose holdout; default: the second model's, or the first's.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window; default: the seed's context, at most 1024.")] = None,
    documents: Annotated[int | None, typer.Option(help="At most so many held-out documents.")] = None,
    min_effect: Annotated[float, typer.Option(help="The least gain worth having, bits per byte where they can differ.")] = 0.002,
    alpha: Annotated[float, typer.Option(help="How often 'better' may be wrong.")] = 0.05,
    beta: Annotated[float, typer.Option(help="How often 'not better by the least effect' may be wrong.")] = 0.1,
    cap: Annotated[int, typer.Option(help="Blocks of 2 KiB, then it stays undecided.")] = 5000,
    clip: Annotated[float, typer.Option(help="Bits per byte a block counts for at most, where mathematics knows no bound.")] = 0.5,
    plot: Annotated[Path | None, typer.Option(help="Draw wealth over blocks into this SVG file.")] = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Is B better than A? Runs models only on the held-out blocks it takes to know."""
    _verb("compare", "compare", a=a, b=b, partition=partition, length=length, documents=documents, min_effect=min_effect, alpha=alpha,
          beta=beta, cap=cap, clip=clip, plot=plot, store=store, as_json=as_json)  # fmt: skip


@app.command()
def accept(
    expert: Annotated[str, typer.Argument(help="Who asks: an expert; name or digest.")],
    forest: Annotated[str, typer.Argument(help="What it asks to join: a forest, or an ensemble whose settings are used.")],
    length: Annotated[int | None, typer.Option(help="Tokens per window; default: the seed's context, at most 1024.")] = None,
    documents: Annotated[int | None, typer.Option(help="At most so many held-out documents.")] = None,
    cap: Annotated[int, typer.Option(help="Blocks of 2 KiB for each question at most.")] = 5000,
    clip: Annotated[float, typer.Option(help="Bits per byte a block counts for at most, where mathematics knows no bound.")] = 0.5,
    name: Annotated[str | None, typer.Option("--name", help="Call the forest with the expert in it this, if it is accepted.")] = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """May an expert join a forest? Every check with its value and threshold; keeps the verdict and the ledger of submissions."""
    _verb("accept", "accept", expert=expert, forest=forest, length=length, documents=documents, cap=cap, clip=clip, name=name, store=store,
          as_json=as_json)  # fmt: skip


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A seed, expert, merge, ensemble or forest: name or digest.")],
    mixing: MixingOption = None,
    prompt: Annotated[str | None, typer.Option(help="Continue this and stop; default: read prompts from the terminal.")] = None,
    max_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 0.95,
    rng_seed: Annotated[int, typer.Option(help="Where chance starts.")] = 0,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Continue text, and say which experts spoke."""
    _verb("models", "chat", model=model, mixing=mixing, prompt=prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p,
          rng_seed=rng_seed, store=store, as_json=as_json)  # fmt: skip


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="A name or digest; default: list all names.")] = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """List what there is, or draw what a thing was made from."""
    _verb("things", "show", name=name, store=store, as_json=as_json)


@app.command()
def verify(store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Check every digest and every reference; say exactly what is damaged."""
    _verb("things", "verify", store=store, as_json=as_json)


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="A seed, an expert, a merge, a state or a partition: name or digest.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    form: Annotated[
        str | None,
        typer.Option("--format", help="transformers, peft, gguf or gguf-adapter; for a partition's text, parquet. Default: as it is."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of a GGUF file's matrices: f32, f16 or bf16; default: as stored.")] = None,
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Write a folder other tools read: a transformers checkpoint, a PEFT adapter, a GGUF file, a partition with or without text."""
    _verb("things", "export", name=name, folder=folder, form=form, dtype=dtype, store=store, as_json=as_json)


@app.command()
def report(
    comparison: Annotated[str, typer.Argument(help="A comparison (made by demo or eval) or its forest: name or digest.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """One self-contained HTML page: domain map, curves, routing, results, lineage."""
    _verb("page", "report_verb", comparison=comparison, output=output, store=store, as_json=as_json)


def main() -> None:
    """The entry point: errors of ours become one line and a non-zero exit."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait starve one another on a machine with other work
    try:
        app()
    except ElmwoodError as error:
        sys.stderr.write(f"elmwood: {error}\n")
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(
            f"elmwood: no space left on the disk ({error.filename or 'while writing'}): free some and run the same command again\n"
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("\nelmwood: stopped; the same command goes on from here\n")
        sys.exit(130)
