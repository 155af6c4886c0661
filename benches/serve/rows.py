"""The engine of rows (elmwood/ensemble/batch) against plain models and PEFT's mixed batches.

    python -m benches.serve.rows one [--shape 135M] [--rank 16] [--experts 4] [--late 0.25]    one user: decoding and reading a prompt
    python -m benches.serve.rows many [--shape 17M] [--rank 8] [--registered 1000] [--users 64]    users of experts by Zipf's law
    python -m benches.serve.rows churn [--registered 10000]    registration, and memory while each expert is loaded once
    python -m benches.serve.rows cold [--shape 17M] [--users 16]    time to the first token of experts on the disk and in a slot

One JSON line per way. `cpu`: seconds of this process, which can be compared on a busy machine; `seconds`: of a wall clock.
"""

import argparse
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from peft import PeftModel

from benches import common
from benches.models import SHAPES, Spent, experts, model, rounds, say_rounds, spent
from benches.models import seed as make_seed
from benches.peers.decode import domains, hugging_face, model_of
from elmwood.ensemble.batch.engine import Batched, open_batched
from elmwood.ensemble.batch.interface import Ended, Limits, Request
from elmwood.ensemble.mixture import open_model
from elmwood.records import Ensemble, Expert, Forest, Record
from elmwood.store import Store

warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT 0.21 with transformers 5.23
SHAPES["tiny"] = (64, 96, 2, 4, 4, 512)
FILES = 32  # adapters with numbers of their own; others have a digest of their own, and the files of one of these
FIRST = 4  # tokens after which decoding is timed


class Heard:
    """When the tokens of a request came."""

    def __init__(self, engine: Batched, request: Request):
        self.times: list[Spent] = []
        self.sent, self.ended = perf_counter(), threading.Event()
        engine.submit(request, self)

    def __call__(self, event: object) -> None:
        if isinstance(event, Ended):
            assert event.reason in ("length", "cancelled"), event
            self.ended.set()
        else:
            self.times.append(Spent(perf_counter(), process_time()))

    def wait(self) -> "Heard":
        self.ended.wait()
        return self


def ask(length: int, tokens: int, *, shift: int = 0, only: Sequence[str] = ()) -> Request:
    """A greedy request; the prompts of other shifts have nothing in common."""
    prompt = tuple((1 + shift + 7 * n) % 500 for n in range(length))
    return Request(prompt, tokens, 0.0, stops=frozenset(), only=tuple(only))


# ---- one user


def one(options: argparse.Namespace, folder: Path) -> None:
    store, parted = Store(folder / "store"), None
    seed, base = make_seed(options.shape, store), model(options.shape)
    parted = domains(options.experts, folder, store)
    members = experts(seed, base, options.experts, options.rank, store, partition=parted.digest)
    ensemble = forest_of(seed, parted, members, store, top_k=options.experts)
    plain = model_of(open_model(seed, store, options.device))
    last = experts(seed, base, options.experts, options.rank, store, options.late, partition=parted.digest)
    late = forest_of(seed, parted, last, store, top_k=options.experts)
    opened: dict[str, Record] = {
        "seed, engine": seed, "one adapter, engine": members[0], "ensemble, engine": ensemble, "late, engine": late,
        "activated, engine": ensemble.model_copy(update={"mixing": "activated"}),
    }  # fmt: skip
    engines = {name: open_batched(record, store, options.device) for name, record in opened.items()}
    engines["ensemble, deterministic"] = open_batched(ensemble, store, options.device, Limits(deterministic=True))
    shifts = iter(range(10**6))

    def decode(engine: Batched) -> Spent:
        times = Heard(engine, ask(options.prompt, options.tokens + FIRST, shift=next(shifts))).wait().times
        return Spent(*((last - first) / options.tokens for first, last in zip(times[FIRST - 1], times[-1], strict=True)))

    def read(engine: Batched) -> Spent:
        return spent(lambda: Heard(engine, ask(options.prompt, 1, shift=next(shifts))).wait())

    def read_plain() -> Spent:
        tokens = torch.tensor([[(n * 7) % 500 for n in range(options.prompt)]], device=plain.device)
        return spent(lambda: plain(input_ids=tokens, use_cache=True, logits_to_keep=1).logits.log_softmax(-1))

    decoders: dict[str, Callable[[], Spent]] = {"plain": lambda: hugging_face(plain, 1, options.tokens)}
    readers: dict[str, Callable[[], Spent]] = {"plain": read_plain}
    for name, engine in engines.items():
        assert engine
        decoders[name], readers[name] = (lambda engine=engine: decode(engine)), (lambda engine=engine: read(engine))
    about = {key: getattr(options, key) for key in ("shape", "rank", "experts", "late", "prompt", "tokens", "threads")}
    say_rounds("serve one, a token", rounds(decoders, options.rounds), ("plain",), **about)
    say_rounds("serve one, a prompt", rounds(readers, options.rounds), ("plain",), **about)
    for engine in engines.values():
        engine.close()  # type: ignore[union-attr]


# ---- many users


def many(options: argparse.Namespace, folder: Path) -> None:
    store = Store(folder / "store")
    seed, base = make_seed(options.shape, store), model(options.shape)
    parted = domains(4, folder, store)
    members = registered(seed, base, options, store, parted)
    engine, opened_s = common.timed(lambda: open_batched(forest_of(seed, parted, members, store, top_k=1), store, options.device))
    assert engine
    common.say("serve many, opened", experts=len(members), seconds=opened_s)
    drawn = zipf(len(members), options.users, 0)
    chosen = [engine.experts[n] for n in drawn]
    peft, names = peers(base, [store.folder(store.load(digest, Expert).files) for digest in sorted(set(chosen))])
    of_user = [names[sorted(set(chosen)).index(digest)] for digest in chosen]
    shifts = iter(range(10**6))

    def serve(digests: Sequence[str]) -> Spent:
        heard = [Heard(engine, ask(options.prompt, options.tokens + FIRST, shift=next(shifts), only=(digest,))) for digest in digests]
        times = [one.wait().times for one in heard]
        first = Spent(*(max(part) for part in zip(*(one[FIRST - 1] for one in times), strict=True)))
        last = Spent(*(max(part) for part in zip(*(one[-1] for one in times), strict=True)))
        return Spent(*((after - before) / (options.tokens * len(digests)) for before, after in zip(first, last, strict=True)))

    tasks = {
        "engine, Zipf": lambda: serve(chosen),
        "engine, one adapter": lambda: serve([chosen[0]] * options.users),
        "engine, seed": lambda: serve(["seed"] * options.users),
        "peft, mixed batch": lambda: scaled(hugging_face(peft, options.users, options.tokens, adapter_names=of_user), options.users),
    }
    about = {key: getattr(options, key) for key in ("shape", "rank", "registered", "users", "prompt", "tokens", "threads")}
    found = rounds(tasks, options.rounds)
    say_rounds("serve many, a token", found, ("peft, mixed batch", "engine, one adapter"), distinct=len(set(chosen)), **about)
    common.say("serve many, counts", **engine.counts()._asdict())
    engine.close()


def scaled(time: Spent, by: int) -> Spent:
    return Spent(time.wall / by, time.cpu / by)


def peers(base, folders: Sequence[Path]) -> tuple[PeftModel, list[str]]:
    names = [str(n) for n in range(len(folders))]
    peft = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    for name, path in zip(names[1:], folders[1:], strict=True):
        peft.load_adapter(path, adapter_name=name)
    return peft.eval(), names


def zipf(count: int, draws: int, rng_seed: int) -> list[int]:
    """Numbers below `count`, the n-th as often as 1 / n."""
    share = 1 / np.arange(1, count + 1)
    return np.random.default_rng(rng_seed).choice(count, draws, p=share / share.sum()).tolist()


def registered(seed, base, options: argparse.Namespace, store: Store, parted) -> list[Expert]:
    """Experts with digests of their own, over FILES different adapters."""
    kinds = experts(seed, base, min(FILES, options.registered), options.rank, store)
    members = []
    for n in range(options.registered):
        place = {"partition": parted.digest, "domain": n % len(parted.domains), "contributor": str(n)}
        members.append(kinds[n % len(kinds)].model_copy(update=place))
        store.add(members[-1])
    return members


def forest_of(seed, parted, members: Sequence[Expert], store: Store, **fields) -> Ensemble:
    forest = Forest(seed=seed.digest, partition=parted.digest, experts=tuple(sorted(one.digest for one in members)))
    ensemble = Ensemble(forest=forest.digest, router="uniform", **fields)
    for record in (forest, ensemble):
        store.add(record)
    return ensemble


# ---- ten thousand experts


def churn(options: argparse.Namespace, folder: Path) -> None:
    store = Store(folder / "store")
    seed, base = make_seed("tiny", store), model("tiny")
    parted = domains(4, folder, store)
    members = registered(seed, base, options, store, parted)
    ensemble = forest_of(seed, parted, members, store, top_k=1)
    limits = Limits(slots=64, queue=512, host_bytes=options.host_mb << 20)
    engine, opened_s = common.timed(lambda: open_batched(ensemble, store, options.device, limits))
    assert engine
    common.say(
        "serve churn, opened", experts=len(members), seconds=opened_s, places=len(engine.host_HP), expert_kb=engine.host_HP[0].nbytes / 1e3
    )
    at_once, seen = 256, list[tuple[int, float]]()
    for first in range(0, len(members), at_once):
        digests = engine.experts[first : first + at_once]
        _, seconds = common.timed(lambda digests=digests: [one.wait() for one in [Heard(engine, ask(8, 2, only=(d,))) for d in digests]])
        counts = engine.counts()
        seen.append((counts.loads, common.own_memory()))
        if first % (at_once * max(1, len(members) // at_once // 8)) == 0:
            common.say(
                "serve churn", loads=counts.loads, memory_mb=seen[-1][1], seconds=seconds / len(digests), mismatches=counts.mismatches
            )
    (loads, before), (most, after) = seen[len(seen) // 4], seen[-1]  # the tier in main memory has been full for long
    common.say("serve churn, end", memory_mb=after, kb_each_load=1e3 * (after - before) / (most - loads), **engine.counts()._asdict())
    engine.close()


# ---- hot and cold


def cold(options: argparse.Namespace, folder: Path) -> None:
    store = Store(folder / "store")
    seed, base = make_seed(options.shape, store), model(options.shape)
    parted = domains(4, folder, store)
    options.registered = options.users + 2 * options.asked
    members = registered(seed, base, options, store, parted)
    engine = open_batched(forest_of(seed, parted, members, store, top_k=1), store, options.device)
    assert engine
    others = engine.experts[options.users :]
    for digest in others:  # so that the flat records are there, as after a restart; and evict them again
        Heard(engine, ask(4, 1, only=(digest,))).wait()
    engine.close()
    engine = open_batched(forest_of(seed, parted, members, store, top_k=1), store, options.device)
    assert engine
    long = options.asked * 64
    crowd = [Heard(engine, ask(8, min(long, engine.context - 9), shift=n, only=(engine.experts[n],))) for n in range(options.users)]
    seen: dict[str, list[float]] = {"cold": [], "hot": []}
    for n in range(2 * options.asked):
        kind = "hot" if n % 2 else "cold"  # in turn: what was cold is asked again, with another prompt
        one = Heard(engine, ask(options.prompt, 1, shift=n, only=(others[n // 2],))).wait()
        seen[kind].append(one.times[0].wall - one.sent)
    running = sum(not one.ended.is_set() for one in crowd)
    line = {f"{kind} p{share}": float(np.percentile(times, share)) for kind, times in seen.items() for share in (50, 99)}
    ratios = {f"cold of hot p{share}": line[f"cold p{share}"] / line[f"hot p{share}"] for share in (50, 99)}
    common.say("serve cold", asked=options.asked, users=options.users, still_running=running, **line, **ratios, **engine.counts()._asdict())
    engine.close()


WAYS = {"one": one, "many": many, "churn": churn, "cold": cold}
SHAPE = {"one": ("135M", 16), "many": ("17M", 8), "churn": ("tiny", 4), "cold": ("17M", 8)}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--shape")
    parser.add_argument("--device", default="cpu")
    for name, value in (("rank", 0), ("experts", 4), ("registered", 0), ("users", 0), ("asked", 100), ("prompt", 64), ("tokens", 24),
                        ("rounds", 5), ("threads", 2)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--host-mb", type=int, default=16, help="of experts in main memory, in `churn`: 0 for what a server takes")
    parser.add_argument("--late", type=float, default=0.25, help="share of the layers with adapters, in the row `late`")
    options = parser.parse_args()
    shape, rank = SHAPE[options.way]
    options.shape, options.rank = options.shape or shape, options.rank or rank
    options.registered = options.registered or (10_000 if options.way == "churn" else 1_000)
    options.users = options.users or (64 if options.way == "many" else 16)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        WAYS[options.way](options, Path(folder))


if __name__ == "__main__":
    main()
