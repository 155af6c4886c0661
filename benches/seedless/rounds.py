"""Does "branch, train, merge, repeat" beat one long branch? R rounds from one seed at equal tokens, beside their controls.

    python -m benches.seedless.rounds FOLDER [--share 0.1] [--rounds 1,2,4] [--rate 4e-3] [--total 1024k] [--domains 4]

The seed is a step of a run from scratch, as in `curve`, whose folder may be used again. A round trains one expert for each domain at a
constant rate, and the mean of its experts is the seed of the next; the last round comes down linearly, a single one in its last fifth
(WSD). Every R has all tokens that the seed left. `forest` is the ensemble of the last round's experts, `merged` their mean. Controls: the
dense runs of `curve`, and with the most rounds random clusters and one model on all text that starts again as often. Figures are of the
test half, as in `curve`. One JSON line for each R and rng seed, then means with errors over rng seeds. Finished steps in FOLDER are found
again.
"""

from collections.abc import Sequence

from benches.common import integers, say
from benches.seedless.curve import LARGE, SAME, Tuning, controls
from benches.seedless.trunk import Cells, World, branched, open_world, spread, world_parser
from elmwood.domains.partition import partition as divide
from elmwood.evaluate.comparison import Control
from elmwood.records import Expert, Partition, Seed
from elmwood.study.merging import merge
from elmwood.study.seeds import seed_from

ANOTHER = 100  # between the rng seeds of two rounds, so that each reads its text in an order of its own


def schedule(number: int, rounds: int) -> str:
    """Of one round: only the last comes down."""
    return "wsd" if rounds == 1 else "linear" if number == rounds - 1 else "constant"


def grow(
    world: World, partition: Partition, seed: Seed, tokens: int, rounds: int, rate: float, rng_seed: int, domains: str = "all"
) -> tuple[Seed, list[Expert]]:
    """The experts of the last round, and the seed they branched from."""
    experts: list[Expert] = []
    for number in range(rounds):
        if experts:
            seed = seed_from(merge(experts, world.store).record if len(experts) > 1 else experts[0], world.store)
        experts = world.experts(
            partition, seed, tokens // rounds, rate, rng_seed + ANOTHER * number, schedule(number, rounds), domains
        )  # fmt: skip
    return seed, experts


def main() -> None:
    options = world_parser(__doc__)
    options.add_argument("--share", type=float, default=0.1)
    options.add_argument("--rounds", default="1,2,4")
    options.add_argument("--rate", type=float, default=4e-3)
    asked = options.parse_args()
    world, each = open_world(asked), integers(asked.rounds)
    found: dict[int, list[Cells]] = {rounds: [] for rounds in each}
    for rng_seed in integers(asked.rng_seeds):
        words, random = (
            divide(world.corpus, world.store, domains=world.domains, method=method, rng_seed=rng_seed, progress=world.progress)
            for method in ("balanced", "random")
        )
        dense = controls(world, words, rng_seed, Tuning([], {SAME: asked.rate, LARGE: 2 * asked.rate}))
        seed, left = world.seed(asked.share, rng_seed, asked.rate), world.total - world.steps(asked.share) * world.step
        for rounds in each:
            last, experts = grow(world, words, seed, left, rounds, asked.rate, rng_seed)
            more: Sequence[Control] = ()
            beside = None
            if rounds in (1, max(each)):
                beside = branched(world, random, *grow(world, random, seed, left, rounds, asked.rate, rng_seed))
            if rounds == max(each) > 1:
                _, (again,) = grow(world, words, seed, left, rounds, asked.rate, rng_seed, "pooled")
                more = [Control(f"dense, {rounds} rounds", world.columns(words, seed, {"again": again})[1]["again"])]
            rows = branched(world, words, last, experts).rows([*dense, *more], beside and beside.side)
            say("seedless.rounds", rounds=rounds, share=asked.share, rng_seed=rng_seed, total=world.total,
                parameters=seed.parameters, machines=world.domains, rate=asked.rate, rows=rows)  # fmt: skip
            found[rounds].append(rows)
    for rounds, lines in found.items():
        means = {name: spread([line[name][1] for line in lines]) for name in lines[0] if all(name in line for line in lines)}
        over = {
            name: spread([first[name][1] - line[name][1] for first, line in zip(found[each[0]], lines, strict=True)])
            for name in ("forest", "merged")
        }
        say("seedless.rounds.mean", rounds=rounds, rows=means, over_first=over)


if __name__ == "__main__":
    main()
