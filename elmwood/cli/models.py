"""Verbs of finished models: gather them, sample from them."""

from typing import Annotated

from typer import Argument, Option

from elmwood.cli import old_models
from elmwood.cli.options import MixingOption, NameOption, Output, RngSeedOption


def forest(
    partition: Annotated[str, Argument(help="Name or digest.")],
    experts: Annotated[list[str], Argument(help="Names or digests; NAME/ stands for all experts so named.")],
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Combine a seed, a partition and experts into a forest."""
    old_models.forest(partition=partition, experts=experts, name=name, store=output.store, as_json=output.as_json)


def chat(
    model: Annotated[str, Argument(help="A seed, expert, merge, ensemble or forest: name or digest.")],
    mixing: MixingOption = None,
    prompt: Annotated[str | None, Option(help="Continue this and stop; default: read prompts from the terminal.")] = None,
    max_tokens: Annotated[int, Option(help="At most so many new tokens.")] = 128,
    temperature: Annotated[float, Option(help="Of sampling; 0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, Option(help="Sample from the likeliest tokens of this total probability.")] = 0.95,
    rng_seed: RngSeedOption = 0,
    output: Output = Output(),
) -> None:
    """Continue text, and show which experts were used."""
    old_models.chat(model=model, mixing=mixing, prompt=prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p,
          rng_seed=rng_seed, store=output.store, as_json=output.as_json)  # fmt: skip
