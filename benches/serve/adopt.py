"""A newer ensemble takes the place of the one that is served while users stream; and the first tokens of a server after a restart.

    python -m benches.serve.adopt [--shape 135M --rank 16]

Random weights. `adopt`: seconds from the look at the source to the first request of the new model, the longest pause of a stream then
beside that before, and memory. `restart`: the first token of each expert by a new engine, over adapters as PEFT wrote them and over the
packed ones that an earlier process has left.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from benches import common
from benches.models import Spent, experts, model, spent
from benches.models import seed as make_seed
from benches.peers.decode import domains
from benches.serve.rows import Heard, ask, forest_of
from elmwood.ensemble.batch.engine import Batched, open_batched
from elmwood.records import Ensemble
from elmwood.serve.live import Follower, Live, Source
from elmwood.serve.model import Served, open_served
from elmwood.store import Store


def adopt(options: argparse.Namespace, first: Ensemble, second: Ensemble, store: Store) -> None:
    """`second` has one expert more."""
    before = common.own_memory()
    served = open_served(first, store, device="cpu")
    one = common.own_memory() - before

    def opened(digest: str, like: Served) -> Served:
        return open_served(digest, store, device="cpu", like=like)

    live = Live(served)
    follower = Follower(live, Source(lambda: second.digest, opened, 1e6, first.digest))
    users = [Heard(served.engine, ask(16, options.tokens, shift=n)) for n in range(options.users)]
    while min(len(user.times) for user in users) < options.tokens // 4:
        users[0].ended.wait(0.05)
    began = perf_counter()
    taken = spent(lambda: follower.look())
    ended = perf_counter()
    assert live.now is not served, live.adopted
    both = common.own_memory() - before
    new = [Heard(live.now.engine, ask(16, 4, shift=n)) for n in range(options.users)]
    for user in (*users, *new):
        user.wait()
    assert all(len(user.times) == options.tokens for user in users), "a stream was cut"
    pauses: dict[bool, list[float]] = {True: [], False: []}
    for user in users:
        for earlier, later in zip(user.times, user.times[1:], strict=False):
            pauses[began <= later.wall and earlier.wall <= ended].append(later.wall - earlier.wall)
    common.say(
        "serve adopt", shape=options.shape, experts=len(served.cards), users=options.users, seconds=taken.wall, cpu=taken.cpu,
        first_token_s=max(user.times[0].wall - user.sent for user in new), longest_pause_s=max(pauses[True]),
        longest_pause_otherwise_s=max(pauses[False]), memory_mb=one, memory_both_mb=both,
    )  # fmt: skip
    live.close()


def restart(options: argparse.Namespace, ensemble: Ensemble, store: Store) -> None:
    def run() -> tuple[Spent, Spent]:
        """Opening an engine, and the first token of each expert."""
        made: list[Batched | None] = []
        opening = spent(lambda: made.append(open_batched(ensemble, store, "cpu")))
        (engine,) = made
        assert engine
        tokens = spent(lambda: [Heard(engine, ask(8, 1, only=(digest,))).wait() for digest in engine.experts], len(engine.experts))
        engine.close()
        return opening, tokens

    for number in range(options.rounds):
        shutil.rmtree(store.root / "work" / "packed", ignore_errors=True)
        cold, warm = run(), run()
        common.say(
            "serve restart", shape=options.shape, experts=options.experts, round=number, open_s=warm[0].wall, cold_s=cold[1].wall,
            warm_s=warm[1].wall, cold_cpu=cold[1].cpu, warm_cpu=warm[1].cpu, warm_of_cold_cpu=warm[1].cpu / cold[1].cpu,
        )  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", default="17M")
    for name, value in (("rank", 8), ("experts", 32), ("users", 8), ("tokens", 96), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        store = Store(Path(folder) / "store")
        seed, base = make_seed(options.shape, store), model(options.shape)
        parted = domains(4, Path(folder), store)
        members = experts(seed, base, options.experts, options.rank, store)
        members = [one.model_copy(update={"partition": parted.digest, "domain": n % 4}) for n, one in enumerate(members)]
        for one in members:
            store.add(one)
        del base
        first, second = (forest_of(seed, parted, chosen, store, top_k=2) for chosen in (members[:-1], members))
        restart(options, second, store)
        adopt(options, first, second, store)


if __name__ == "__main__":
    main()
