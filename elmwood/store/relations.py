"""What records say of one another: lineage, text and experts that stay with their owners, and whether a record agrees with those it names.

Records come from strangers, and each is well-formed by itself. Whoever opens one together with those it names relies on what is
checked here.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from elmwood.errors import BadRecord, ForeignExpert
from elmwood.records import (
    Comparison,
    Contest,
    Corpus,
    Expert,
    Forest,
    Merged,
    Mixture,
    Partition,
    Record,
    Score,
    Seed,
    State,
    Statistics,
    parse,
    references,
)

Find = Callable[[str], Record | None]  # digest -> record; None: it is not here
KINDS: dict[str, type[Record]] = {
    "corpus": Corpus,
    "expert": Expert,
    "forest": Forest,
    "partition": Partition,
    "seed": Seed,
    "statistics": Statistics,
}


class Reads(Protocol):
    """What is needed of a store here."""

    def has(self, digest: str) -> bool: ...

    def read(self, digest: str) -> Record: ...


@lru_cache(16)
def parse_file(path: Path) -> Record:
    """The record of a file that is named by its digest and whose bytes were checked. Kept for a while, since all experts of a forest name
    one partition. Raises BadRecord."""
    return parse(path.read_bytes())


def lineage(store: Reads, digest: str) -> Iterator[tuple[int, Record]]:
    """A record and the records it names, depth first, with their depth. A record that is named twice is yielded twice, and what it
    names is yielded the first time. A corpus or an expert of a sum that stayed with its owner is left out. Raises Damaged."""
    known: dict[str, Record] = {}
    waiting = [(0, digest)]
    while waiting:
        depth, name = waiting.pop()
        if name in known:
            yield depth, known[name]
            continue
        record = known[name] = store.read(name)
        yield depth, record
        away = texts(record) | contributed(record)
        below = [one for one in references(record) if not one.startswith("sha256:") and (one not in away or store.has(one))]
        waiting += ((depth + 1, one) for one in reversed(below))


def texts(record: Record) -> set[str]:
    """Digests in a record that are text, or lead to text. They stay with their owner when the record is published."""
    match record:
        case Partition():
            return {record.corpus, *(shard.blob for domain in record.domains for shard in (*domain.train, *domain.holdout))}
        case Expert():
            return set(record.data)
        case Seed():
            return {*filter(None, (record.corpus, record.grown_from, record.plan)), *(portion.corpus for portion in record.mix)}
    return set()


def contributed(record: Record) -> set[str]:
    """The experts of a sum or a merge, and their statistics. They may be elsewhere: a sum is all that its merge needs."""
    rows = record.contributions if isinstance(record, State | Merged) else ()
    return {name for row in rows for name in (row.expert, row.statistics) if name}


# ---- a record and those it names -------------------------------------------------------------------------------------


def check_relations(record: Record, find: Find) -> None:
    """Whether a record agrees with itself and with those it names, as far as they are here. Raises BadRecord, ForeignExpert."""
    kinds: dict[str, type[Record]] = {**KINDS, "parent": type(record)}
    for field, kind in kinds.items():
        _find(record, getattr(record, field, None), kind, find)
    if check := CHECKS.get(type(record)):
        check(record, find)


def _seed(seed: Seed, find: Find) -> None:
    _need(seed.separator < seed.vocabulary, seed, f"its separator is token {seed.separator} of a vocabulary of {seed.vocabulary}")
    if seed.mix:
        whole = sum(portion.weight for portion in seed.mix)
        _need(abs(whole - 1) < 1e-6 and seed.corpus == seed.mix[0].corpus, seed, f"the weights of its corpora sum to {whole:g}")
    _need(
        seed.step is None or (seed.recipe is not None and seed.step < seed.recipe.steps),
        seed,
        f"its step {seed.step} is none of its recipe",
    )

    grown = find(seed.grown_from) if seed.grown_from else None
    if isinstance(grown, Expert | Merged):
        before = find(grown.seed)
        same = not isinstance(before, Seed) or (before.architecture, before.vocabulary) == (seed.architecture, seed.vocabulary)
        _need(same, seed, f"the seed that {grown.kind} {grown.digest[:8]} grew from is of another architecture or vocabulary")
    else:
        _need(grown is None, seed, f"{(seed.grown_from or '')[:8]} is no merge and no expert, and it is said to have its weights")


def _partition(partition: Partition, find: Find) -> None:
    count = len(partition.domains)
    _need(count > 0, partition, "it has no domains")
    for name, sizes in (("fit_sizes", partition.fit_sizes), ("greedy_sizes", partition.greedy_sizes)):
        _need(len(sizes) in (0, count), partition, f"it has {count} domains and {len(sizes)} {name}")
    parent = find(partition.parent) if partition.parent else None
    for domain in partition.domains if isinstance(parent, Partition) else ():
        _need_place(domain.origin, parent, partition)


def _expert(expert: Expert, find: Find) -> None:
    _need_place(expert.domain, find(expert.partition) if expert.partition else None, expert)


def _forest(forest: Forest, find: Find) -> None:
    _need(len(forest.experts) > 0, forest, "it has no experts")
    _check_experts(forest, forest.seed, forest.experts, find)


def _mixture(mixture: Mixture, find: Find) -> None:
    count, top_k = len(mixture.experts), mixture.gates.top_k
    _need(top_k <= count, mixture, f"its gates choose {top_k} of {count} experts")
    forest = find(mixture.forest)
    if isinstance(forest, Forest) and forest.seed != mixture.seed:
        raise ForeignExpert(_say(mixture, f"its seed is {mixture.seed[:8]}, that of its forest {forest.seed[:8]}"))
    _check_experts(mixture, mixture.seed, (one for one in mixture.experts if one != mixture.seed), find)


def _sum(made: State | Merged, find: Find) -> None:
    names = [row.expert for row in made.contributions]
    _need(len(set(names)) == len(names), made, "an expert stands in it twice")
    _check_experts(made, made.seed, names, find)
    for row in made.contributions:
        _find(made, row.statistics, Statistics, find)
    if isinstance(made, State):
        part, parts = made.part
        _need(0 <= part < parts, made, f"it is part {part} of {parts}; parts are numbered from 0")
    else:
        for digest in made.layers.values():
            _find(made, digest, Merged, find)


def _score(score: Score, find: Find) -> None:
    _need(score.tokens >= 0 and (score.windows is None or score.windows >= 0), score, "it counts less than nothing")


def _comparison(comparison: Comparison, find: Find) -> None:
    _need(len(comparison.rows) > 0, comparison, "it has no rows")
    forest = find(comparison.forest) if comparison.forest else None
    partition = find(forest.partition) if isinstance(forest, Forest) else None
    counts = {len(row.domains) for row in comparison.rows if row.domains} | ({len(comparison.routing)} if comparison.routing else set())
    if isinstance(partition, Partition):
        counts.add(len(partition.domains))
    _need(len(counts) <= 1, comparison, f"its rows and its routing are of other numbers of domains: {sorted(counts)}")
    widths = {len(row) for row in comparison.routing} | ({len(forest.experts) + 1} if isinstance(forest, Forest) else set())
    _need(len(widths) <= 1 or not comparison.routing, comparison, f"its routing is of other numbers of experts: {sorted(widths)}")


def _contest(contest: Contest, find: Find) -> None:
    _need(0 <= contest.drawn <= contest.touched <= contest.blocks, contest, f"it drew {contest.drawn} of {contest.touched} blocks")


CHECKS: dict[type[Record], Callable[[Any, Find], None]] = {
    Seed: _seed, Partition: _partition, Expert: _expert, Forest: _forest, Mixture: _mixture, State: _sum, Merged: _sum, Score: _score,
    Comparison: _comparison, Contest: _contest,
}  # fmt: skip


def _check_experts(record: Record, seed: str, experts: Iterable[str], find: Find) -> None:
    for digest in experts:
        expert = _find(record, digest, Expert, find)
        if isinstance(expert, Expert) and expert.seed != seed:
            raise ForeignExpert(_say(record, f"its expert {digest[:8]} grew from seed {expert.seed[:8]}, and its seed is {seed[:8]}"))


def _find(record: Record, digest: str | None, kind: type[Record], find: Find) -> Record | None:
    """The record that another one names as this kind. Raises BadRecord."""
    found = find(digest) if digest else None
    _need(found is None or isinstance(found, kind), record, f"{(digest or '')[:8]} is no {kind.__name__.lower()}, and it is named as one")
    return found


def _need_place(domain: int | None, partition: Record | None, record: Record) -> None:
    if domain is not None and isinstance(partition, Partition):
        count = len(partition.domains)
        _need(0 <= domain < count, record, f"domain {domain} is none of {partition.digest[:8]}, which has 0 to {count - 1}")


def _need(holds: bool, record: Record, problem: str) -> None:
    if not holds:
        raise BadRecord(_say(record, problem))


def _say(record: Record, problem: str) -> str:
    return f"{record.kind} {record.digest[:8]} does not fit what it names: {problem}; make it again, or fetch it from its owner again"
