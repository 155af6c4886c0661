"""Where does branching beat going on? A seed has a share of all tokens, its experts have the rest, and one dense model has as many.

    python -m benches.seedless.curve FOLDER [--shares 0,0.01,0.03,0.1,0.3,0.7] [--total 1024k] [--domains 4] [--rates 3e-3,6e-3]
    python -m benches.seedless.curve FOLDER --shares 0 --routers [--corpus a.jsonl,b.jsonl] [--width 32] [--router-tokens 100k]

The seeds of a rng seed are steps of one run from scratch before its decay (WSD); at its end that run is the first dense control. Experts
branch from each, and decay on their own. The second control has the domains' number times the batch: data-parallel training. Random
clusters take the place of the domains at the shares of --random; with `--routers` also domains of router LMs (SmallTalk,
arXiv:2410.03529), at no share. On the first rng seed both dense models and the first forest take the rate of --rates that is best on the
tune half; all others keep these. Figures are of the test half: [nats per token, bits per byte, gain over the strongest dense model, its
standard error over documents]; lines `seedless.loss` have the same in the words of benches.links. `--plot` draws means over rng seeds.
Finished steps in FOLDER are found again.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benches.common import integers, numbers, say
from benches.seedless.trunk import Branched, Cells, World, branched, open_world, spread, world_parser
from elmwood.domains.grow import Means
from elmwood.domains.partition import partition as divide
from elmwood.evaluate.comparison import Control
from elmwood.evaluate.holdout import Holdout
from elmwood.records import Partition, Seed
from elmwood.report.plots import Series, experts_plot
from elmwood.study.quality.scoring import Floats
from elmwood.study.routers import find_domains
from elmwood.study.seeds import train_seed

SAME, LARGE = "dense, the experts' batch", "dense, k times the batch"
FOREST = "forest"  # of tuning
WORDS, RANDOM, ROUTERS = "tf-idf", "random", "router LMs"
DRAWN = {"forest": "forest", "merged": "mean of experts", "random clusters": "random clusters", SAME: "dense", LARGE: "dense, k × batch"}
WHOLE = 4  # bytes of a parameter of a full expert, as it is sent
Mean = dict[str, dict[str, tuple[float, float | None]]]  # row -> "bits" or "gain" -> mean and standard error over rng seeds


class Tuning(NamedTuple):
    """The rates that sides are tried at, and those that were chosen for them."""

    rates: Sequence[float]
    chosen: dict[str, float]

    def among(self, side: str) -> Sequence[float]:
        return [self.chosen[side]] if side in self.chosen else self.rates

    def choose(self, side: str, loss: Mapping[float, float]) -> float:
        """The rate with the least loss on the tune half, where none was chosen before."""
        return self.chosen.setdefault(side, min(loss, key=loss.__getitem__))


def tune_nats(column_N: Floats, held: Holdout) -> float:
    """Loss on the tune half, nats per token."""
    return -float(column_N[held.tune_N].mean())


def controls(world: World, partition: Partition, rng_seed: int, tuning: Tuning) -> list[Control]:
    """One dense model on all tokens with the experts' batch, and one with k times that."""
    found = []
    for name, batch in ((SAME, None), (LARGE, world.domains * world.batch)):
        made = {rate: world.dense(rng_seed, rate, batch) for rate in tuning.among(name)}
        held, columns = world.columns(partition, next(iter(made.values())), {str(rate): seed for rate, seed in made.items()})
        best = tuning.choose(name, {rate: tune_nats(columns[str(rate)], held) for rate in made})
        found.append(Control(name, columns[str(best)]))
    return found


def arm(world: World, partition: Partition, seed: Seed, share: float, rng_seed: int, tuning: Tuning) -> Branched:
    """Experts of a partition, which have the tokens that the seed left, at their best rate: that of the first forest is all others'."""
    left = world.total - world.steps(share) * world.step
    made = {rate: branched(world, partition, seed, world.experts(partition, seed, left, rate, rng_seed)) for rate in tuning.among(FOREST)}
    return made[tuning.choose(FOREST, {rate: one.compare(()).best.nats for rate, one in made.items()})]


def router_domains(world: World, rng_seed: int, asked: Namespace) -> tuple[Partition, Seed]:
    """The domains of router LMs, and the seed that has their shape."""
    shape = {name: world.shape[name] for name in ("vocabulary", "length")} | {"layers": asked.router_layers, "width": asked.router_width}
    small = train_seed(world.corpus, world.store, tokens=0, **shape, rng_seed=rng_seed, progress=world.progress)
    found = find_domains(
        world.corpus, small, world.store, domains=world.domains, rounds=asked.rounds, tokens=asked.router_tokens, rng_seed=rng_seed,
        means=Means(world.workers), progress=world.progress,
    )  # fmt: skip
    return found, small


def say_losses(world: World, seed: Seed, rng_seed: int, share: float, had: int, rows: Cells) -> None:
    """The forest, data-parallel training and one machine with all tokens, by the bytes that a machine sends and receives."""
    size, steps = WHOLE * seed.parameters, world.total // (world.domains * world.step)
    common = {"workers": world.domains, "rng_seed": rng_seed, "parameters": seed.parameters}
    say("seedless.loss", method=f"forest {100 * share:g}", **common, warm=had, tokens=world.total - had, loss=rows["forest"][0],
        sent=size, received=size if had else 0)  # fmt: skip
    say("seedless.loss", method="ddp", **common, warm=0, tokens=world.total, loss=rows[LARGE][0], sent=size * steps, received=size * steps)
    say("seedless.loss", method="one machine", **common, warm=0, tokens=world.total, loss=rows[SAME][0], sent=0, received=0)


def main() -> None:
    options = world_parser(__doc__)
    options.add_argument("--shares", default="0,0.01,0.03,0.1,0.3,0.7")
    options.add_argument("--random", default="0,0.1")
    options.add_argument("--rates", default="3e-3,6e-3")
    options.add_argument("--routers", action="store_true")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--router-tokens", default="100k")
    options.add_argument("--router-layers", type=int, default=1)
    options.add_argument("--router-width", type=int, default=32)
    options.add_argument("--plot", type=Path)
    asked = options.parse_args()
    world, tuning = open_world(asked), Tuning(numbers(asked.rates), {})
    found: dict[tuple[float, str], list[Cells]] = {}
    for rng_seed in integers(asked.rng_seeds):
        divisions = {
            kind: divide(world.corpus, world.store, domains=world.domains, method=method, rng_seed=rng_seed, progress=world.progress)
            for kind, method in ((WORDS, "balanced"), (RANDOM, "random"))
        }
        dense = controls(world, divisions[WORDS], rng_seed, tuning)
        for share in numbers(asked.shares):
            seed, had, extra = world.seed(share, rng_seed, tuning.chosen[SAME]), world.steps(share) * world.step, {}
            kinds = [WORDS] + ([RANDOM] if share in numbers(asked.random) else [])
            if asked.routers and not had:
                divisions[ROUTERS], small = router_domains(world, rng_seed, asked)
                extra = {"router_parameters": small.parameters}
                kinds.append(ROUTERS)
            arms = {kind: arm(world, divisions[kind], seed, share, rng_seed, tuning) for kind in kinds}
            random = arms.pop(RANDOM, None)
            for kind, one in arms.items():
                rows = one.rows(dense, random and random.side)
                say(
                    "seedless.curve", share=share, domains=kind, rng_seed=rng_seed, total=world.total, parameters=seed.parameters,
                    machines=world.domains, seed_tokens=had, tokens=world.total - had, rates=tuning.chosen, **extra, rows=rows,
                )  # fmt: skip
                found.setdefault((share, kind), []).append(rows)
            say_losses(world, seed, rng_seed, share, had, found[share, WORDS][-1])
    means = {place: mean(lines) for place, lines in found.items()}
    for (share, kind), averaged in means.items():
        say("seedless.curve.mean", share=share, domains=kind, rows=averaged)
    if asked.plot:
        asked.plot.write_text(draw({share: averaged for (share, kind), averaged in means.items() if kind == WORDS}))


def mean(lines: Sequence[Cells]) -> Mean:
    """Of the rows that every line has: bits per byte, and the gain over the strongest dense model, over rng seeds."""
    names = [name for name in lines[0] if all(name in line for line in lines)]
    return {name: {"bits": spread([line[name][1] for line in lines]), "gain": spread([line[name][2] for line in lines])} for name in names}


def draw(means: Mapping[float, Mean]) -> str:
    """Bits per byte against the seed's share, with standard errors over rng seeds. No share has no place on the axis: it is a level."""
    shares, lines = [share for share in means if share], []
    for row, name in DRAWN.items():
        at = [share for share in shares if row in means[share]]
        if len(at) > 1:
            value_S, error_S = zip(*(means[share][row]["bits"] for share in at), strict=True)
            lines.append(Series(name, [100 * share for share in at], value_S, [error or 0 for error in error_S]))
    level = ("no seed", means[0.0]["forest"]["bits"][0]) if 0.0 in means else None
    return experts_plot(lines, reference=level, by="share of the seed, percent")


if __name__ == "__main__":
    main()
