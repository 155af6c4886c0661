"""Verbs of finished models: gather them, sample from them, combine them into mixtures of experts."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from typer import Argument, Option

from elmwood.cli.merge import settings_of, values_of
from elmwood.cli.options import MixingOption, NameOption, Output, RngSeedOption, RoutingOption, SettingOption, pairs_of
from elmwood.cli.screen import bars, emit, made, out, printable, table, talk
from elmwood.errors import BadInput
from elmwood.ranges import NewFile
from elmwood.report.plots import loads_plot
from elmwood.store import Store
from elmwood.study import ancestry, mixing
from elmwood.study.quality.selection import Tuned
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


class Serving(NamedTuple):
    """How a model is served."""

    host: Annotated[str, Option(help="Address to listen on; a proxy with TLS stands before it.")] = "127.0.0.1"
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")] = 8000
    host_name: Annotated[list[str] | None, Option(help="A name that requests may use, as a proxy's (repeatable).")] = None
    api_key_file: Annotated[Path | None, Option("--api-key-file", help="Keys, one a line: requests need one of them.")] = None
    cors: Annotated[list[str] | None, Option(help="An origin whose pages may use the server (repeatable).")] = None
    queue: Annotated[int, Option(min=1, help="Requests that wait; those beyond get status 429.")] = 256
    running: Annotated[int, Option(min=1, help="Requests at work at once.")] = 64
    drain: Annotated[float, Option(min=0, help="Seconds that requests at work get when the server is told to stop.")] = 30.0
    log: Annotated[str, Option(help="A line for each request on stderr: json, text or none.")] = "text"


class Newer(NamedTuple):
    """Where newer models come from while one is served."""

    hub: Annotated[str | None, Option(metavar="URL", help="Serve this hub's newest snapshot, and each newer one, not MODEL.")] = None
    name: Annotated[str | None, Option(help="What a hub's names in the store begin with; default: the name of its run.")] = None
    root_key: Annotated[str | None, Option(help="Public key that must have signed the hub's run; default: the first one seen.")] = None
    watch: Annotated[bool, Option("--watch", help="Serve what MODEL names whenever that changes.")] = False
    every: Annotated[float, Option(min=0.1, help="Seconds between two looks for something newer.")] = 30.0


class Several(NamedTuple):
    """Servers of one model behind one address."""

    replicas: Annotated[int, Option(min=1, help="Servers of the model; requests go where their experts are at hand.")] = 1
    engine: Annotated[str, Option(help="Where replicas run: local, in processes of this machine, or ray.")] = "local"


class Followed(NamedTuple):
    """A model of the store, or a hub's newest."""

    first: str  # digest
    newest: Callable[[], str]
    name: str  # in the store


def follow(model: str | None, newer: Newer, store: Store, settings: ancestry.Settings, mixing: str | None = None) -> Followed:
    """Raises BadInput, Forged, Damaged, Unreachable, Problem."""
    if (model is None) == (newer.hub is None):
        raise BadInput("name a model of the store, or a hub with --hub: one of the two")
    if model is not None:
        ancestry.with_mixing(store.load(model), mixing, store, settings)  # before anything is opened
        return Followed(store.resolve(model), partial(store.resolve, model), model)
    from elmwood.hub.client.pull import Following

    following = Following(str(newer.hub), store, name=newer.name, root_key=newer.root_key)
    with bars() as progress:
        first = following.begin(progress, lambda said: talk.print(said, style="yellow", soft_wrap=True))
    return Followed(first, following.newest, following.model)


def serve(
    model: Annotated[str | None, Argument(help="A seed, expert, merge, mixture, ensemble or forest: name or digest.")] = None,
    mixing: MixingOption = None,
    settings: RoutingOption = None,
    deterministic: Annotated[bool, Option("--deterministic", help="The same bytes, whoever asks beside: slower.")] = False,
    serving: Serving = Serving(),
    newer: Newer = Newer(),
    several: Several = Several(),
    output: Output = Output(),
) -> None:
    """Serve a model to OpenAI clients and, at /, to people. It can say which experts answered."""
    from elmwood.ensemble.batch.interface import USUAL
    from elmwood.serve.live import Source
    from elmwood.serve.logs import start_log
    from elmwood.serve.model import open_served
    from elmwood.serve.run import read_keys, serve

    start_log(serving.log)
    keys, store = read_keys(serving.api_key_file) if serving.api_key_file else [], Store(output.store)
    changed, watch = pairs_of(settings), bool(newer.hub or newer.watch)
    found = follow(model, newer, store, changed, mixing)
    how: dict[str, Any] = {"mixing": mixing, "settings": changed, "name": ancestry.name_of(found.name, store)}
    how["limits"] = USUAL._replace(queue=serving.queue, running=serving.running, deterministic=deterministic)
    if several.replicas > 1 or several.engine != "local":
        from elmwood.serve.gateway.opening import add_answers, open_newer, open_replicas
        from elmwood.serve.gateway.replicas import Plan

        plan = Plan.of(found.name if watch else found.first, store, watch=watch, **how)
        opened, answers = open_replicas(plan, several.replicas, several.engine), add_answers
        opening = partial(open_newer, plan)
    else:
        opened, answers = open_served(found.first, store, **how), None
        opening = partial(open_served, store=store, **how)
    source = Source(found.newest, opening, newer.every, found.first) if watch else None

    def ready(address: str) -> None:
        emit({"model": opened.record.digest, "url": address}) if output.as_json else out.print(
            f"{opened.name} at {address}, for OpenAI clients at {address}/v1; ctrl-c stops it", soft_wrap=True, markup=False
        )

    serve(
        opened, serving.host, serving.port, keys=keys, cors=serving.cors or [], names=serving.host_name or [], source=source,
        answers=answers, drain_s=serving.drain, ready=ready,
    )  # fmt: skip


class Engines(NamedTuple):
    """The engines behind a gateway."""

    upstream: Annotated[list[str], Option("--upstream", help="Address of a vLLM, SGLang or elmwood server (repeatable).")]
    adapters: Annotated[Path, Option(help="Folder of adapters that the engines read; missing ones are written.")] = Path("adapters")
    upstream_path: Annotated[str | None, Option(help="Where the engines see that folder, if elsewhere.")] = None
    max_adapters: Annotated[int, Option(min=1, help="Adapters that each engine holds; vLLM: its --max-cpu-loras.")] = 32
    upstream_key_file: Annotated[Path | None, Option(help="A file with the engines' API key.")] = None


def gateway(
    engines: Engines,
    ensemble: Annotated[str | None, Argument(help="An ensemble or forest of LoRA experts: name or digest.")] = None,
    settings: RoutingOption = None,
    serving: Serving = Serving(),
    newer: Newer = Newer(),
    output: Output = Output(),
) -> None:
    """Route each request to an expert that a vLLM, SGLang or elmwood server behind it runs. No model is opened here."""
    from elmwood.serve.gateway.opening import Behind, add_answers, open_gateway
    from elmwood.serve.live import Source
    from elmwood.serve.logs import start_log
    from elmwood.serve.run import read_keys, serve

    start_log(serving.log)
    keys = read_keys(serving.api_key_file) if serving.api_key_file else []
    key = read_keys(engines.upstream_key_file)[0] if engines.upstream_key_file else None
    behind = Behind(
        engines.upstream, engines.adapters, engines.upstream_path, engines.max_adapters, key, serving.queue + serving.running
    )  # fmt: skip
    store, changed = Store(output.store), pairs_of(settings)
    found = follow(ensemble, newer, store, changed)
    opening = partial(open_gateway, store=store, behind=behind, settings=changed, name=ancestry.name_of(found.name, store))
    opened = opening(found.first)
    source = Source(found.newest, opening, newer.every, found.first)

    def ready(address: str) -> None:
        emit({"model": opened.record.digest, "url": address}) if output.as_json else out.print(
            f"{opened.name} at {address}, answered by {', '.join(engines.upstream)}; ctrl-c stops it", soft_wrap=True, markup=False
        )

    serve(
        opened, serving.host, serving.port, keys=keys, cors=serving.cors or [], names=serving.host_name or [],
        source=source if newer.hub or newer.watch else None, answers=add_answers, drain_s=serving.drain, ready=ready,
    )  # fmt: skip


class Sampling(NamedTuple):
    """How tokens are chosen."""

    max_tokens: Annotated[int, Option(help="Most new tokens.")] = 128
    temperature: Annotated[float, Option(help="Of sampling; 0 takes the likeliest token.")] = 0.8
    top_p: Annotated[float, Option(help="Sample from the likeliest tokens of this total probability.")] = 0.95
    rng_seed: RngSeedOption = 0


def chat(
    model: Annotated[str, Argument(help="A seed, expert, merge, ensemble or forest: name or digest.")],
    mixing: MixingOption = None,
    settings: RoutingOption = None,
    prompt: Annotated[str | None, Option(help="Continue this and stop; default: read prompts from the terminal.")] = None,
    sampling: Sampling = Sampling(),
    output: Output = Output(),
) -> None:
    """Continue text, and show which experts were used."""
    opened = ancestry.open_model(model, mixing=mixing, settings=pairs_of(settings), store=output.store)
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


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


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
