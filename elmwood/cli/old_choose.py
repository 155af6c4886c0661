"""The test of a chosen merge on fresh blocks."""

from elmwood.cli.old_compare import contest, judge, mix_up
from elmwood.engine import Progress
from elmwood.evaluate.sequential.decision import StoppingRule
from elmwood.records import Contest, Merged, Seed, fingerprint
from elmwood.store import Store
from elmwood.study.selection import open_columns

CAP = 1000  # blocks that the test of the best may draw
CLIP = 0.5  # bits per byte


def tested(
    winner: Merged, name: str, seed: Seed, partition: str, documents: int | None, store: Store, progress: Progress
) -> tuple[Contest, int]:  # fmt: skip
    """Whether the best is better than the seed, on blocks of the gate split; and the tokens forwarded to know."""
    table, rule = open_columns(seed, partition, documents, store, stay=True), StoppingRule(cap=CAP)
    held = table.held
    key = fingerprint("compare", seed.digest, winner.digest, held.name)
    found, cost = judge(mix_up(seed, winner, seed, held, store, progress), table, rule, CLIP, key.encode(), progress)
    made = contest(found, rule, a=seed.digest, b=winner.digest, names=(seed.name, name), holdout=held.name, protocol=held.protocol,
                   clip=CLIP, order=key)  # fmt: skip
    store.add(made)
    return made, int(cost["tokens_forwarded"])
