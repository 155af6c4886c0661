"""What the verbs of text do: read a corpus, discover its domains, revise them, use those of others."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from elmwood.cli.screen import bars, emit, keep, short, table, talk
from elmwood.corpus.build import build
from elmwood.corpus.read import Document, read
from elmwood.domains import partition as divisions
from elmwood.domains.dense import DENSE, Model, sentence_model
from elmwood.domains.grow import Means
from elmwood.domains.partition import fit_embedder
from elmwood.domains.partition import partition as divide
from elmwood.domains.share import QUANTILES, Survey, quantiles, receive, survey
from elmwood.errors import BadInput
from elmwood.records import Corpus, Partition, Seed
from elmwood.store import Store
from elmwood.study.tasks import opener

BARS = " ▁▂▃▄▅▆▇█"
WIDE = 24  # bins drawn of the histogram


def cluster(
    *, corpus, partition, domains, embedder, embedder_model, method, holdout, field, rng_seed, workers, engine, name, store, as_json
) -> None:
    home = Store(store)
    if partition is not None:
        place(corpus, opened(partition, home), field=field, name=name, store=home, as_json=as_json)
        return
    model = model_of(embedder, embedder_model, home)
    with bars() as progress:
        read = build(corpus, home, holdout=holdout, field=field, progress=progress)
        fitted = fit_embedder(read, home, embedder, model=model, rng_seed=rng_seed, progress=progress) if model else embedder
        means = Means(workers, engine, opener(embedder))
        partition = divide(read, home, domains=domains, embedder=fitted, method=method, rng_seed=rng_seed, means=means, progress=progress)
    say_read(read)
    if not as_json:
        say_domains(partition)
    keep(home, partition, name, as_json)


def model_of(embedder: str, named: str | None, store: Store) -> Model | None:
    """The model that a neural embedder is fitted with, as the user names it. Raises BadInput."""
    if embedder not in DENSE:
        if named:
            raise BadInput(f"embedder {embedder!r} needs no model: leave out --embedder-model, or take {' or '.join(DENSE)}")
        return None
    if not named:
        raise BadInput(f"embedder {embedder!r} needs a model: name it with --embedder-model (a seed here, or a sentence model's folder)")
    if embedder == "sentence":
        return sentence_model(named, store)
    from elmwood.lm.hidden_states import seed_states  # torch

    digest = store.load(named, Seed).digest
    return Model(digest, seed_states(digest, store))


def opened(named: str, store: Store) -> Partition:
    """A partition by its name or digest, or out of a folder that somebody exported, which is taken into the store."""
    return receive(Path(named), store) if Path(named).is_dir() else store.load(named, Partition)


def place(sources: Sequence[str], partition: Partition, *, field: str, name: str | None, store: Store, as_json: bool) -> None:
    """Which domains these documents belong to, and how near they are. They are counted, and not kept."""
    rejected: Counter[str] = Counter()
    with bars() as progress:
        found: Iterator[Document] = chain.from_iterable(read(source, rejected, field=field) for source in sources)
        counted = survey(partition, store, found, open_model=opener(partition.embedder.name), progress=progress)
    if name:
        store.name(name, partition.digest)
    if as_json:
        emit(survey_json(partition, counted, rejected) | {"name": name})
        return
    say_rejected(rejected)
    total, overall_B = counted.documents_K.sum(), counted.near_KB.sum(0)
    drawn_B = np.flatnonzero(overall_B)
    first, last = (int(drawn_B[0]), int(drawn_B[-1]) + 1) if len(drawn_B) else (0, 1)
    rows = []
    for domain, documents, size, far, near_B in zip(partition.domains, *counted[:2], counted.far_K, counted.near_KB, strict=True):
        rows.append(_survey_row(domain.name, documents, size, far, documents / max(total, 1), near_B, counted, (first, last)))
    rows.append(_survey_row("all", total, counted.bytes_K.sum(), counted.far_K.sum(), 1, overall_B, counted, (first, last)))
    head = (
        "domain",
        "documents",
        "bytes",
        "",
        "nearest 5 %",
        "median",
        "95 %",
        f"dist² {counted.edge_B[first]:.3g}-{counted.edge_B[last]:.3g}",
    )
    table("which domains your documents belong to", (*head, "far"), rows)
    talk.print("far: nearer to no words at all than to any domain", style="dim")
    if counted.wordless:
        talk.print(f"{counted.wordless} without a word that this partition knows", style="yellow")
    for number, names in enumerate(counted.nearest_K):
        if names:
            talk.print(f"nearest to {number} {partition.domains[number].name}: {', '.join(names)}", style="dim", soft_wrap=True)
    talk.print(f"partition {partition.digest[:12]}{f', called {name}' if name else ''}; nothing of your text was kept or sent")


def _survey_row(name, documents, size, far, share, near_B, counted: Survey, span: tuple[int, int]) -> tuple[str, ...]:
    low, middle, high = (f"{q:.2f}" for q in found[::2]) if (found := quantiles(near_B, counted.edge_B)) else ("", "", "")
    return name, str(documents), short(int(size)), "█" * round(12 * share), low, middle, high, spark(near_B[slice(*span)]), str(far)


def spark(near_B: np.ndarray) -> str:
    """A small histogram, in at most WIDE characters."""
    width = -(-len(near_B) // WIDE)
    part = np.add.reduceat(near_B, np.arange(0, len(near_B), width))
    return "".join(BARS[-(-8 * int(number) // int(part.max() or 1))] for number in part)


def survey_json(partition: Partition, counted: Survey, rejected: Counter[str]) -> dict:
    """Counts, and histograms of squared distance."""

    def one(near_B: np.ndarray) -> dict:
        found = quantiles(near_B, counted.edge_B)
        return {"histogram": near_B.tolist(), "quantiles": found and dict(zip(map(str, QUANTILES), found, strict=True))}

    return {
        "partition": partition.digest,
        "documents": int(counted.documents_K.sum()),
        "wordless": counted.wordless,
        "far": int(counted.far_K.sum()),
        "left_out": dict(rejected),
        "edges": counted.edge_B.tolist(),
        **one(counted.near_KB.sum(0)),
        "domains": [
            {
                "name": domain.name,
                "documents": int(counted.documents_K[k]),
                "bytes": int(counted.bytes_K[k]),
                "far": int(counted.far_K[k]),
                "nearest": list(counted.nearest_K[k]),
                "examples": list(domain.examples),
                **one(counted.near_KB[k]),
            }
            for k, domain in enumerate(partition.domains)
        ],
    }


def split(*, partition, domain, parts, rng_seed, name, store, as_json) -> None:
    home = Store(store)
    old = opened(partition, home)
    number = numbered(domain, old)
    with bars() as progress:
        means = Means(open_model=opener(old.embedder.name))
        new = divisions.split(old, number, home, parts=parts, rng_seed=rng_seed, means=means, progress=progress)
    if not as_json:
        say_domains(new)
        served = ", ".join(map(str, divisions.heirs(old, new, home)[number]))
        talk.print(f"an expert of {old.domains[number].name} serves domains {served} until they have experts of their own; all others stay")
    keep(home, new, name, as_json)


def add(*, partition, corpus, domains, holdout, field, rng_seed, workers, engine, name, store, as_json) -> None:
    home = Store(store)
    old = opened(partition, home)
    with bars() as progress:
        more = build(corpus, home, holdout=holdout, field=field, progress=progress)
        means = Means(workers, engine, opener(old.embedder.name))
        new = divisions.add(old, more, home, domains=domains, rng_seed=rng_seed, means=means, progress=progress)
    say_read(more)
    if not as_json:
        say_domains(new)
        numbers = ",".join(map(str, range(len(old.domains), len(new.domains))))
        talk.print(f"train the new ones with --domains {numbers}; the experts of the others stay")
    keep(home, new, name, as_json)


def numbered(domain: str, partition: Partition) -> int:
    """A domain by its number or its name. Raises BadInput."""
    names = [one.name for one in partition.domains]
    if domain in names:
        return names.index(domain)
    if not domain.isdecimal():
        raise BadInput(f"no domain is called {domain!r}: name one of {', '.join(names)}, or its number")
    return int(domain)


def say_domains(partition: Partition) -> None:
    """The domains and their sizes, on stderr."""
    rows = [
        (domain.name, str(domain.documents), short(domain.bytes), str(size), str(sum(shard.documents for shard in domain.holdout)))
        for domain, size in zip(partition.domains, partition.fit_sizes, strict=True)
    ]
    table("domains", ("terms", "documents", "bytes", "at the fit", "held out"), rows, to=talk)


def say_read(corpus: Corpus) -> None:
    """What was read and what was left out, on stderr."""
    talk.print(f"{corpus.documents} documents, {short(corpus.bytes)}B of text")
    say_rejected(corpus.rejected)


def say_rejected(rejected: Mapping[str, int]) -> None:
    for reason, number in sorted(rejected.items(), key=lambda item: -item[1]):
        talk.print(f"  left out: {number} ({reason})", style="yellow")
