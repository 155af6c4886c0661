"""Verbs of text: read a corpus, discover its domains, revise them."""

from typing import Annotated

from typer import Argument, Option

from elmwood.cli import old_domains
from elmwood.cli.options import (
    CorpusArgument,
    EngineOption,
    FieldOption,
    HoldoutOption,
    NameOption,
    Output,
    RngSeedOption,
    ShardWorkersOption,
)


def cluster(
    corpus: CorpusArgument,
    partition: Annotated[
        str | None, Option("--with", help="Only count which domains of this partition they belong to: a name, digest or folder.")
    ] = None,
    domains: Annotated[int, Option(help="How many.")] = 8,
    embedder: Annotated[str, Option(help="tfidf, hashing, cbtm, seed or sentence.")] = "tfidf",
    embedder_model: Annotated[
        str | None, Option(help="For 'seed': its name or digest; for 'sentence': a folder, or a hub id (downloads it).")
    ] = None,
    method: Annotated[str, Option(help="balanced, plain or random.")] = "balanced",
    holdout: HoldoutOption = 0.1,
    field: FieldOption = "text",
    rng_seed: RngSeedOption = 0,
    workers: ShardWorkersOption = 1,
    engine: EngineOption = "local",
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Read a corpus and discover its domains: makes a partition. Interrupted runs resume."""
    old_domains.cluster(corpus=corpus, partition=partition, domains=domains, embedder=embedder, embedder_model=embedder_model,
          method=method, holdout=holdout, field=field, rng_seed=rng_seed, workers=workers, engine=engine, name=name, store=output.store,
          as_json=output.as_json)  # fmt: skip


def split(
    partition: Annotated[str, Argument(help="Name or digest.")],
    domain: Annotated[str, Argument(help="Its number or name.")],
    parts: Annotated[int, Option(help="How many.")] = 2,
    rng_seed: RngSeedOption = 0,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Split one domain into several; the experts of the other domains stay valid."""
    old_domains.split(
        partition=partition, domain=domain, parts=parts, rng_seed=rng_seed, name=name, store=output.store, as_json=output.as_json
    )


def add(
    partition: Annotated[str, Argument(help="Name, digest, or a folder written by export.")],
    corpus: CorpusArgument,
    domains: Annotated[int, Option(help="How many new ones.")] = 1,
    holdout: HoldoutOption = 0.1,
    field: FieldOption = "text",
    rng_seed: RngSeedOption = 0,
    workers: ShardWorkersOption = 1,
    engine: EngineOption = "local",
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Add new domains from a corpus to a partition; the experts of the old domains stay valid."""
    old_domains.add(partition=partition, corpus=corpus, domains=domains, holdout=holdout, field=field, rng_seed=rng_seed,
          workers=workers, engine=engine, name=name, store=output.store, as_json=output.as_json)  # fmt: skip
