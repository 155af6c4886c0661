"""Verbs of mixtures of experts."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from elmwood.cli.merge import settings_of, values_of
from elmwood.cli.options import NameOption, Output, RngSeedOption, SettingOption
from elmwood.cli.screen import bars, emit, made, out, table, talk
from elmwood.ranges import NewFile
from elmwood.report.plots import loads_plot
from elmwood.study import mixing
from elmwood.study.quality.selection import Tuned


def mix(
    forest: Annotated[str, Argument(help="Name or digest; or a mixture, to take experts out --without anything else.")],
    gates: Annotated[
        str,
        Option(
            help="How experts are chosen before tuning: hidden (what each domain looks like to the seed), arrow (what adapters change), "
            "random, or module:function."
        ),
    ] = "hidden",
    top_k: Annotated[int, Option(help="Experts a token goes through; as many as there are is soft routing.")] = 2,
    scale: Annotated[
        str,
        Option(help="Of the gates: the larger, the more the first choice counts; of several, 0.5,1,2, the best on held-out text."),
    ] = "1",
    method: Annotated[
        str, Option(help="Of what all share: a merge rule, module:function, or seed. What no expert changed is the seed's anyway.")
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
    with bars() as progress:
        done = mixing.mix(
            forest, output.store, gates=gates, top_k=top_k, scale=values_of("scale", scale) or [], method=method,
            settings=settings_of(settings), low_rank=low_rank, seed_expert=seed_expert,
            seed_bias=seed_bias, without=without or [], documents=documents, rng_seed=rng_seed, name=name, progress=progress,
        )  # fmt: skip
    if done.tuned:
        _print_scales(done.tuned)
    made(done.record, name, output.as_json)


def _print_scales(tuned: Tuned) -> None:
    best = min(tuned.losses, key=lambda one: tuned.losses[one].value)
    rows = [
        (one, f"{loss.value:.4f}", "best" if one == best else f"+{tuned.behind[one].value:.4f} ± {tuned.behind[one].standard_error:.4f}")
        for one, loss in tuned.losses.items()
    ]  # fmt: skip
    table("gates on the tune half of held-out text", ("", "bits per byte", "behind"), rows, to=talk)


def loads(
    mixture: Annotated[str, Argument(help="Name or digest.")],
    documents: Annotated[int, Option(help="Held-out documents of each domain.")] = 32,
    plot: Annotated[Path | None, Option(help="Draw loads by layer and domain into this SVG file."), NewFile()] = None,
    output: Output = Output(),
) -> None:
    """Load of each expert of a mixture, by layer and domain, and which experts are dead."""
    with bars() as progress:
        found = mixing.loads(mixture, output.store, documents=documents, progress=progress)
    if plot:
        plot.write_text(loads_plot(found.share_LDE, found.layers, found.domains, found.experts, mixing.DEAD), encoding="utf-8")
    if output.as_json:
        share = found.share_LDE.round(5).tolist()
        return emit({key: value for key, value in found._asdict().items() if key != "share_LDE"} | {"share": share})
    rows = [
        (f"layer {layer}", *(f"{share:.1%}" for share in share_DE.mean(0)))
        for layer, share_DE in zip(found.layers, found.share_LDE, strict=True)
    ]
    table(f"share of the weight, {documents} held-out documents of each domain", ("", *found.experts), rows)
    out.print(found.summary(), soft_wrap=True)
    if plot:
        talk.print(f"loads by layer and domain: {plot}")
