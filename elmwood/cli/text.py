"""Verbs of text: read a corpus, discover its domains, revise them."""

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from typer import Argument, Option

from elmwood.cli.options import CorpusArgument, NameOption, Output, ReadingOptions, RngSeedOption
from elmwood.cli.screen import bars, emit, made, table, talk
from elmwood.domains.publish import quantiles
from elmwood.records import Corpus, Partition
from elmwood.store import Store
from elmwood.study import text
from elmwood.units import short

BARS = " ▁▂▃▄▅▆▇█"
WIDE = 24  # characters of a small histogram


def cluster(
    corpus: CorpusArgument,
    partition: Annotated[
        str | None, Option("--with", help="Only count which domains of this partition they belong to: a name, digest or folder.")
    ] = None,
    domains: Annotated[int, Option(help="How many.")] = 8,
    embedder: Annotated[str, Option(help="tfidf, hashing, cbtm, seed, sentence, routers or module:function.")] = "tfidf",
    embedder_model: Annotated[
        str | None, Option(help="'seed': its name; 'sentence': a folder or hub id (downloads it); 'routers': a seed of their shape.")
    ] = None,
    method: Annotated[str, Option(help="balanced, plain or random.")] = "balanced",
    rounds: Annotated[int, Option(help="Embedder 'routers': rounds of training and dividing the text anew.")] = 4,
    router_tokens: Annotated[str, Option(help="Embedder 'routers': training tokens of each in a round.")] = "200k",
    reading: ReadingOptions = ReadingOptions(),
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Read a corpus and discover its domains: makes a partition. Interrupted runs resume."""
    store = Store(output.store)
    if partition is not None:
        with bars() as progress:
            found = text.survey(
                corpus, partition, field=reading.field, encoding=reading.encoding, follow_links=reading.follow_links,
                largest_document=reading.largest_document, filters=reading.filters, name=name, store=store, progress=progress,
            )  # fmt: skip
        if output.as_json:
            emit(found.to_dict() | {"name": name})
        else:
            print_survey(found, name)
        return
    with bars() as progress:
        division = text.cluster(
            corpus, domains=domains, embedder=embedder, embedder_model=embedder_model, method=method, rounds=rounds,
            router_tokens=router_tokens, name=name, store=store, progress=progress, **reading._asdict(),
        )  # fmt: skip
    print_corpus(store.load(division.corpus, Corpus))
    if not output.as_json:
        print_domains(division)
    made(division, name, output.as_json)


def split(
    partition: Annotated[str, Argument(help="Name or digest.")],
    domain: Annotated[str, Argument(help="Its number or name.")],
    parts: Annotated[int, Option(help="How many.")] = 2,
    rng_seed: RngSeedOption = 0,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Split one domain into several; the experts of the other domains stay valid."""
    store = Store(output.store)
    with bars() as progress:
        revised = text.split(partition, domain, parts=parts, rng_seed=rng_seed, name=name, store=store, progress=progress)
    if not output.as_json:
        print_domains(revised.partition)
        old = revised.parent.domains[text.find_domain(domain, revised.parent)].name
        served = ", ".join(map(str, revised.domains))
        talk.print(f"an expert of {old} serves domains {served} until they have experts of their own; all others stay")
    made(revised.partition, name, output.as_json)


def add(
    partition: Annotated[str, Argument(help="Name, digest, or a folder written by export.")],
    corpus: CorpusArgument,
    domains: Annotated[int, Option(help="How many new ones.")] = 1,
    reading: ReadingOptions = ReadingOptions(),
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Add new domains from a corpus to a partition; the experts of the old domains stay valid."""
    store = Store(output.store)
    with bars() as progress:
        revised = text.add(partition, corpus, domains=domains, name=name, store=store, progress=progress, **reading._asdict())
    print_corpus(store.load(revised.partition.corpus, Corpus))
    if not output.as_json:
        print_domains(revised.partition)
        talk.print(f"train the new ones with --domains {','.join(map(str, revised.domains))}; the experts of the others stay")
    made(revised.partition, name, output.as_json)


# ---- printing ----------------------------------------------------------------------------------------------------


def print_corpus(corpus: Corpus) -> None:
    """What was read and what was left out, on stderr."""
    talk.print(f"{corpus.documents} documents, {short(corpus.bytes)}B of text")
    print_rejected(corpus.rejected, corpus.unread)


def print_rejected(rejected: Mapping[str, int], unread: Mapping[str, str]) -> None:
    """Documents and files left out, by reason, on stderr."""
    for reason, number in sorted(rejected.items(), key=lambda item: -item[1]):
        first = f"; the first file: {unread[reason]}" if reason in unread else ""
        talk.print(f"  left out: {number} ({reason}{first})", style="yellow")


def print_domains(partition: Partition) -> None:
    """The domains and their sizes, on stderr."""
    rows = [
        (domain.name, str(domain.documents), short(domain.bytes), str(size), str(sum(shard.documents for shard in domain.holdout)))
        for domain, size in zip(partition.domains, partition.fit_sizes, strict=True)
    ]
    table("domains", ("domain", "documents", "bytes", "clustered", "held out"), rows, to=talk)


def print_survey(found: text.Survey, name: str | None) -> None:
    """Which domains the documents belong to, as a table; notes on stderr."""
    partition, counted = found.partition, found.counted
    print_rejected(found.rejected, found.unread)
    shown = np.flatnonzero(counted.near_KB.sum(0))
    span = slice(int(shown[0]), int(shown[-1]) + 1) if len(shown) else slice(0, 1)
    rows = [survey_row(domain.name, found, [k], span) for k, domain in enumerate(partition.domains)]
    rows.append(survey_row("all", found, list(range(len(rows))), span))
    range_ = f"dist² {counted.edge_B[span.start]:.3g}-{counted.edge_B[span.stop]:.3g}"
    table(
        "which domains your documents belong to",
        ("domain", "documents", "bytes", "", "nearest 5 %", "median", "95 %", range_, "far"), rows,
    )  # fmt: skip
    talk.print("far: nearer to no words at all than to any domain", style="dim")
    if counted.wordless:
        talk.print(f"{counted.wordless} without a word that this partition knows", style="yellow")
    for number, names in enumerate(counted.nearest_K):
        if names:
            talk.print(f"nearest to {number} {partition.domains[number].name}: {', '.join(names)}", style="dim", soft_wrap=True)
    talk.print(f"partition {partition.digest[:12]}{f', called {name}' if name else ''}; nothing of your text was kept or sent")


def survey_row(name: str, found: text.Survey, domains: list[int], span: slice) -> tuple[str, ...]:
    """The row of one domain, or of several together. `span`: bins of squared distance that are shown."""
    counted = found.counted
    documents, size, far = (int(column_K[domains].sum()) for column_K in (counted.documents_K, counted.bytes_K, counted.far_K))
    near_B = counted.near_KB[domains].sum(0)
    shares = quantiles(near_B, counted.edge_B)
    low, middle, high = (f"{share:.2f}" for share in shares[::2]) if shares else ("", "", "")
    share = documents / max(1, int(counted.documents_K.sum()))
    return name, str(documents), short(size), "█" * round(12 * share), low, middle, high, spark(near_B[span]), str(far)


def spark(near_B: np.ndarray) -> str:
    """A small histogram, in at most WIDE characters."""
    width = -(-len(near_B) // WIDE)
    part = np.add.reduceat(near_B, np.arange(0, len(near_B), width))
    return "".join(BARS[-(-8 * int(number) // int(part.max() or 1))] for number in part)
