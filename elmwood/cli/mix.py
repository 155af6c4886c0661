"""What `mix` does: a forest becomes one mixture of experts, or a mixture gives an expert back."""

from elmwood.cli.screen import bars, keep
from elmwood.merge.mixture_build import Mixing, mix, order_of
from elmwood.merge.mixture_gates import random_rows
from elmwood.merge.states import seed_places
from elmwood.records import Forest, Gates, Seed
from elmwood.store import Store


def mix_verb(*, forest, gates, top_k, scale, method, low_rank, seed_expert, without, rng_seed, name, store, as_json) -> None:
    home = Store(store)
    given = home.load(forest, Forest)
    gone = {home.resolve(one) for one in without}
    given = given.model_copy(update={"experts": tuple(digest for digest in given.experts if digest not in gone)})
    home.add(given)
    settings = Gates(kind=gates, top_k=top_k, scale=scale, seed_bias=0.0 if seed_expert else None, rng_seed=rng_seed)
    mixing = Mixing(gates=settings, layout="low-rank" if low_rank else "checkpoint", method=method)
    rows = random_rows(seed_places(home.load(given.seed, Seed), home), order_of(given, seed_expert, home), rng_seed, scale)
    with bars() as progress:
        made = mix(given, rows, mixing, home, progress)
    keep(home, made, name, as_json)
