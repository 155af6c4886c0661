"""What the verb `fit` does: say what training will take."""

from elmwood.cli.screen import count, duration, emit, out, short, table
from elmwood.engine import cores
from elmwood.records import Recipe, Seed
from elmwood.store import Store


def fit(*, seed, method, batch, length, rank, memory, store, as_json) -> None:
    from elmwood.train.fit import fit as predict  # torch

    home = Store(store)
    known = home.load(seed, Seed) if seed in home.names() or len(seed) == 64 else None
    length = length or min(known.context if known else 1024, 1024)
    recipe = Recipe(method=method, steps=1, batch=batch, length=length, rank=rank, threads=cores())
    answer = predict(known or seed, recipe, home, memory=memory and count(memory))
    if as_json:
        emit(answer.model_dump(mode="json"))
        return
    rows = [(what, short(size) + "B") for what, size in answer.components.items()]
    table(f"{method} on {seed}: {short(answer.parameters)} parameters", ("peak memory", ""), [*rows, ("total", short(answer.total) + "B")])
    out.print(f"{short(answer.tokens_per_second)} tokens/s here; a million tokens take {duration(1e6 / answer.tokens_per_second)}")
    out.print(answer.verdict)
