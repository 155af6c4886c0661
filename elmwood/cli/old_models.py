"""What the verbs of finished models do: gather them, talk to them; and what a model is made of."""

import sys
from collections.abc import Sequence

from elmwood.cli.screen import emit, expand, keep, talk
from elmwood.domains.partition import serving
from elmwood.errors import BadInput, ForeignExpert
from elmwood.records import Comparison, Ensemble, Expert, Forest, Merged, Mixture, Partition, Record, Seed
from elmwood.store import Store


def forest(*, partition, experts, name, store, as_json) -> None:
    home = Store(store)
    division = home.load(partition, Partition)
    members = [home.load(one, Expert) for one in expand(home, experts)]
    if not members:
        raise BadInput("a forest needs at least one expert: train some, then name them here")
    for expert in members:
        if expert.seed != members[0].seed:
            raise ForeignExpert(
                f"expert {expert.digest[:8]} grew from seed {expert.seed[:8]}, {members[0].digest[:8]} from {members[0].seed[:8]}; "
                "a forest has one seed: leave one of them out, or retrain it"
            )
    served = serving(division, [(expert.partition, expert.domain) for expert in members], home)
    for expert, places in zip(members, served, strict=True):
        if not places:
            talk.print(f"left out: expert {expert.digest[:8]}, since every part of its domain has an expert of its own", style="yellow")
    members = [expert for expert, places in zip(members, served, strict=True) if places]
    made_of = Forest(seed=members[0].seed, partition=division.digest, experts=tuple(expert.digest for expert in members))
    home.add(made_of)
    keep(home, made_of, name, as_json)


def verdict(comparison: Comparison) -> str:
    """The result in one sentence, whichever way it went: the ensemble chosen on the tune half, held against every control."""
    results = [row for row in comparison.rows if row.role == "result"]
    best = next((row for row in results if row.name == comparison.chosen), min(results, key=lambda row: row.bits_per_byte))
    margin = f" ({best.gain:+.4f} ± {best.gain_error:.4f} bits per byte against the strongest dense model)" if best.gain is not None else ""
    ahead = [row.name for row in comparison.rows if row.role in ("seed", "control") and row.bits_per_byte <= best.bits_per_byte]
    if ahead:
        return f"{best.name} was chosen on the tune half and does not beat: {'; '.join(ahead)}{margin}."
    if best.gain is not None and best.gain < 2 * (best.gain_error or 0):
        return f"{best.name} is level with the best control: the difference is within two standard errors{margin}."
    return f"{best.name} is better than every control{margin}."


def chat(*, model, mixing, prompt, max_tokens, temperature, top_p, rng_seed, store, as_json) -> None:
    from elmwood.ensemble.generate import generate  # torch
    from elmwood.ensemble.mixture import open_model
    from elmwood.lm.files import tokenizer

    home = Store(store)
    record = as_model(home.load(model), home)
    record = mixed(record, mixing, home) if mixing else record
    lm = open_model(record, home)
    words = tokenizer(seed_of(record, home), home)
    asked = iter([prompt]) if prompt is not None else iter(lambda: input("> "), None)
    try:
        for text in asked:
            share: dict[str, float] = {}
            pieces: list[str] = []
            for step in generate(lm, words, text, max_tokens=max_tokens, temperature=temperature, top_p=top_p, rng_seed=rng_seed):
                for speaker, weight in step.weights.items():
                    share[speaker] = share.get(speaker, 0) + weight
                pieces.append(step.text)
                if not as_json:
                    sys.stdout.write(step.text)
                    sys.stdout.flush()
            total = sum(share.values()) or 1
            spoke = {who: round(weight / total, 4) for who, weight in sorted(share.items(), key=lambda item: -item[1])}
            if as_json:
                emit({"prompt": text, "text": "".join(pieces), "experts": spoke})
            else:
                sys.stdout.write("\n")
                talk.print("spoke: " + ", ".join(f"{who} {weight:.0%}" for who, weight in spoke.items() if weight >= 0.005), style="dim")
    except EOFError:
        talk.print("")


def as_model(record: Record, store: Store) -> Record:
    """A forest stands for its ensemble with the default settings; other records for themselves."""
    if isinstance(record, Forest):
        record = Ensemble(forest=record.digest)
        store.add(record)
    return record


def mixed(record: Record, mixing: str, store: Store) -> Ensemble:
    """An ensemble (or a forest, for its default one) that mixes outputs or weights. Raises BadInput."""
    record = as_model(record, store)
    if not isinstance(record, Ensemble):
        raise BadInput(f"--mixing is of ensembles and forests, {record.digest[:8]} is a {record.kind}: leave it out")
    if mixing not in ("outputs", "weights"):
        raise BadInput(f"--mixing {mixing!r}: mix outputs (probabilities, a pass for each expert) or weights (adapters, one pass)")
    made = record.model_copy(update={"mixing": mixing})
    store.add(made)
    return made


def seed_of(record: Record, store: Store) -> Seed:
    """The seed a model grew from. Raises UnknownName."""
    if isinstance(record, Ensemble):
        record = store.load(record.forest, Forest)
    if isinstance(record, Expert | Forest | Merged | Mixture):
        return store.load(record.seed, Seed)
    return store.load(record.digest, Seed)


def common_seed(models: Sequence[Record], store: Store) -> Seed:
    """The seed whose tokenizer cuts the holdout. Raises BadInput where models do not share one."""
    seeds = {seed_of(model, store).digest for model in models}
    if len(seeds) > 1:
        raise BadInput(f"these models grew from {len(seeds)} seeds; a comparison per token needs one: evaluate them one seed at a time")
    return store.load(seeds.pop(), Seed)


def division_of(models: Sequence[Record], named: str | None, store: Store) -> Partition:
    """The partition whose holdout is scored. Raises BadInput where neither the user nor a model names one."""
    if named:
        return store.load(named, Partition)
    for model in models:
        source = store.load(model.forest) if isinstance(model, Ensemble | Mixture) else model
        source = store.load(model.contributions[0].expert) if isinstance(model, Merged) else source
        if found := getattr(source, "partition", None):
            return store.load(found, Partition)
    raise BadInput("none of these models names a partition: say whose held-out text to score with --partition")
