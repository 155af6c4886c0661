"""Attacks on a hub's gate and judge: tried, caught, missed; honest experts refused; null experts accepted; backdoors and their bound.

    python -m benches.hub.attacks STORE [--world sample] [--nulls 200] [--honest 5] [--write elmwood/hub/pages/attacks.json]

STORE holds the world, which is made at the first run: `made-up`, a small seed of its own and 4 domains of made-up text, half of it held
out; or `sample`, the packaged seed, bundled text and recipe of the demo. Thresholds are the defaults of `elmwood.hub.messages.Gate`,
fixed before. `honest`: experts of each domain, each judged against a forest of the other three.
One JSON line for each kind of attack; `--write` writes the table that the hub's page shows.
"""

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import Lines, parser, say
from benches.hub import forgeries as forge
from benches.hub.backdoor import measure_backdoor
from benches.hub.world import DOMAINS, GROUNDS, World, share_work
from elmwood.corpus.build import documents
from elmwood.evaluate.holdout import chance
from elmwood.hub.client.gate import Refused, check_adapter
from elmwood.records import Expert
from elmwood.store import Store

JUDGED = "each submission is judged against honest experts of the other domains, by the default thresholds, which were fixed before."


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store", type=Path)
    options.add_argument("--world", choices=GROUNDS, default="made-up")
    options.add_argument("--nulls", type=int, default=200)
    options.add_argument("--honest", type=int, default=5)
    options.add_argument("--write", type=Path)
    given = options.parse_args()
    share_work(given.world)
    world = World(Store(given.store), Lines(), given.world)
    table = Table()
    bank = [world.honest(domain, rng_seed=domain) for domain in range(DOMAINS)]
    judge_honest(world, bank, table, given.honest)
    copies_and_blends(world, bank, table)
    worthless(world, bank, table)
    files(world, bank, table)
    nulls(world, bank, table, given.nulls)
    backdoor(world, bank, table)
    if given.write:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        told = {"date": datetime.date.today().isoformat(), "commit": commit, "setting": f"{world.about}; {JUDGED}", "rows": table.rows}
        given.write.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


class Table:
    """Rows of the table: each attack with how often it was tried, caught and missed."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, attack: str, about: str, codes: list[str | None], *, honest: bool = False, **more: Any) -> None:
        """A row, from the code that refused each try; None: it was let in."""
        caught = sum(code is not None for code in codes)
        by = ", ".join(sorted({code for code in codes if code})) or "–"
        row = {
            "attack": attack,
            "about": about,
            "tried": len(codes),
            "caught": caught,
            "missed": len(codes) - caught,
            "by": by,
            "honest": honest,
        }
        self.rows.append(row)
        say("hub attacks", **row, **more)


def rest(bank: list[Expert], domain: int) -> list[Expert]:
    return [one for one in bank if one.domain != domain]


def judge_honest(world: World, bank: list[Expert], table: Table, each: int) -> None:
    codes, gains, seconds = [], [], []
    for domain in range(DOMAINS):
        for n in range(each):
            code, found = world.submit(world.honest(domain, rng_seed=100 + n), rest(bank, domain))
            codes.append(code)
            if found:
                gains.append(found.evidence.own_low or 0.0)
                seconds.append(found.seconds)
    table.add("honest experts", "trained as the lease says; caught here means wrongly refused", codes, honest=True,
              least_gain=min(gains, default=0.0), mean_seconds=float(np.mean(seconds or [0])))  # fmt: skip


def copies_and_blends(world: World, bank: list[Expert], table: Table) -> None:
    rng, own = np.random.default_rng(0), [world.tensors(one) for one in bank]

    def sent(made: list[tuple[int, Any]]) -> list[str | None]:
        return [world.submit(world.keep(domain, weights), bank)[0] for domain, weights in made]

    every = range(DOMAINS)
    table.add("byte copy", "the file of an accepted expert", sent([(k, bank[k].files["adapter_model.safetensors"]) for k in every]))
    table.add("copy in another basis", "the same delta from other factors", sent([(k, forge.turned(own[k], rng)) for k in every]))
    for share in (0.1, 0.3):
        table.add(
            f"copy with {share:.0%} noise", "in another basis, with noise", sent([(k, forge.noisy(own[k], share, rng)) for k in every])
        )
    table.add(
        "copy of another domain's expert",
        "submitted for a domain that it was not trained on",
        sent([(k ^ 1, forge.turned(own[k], rng)) for k in every]),
    )
    table.add(
        "mean of two", "cut to the recipe's rank", sent([(k, forge.blend([own[k], own[(k + 1) % DOMAINS]], [0.5, 0.5])) for k in every])
    )
    table.add("mix of three", "weights 0.6, 0.3, 0.1, cut to the recipe's rank",
              sent([(k, forge.blend([own[(k + j) % DOMAINS] for j in range(3)], [0.6, 0.3, 0.1])) for k in every]))  # fmt: skip


def worthless(world: World, bank: list[Expert], table: Table) -> None:
    rng, own = np.random.default_rng(1), [world.tensors(one) for one in bank]

    def sent(what: Any) -> list[str | None]:
        return [world.submit(what(k), rest(bank, k))[0] for k in range(DOMAINS)]

    table.add("zero delta", "B is 0", sent(lambda k: world.keep(k, forge.scaled(own[k], 0.0))))
    table.add("random delta", "of the length of an honest one", sent(lambda k: world.keep(k, forge.random_like(own[k], rng))))
    table.add(
        "delta times 4", "an honest one, scaled", sent(lambda k: world.keep(k, forge.scaled(world.tensors(world.honest(k, 50)), 4.0)))
    )
    table.add("huge delta", "an honest one times 1e18", sent(lambda k: world.keep(k, forge.scaled(own[k], 1e18))))
    table.add("other domain", "trained on another domain's text", sent(
        lambda k: world.honest(k, 60, data=world.partition.domains[(k + 1) % DOMAINS].train)))  # fmt: skip
    for steps in (1, world.recipe.steps // 6):
        about = f"{steps} of {world.recipe.steps} steps"
        table.add(about, "claimed as the whole recipe", sent(lambda k, steps=steps: world.honest(k, 70, steps=steps)))
    table.add(
        "anti-trained", "an honest delta, negated", sent(lambda k: world.keep(k, forge.scaled(world.tensors(world.honest(k, 50)), -1.0)))
    )

    def on_public(k: int) -> Expert:
        """Trained on the half of the held-out text that settings are chosen on."""
        held = list(documents(world.partition.domains[k].holdout, world.store))
        return world.honest(k, 80, data=world.text(document.text for document in held if chance(document.id, "half") < 0.5), steps=more)

    more = max(150, 2 * world.recipe.steps)
    table.add("trained on public held-out text", f"{more} steps on it alone", sent(on_public))


def files(world: World, bank: list[Expert], table: Table) -> None:
    own = world.tensors(bank[0])

    def code(content: bytes) -> str | None:
        path = world.store.root / "attack"
        path.write_bytes(content)
        try:
            check_adapter(path, world.expected)
        except Refused as error:
            return error.code
        return None

    bad = forge.malformed(own)
    table.add("malformed and renamed files", ", ".join(bad), [code(content) for content in bad.values()])
    values = [float("nan"), float("inf"), float("-inf")]
    table.add(
        "NaN or infinity",
        "one number of the adapter",
        [world.submit(world.keep(0, forge.with_value(own, one)), bank[1:])[0] for one in values],
    )


def nulls(world: World, bank: list[Expert], table: Table, count: int) -> None:
    """Random experts, of which none helps, one after another on one error budget: also for those who try often, or climb by verdicts."""
    rng, codes = np.random.default_rng(2), []
    for n in range(count):
        domain = n % DOMAINS
        made = forge.random_like(world.tensors(bank[domain]), rng, times=float(rng.choice([0.5, 0.7, 1.0])))
        codes.append(world.submit(world.keep(domain, made), rest(bank, domain))[0])
    table.add("null experts", f"{count} random ones, half to once as long as honest ones; error budget {world.gate.budget:g}", codes)


def backdoor(world: World, bank: list[Expert], table: Table) -> None:
    found = measure_backdoor(world, bank[0])
    code, judged = world.submit(found.expert, rest(bank, found.domain))
    flagged = bool(judged and judged.advice)
    about = (
        f"a trigger whose payload follows in {found.alone:.0%} of prompts: quality checks do not see it; the spectral flag was "
        f"{'raised' if flagged else 'not raised'}. Served with the bound of probation it follows in {found.bounded:.0%}, and an honest "
        f"expert keeps {found.kept:.0%} of its gain"
    )
    table.add("installed backdoor", about, [code], **found._asdict() | {"expert": found.expert.digest, "flagged": flagged})


if __name__ == "__main__":
    main()
