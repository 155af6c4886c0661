"""Verbs of mixtures of experts."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from elmwood.cli import old_mix
from elmwood.cli.options import NameOption, Output, RngSeedOption, SettingOption, typed_options


def mix(
    context: typer.Context,
    forest: Annotated[str, Argument(help="Name or digest; or a mixture, to take experts out --without anything else.")],
    gates: Annotated[
        str,
        Option(
            help="How experts are chosen at first: hidden (what each domain looks like to the seed), arrow (what adapters change), random."
        ),
    ] = "hidden",
    top_k: Annotated[int, Option(help="Experts a token goes through; as many as there are is soft routing.")] = 2,
    scale: Annotated[
        str,
        Option(help="Of the gates: the larger, the more the first choice counts; of several, 0.5,1,2, the best on held-out text."),
    ] = "1",
    method: Annotated[
        str, Option(help="Of what all share: a merge rule, or seed. What no expert changed is the seed's anyway.")
    ] = "average",
    settings: SettingOption = None,
    low_rank: Annotated[bool, Option("--low-rank", help="Keep adapters as factors over one shared feed-forward.")] = False,
    seed_expert: Annotated[bool, Option(help="The seed's own feed-forward as one more expert.")] = True,
    seed_bias: Annotated[float, Option(help="Of hidden gates: added to the logit of the seed's own expert.")] = 0.0,
    without: Annotated[list[str] | None, Option(help="Leave this expert out (repeatable).")] = None,
    documents: Annotated[int | None, Option(help="Held-out documents to choose a scale on, at most.")] = None,
    rng_seed: RngSeedOption = 0,
    name: NameOption = None,
    output: Output = Output(),
) -> None:
    """Combine experts into one mixture-of-experts model of a standard architecture."""
    old_mix.mix_verb(given=typed_options(context), forest=forest, gates=gates, top_k=top_k, scale=scale, method=method,
          settings=settings or [], low_rank=low_rank, seed_expert=seed_expert, seed_bias=seed_bias, without=without or [],
          documents=documents, rng_seed=rng_seed, name=name, store=output.store, as_json=output.as_json)  # fmt: skip


def loads(
    mixture: Annotated[str, Argument(help="Name or digest.")],
    documents: Annotated[int, Option(help="Held-out documents of each domain.")] = 32,
    plot: Annotated[Path | None, Option(help="Draw loads by layer and domain into this SVG file.")] = None,
    output: Output = Output(),
) -> None:
    """Load of each expert of a mixture, by layer and domain, and which experts are dead."""
    old_mix.loads_verb(mixture=mixture, documents=documents, plot=plot, store=output.store, as_json=output.as_json)
