"""What the verbs of text do: read a corpus, discover its domains."""

from elmwood.cli.screen import bars, keep, short, table, talk
from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.records import Corpus
from elmwood.store import Store


def cluster(*, corpus, domains, embedder, method, holdout, field, rng_seed, name, store, as_json) -> None:
    home = Store(store)
    with bars() as progress:
        read = build(corpus, home, holdout=holdout, field=field, progress=progress)
        partition = divide(read, home, domains=domains, embedder=embedder, method=method, rng_seed=rng_seed, progress=progress)
    say_read(read)
    if not as_json:
        sizes = partition.fit_sizes
        rows = [
            (domain.name, str(domain.documents), short(domain.bytes), str(sizes[place]), str(sum(s.documents for s in domain.holdout)))
            for place, domain in enumerate(partition.domains)
        ]
        table("domains", ("terms", "documents", "bytes", "at the fit", "held out"), rows, to=talk)
    keep(home, partition, name, as_json)


def say_read(corpus: Corpus) -> None:
    """What was read and what was left out, on stderr."""
    talk.print(f"{corpus.documents} documents, {short(corpus.bytes)}B of text")
    for reason, number in sorted(corpus.rejected.items(), key=lambda item: -item[1]):
        talk.print(f"  left out: {number} ({reason})", style="yellow")
