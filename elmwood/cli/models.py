"""Verbs of finished models: gather them, sample from them."""

import sys
from collections.abc import Iterator
from typing import Annotated, NamedTuple

from typer import Argument, Option

from elmwood.cli.options import MixingOption, NameOption, Output, RngSeedOption
from elmwood.cli.screen import emit, made, printable, talk
from elmwood.store import Store
from elmwood.study import ancestry
from elmwood.study.trial import check_use


def forest(
    partition: Annotated[str, Argument(help="Name or digest.")],
    experts: Annotated[list[str], Argument(help="Names or digests; NAME/ is all names below it.")],
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Combine a seed, a partition and experts into a forest."""
    store = Store(output.store)
    gathered = ancestry.forest(partition, experts, name=name, store=store)
    for expert in {store.resolve(one) for one in store.expand(experts)} - set(gathered.experts):
        talk.print(f"left out: expert {expert[:8]}, since every part of its domain has an expert of its own", style="yellow")
    made(gathered, name, output.as_json)


class Sampling(NamedTuple):
    """How tokens are chosen."""

    max_tokens: Annotated[int, Option(help="Most new tokens.")] = 128
    temperature: Annotated[float, Option(help="Of sampling; 0 takes the likeliest token.")] = 0.8
    top_p: Annotated[float, Option(help="Sample from the likeliest tokens of this total probability.")] = 0.95
    rng_seed: RngSeedOption = 0


def chat(
    model: Annotated[str, Argument(help="A seed, expert, merge, ensemble or forest: name or digest.")],
    mixing: MixingOption = None,
    prompt: Annotated[str | None, Option(help="Continue this and stop; default: read prompts from the terminal.")] = None,
    sampling: Sampling = Sampling(),
    output: Output = Output(),
) -> None:
    """Continue text, and show which experts were used."""
    opened = ancestry.open_model(model, mixing=mixing, store=output.store)
    check_use(opened.seed, "generate")  # before anything is typed
    for text in [prompt] if prompt is not None else _typed():
        sample = ancestry.generate(opened, text, on_text=_ignore if output.as_json else _write, **sampling._asdict())
        if output.as_json:
            emit(sample._asdict())
        else:
            _write("\n")
            used = ", ".join(f"{expert} {share:.0%}" for expert, share in sample.experts.items() if share >= 0.005)
            talk.print(f"experts used: {used}", style="dim")


def _typed() -> Iterator[str]:
    """Prompts from the terminal, until it closes."""
    try:
        while True:
            yield input("> ")
    except EOFError:
        talk.print("")


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    """Output as JSON holds the whole text."""
