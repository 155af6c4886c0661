"""The model card of a mixture: lineage, gates, and what all experts share."""

from elmwood.records import Mixture, Seed


def card(made: Mixture, seed: Seed) -> str:
    """Markdown with the header that model hubs read."""
    top = ["---", "library_name: transformers", "tags: [moe, elmwood]", *([f"license: {seed.licence}"] if seed.licence else []), "---"]
    gates = made.gates
    lines = [*top, f"# {len(made.experts)} experts of {seed.name} in one mixture", ""]
    lines += [f"Seed: {seed.name}, {seed.architecture}, `{seed.digest}`. Forest: `{made.forest}`.", ""]
    lines += [f"Gates: {gates.kind}, scale {gates.scale:g}, top-{gates.top_k}. {_tuned(made)}", ""]
    lines += ["| number | expert |", "|---|---|"]
    lines += [f"| {e} | `{digest}`{' (the seed itself)' if digest == seed.digest else ''} |" for e, digest in enumerate(made.experts)]
    lines += ["", "Feed-forward layers are the experts' own, bit by bit. " + _shared(made), ""]
    return "\n".join(lines)


def _tuned(made: Mixture) -> str:
    if made.recipe is None:
        return "Never tuned."
    return f"Tuned for {made.recipe.tokens} tokens: {made.recipe.tuned}, from mixture `{made.parent}`."


def _shared(made: Mixture) -> str:
    if not made.contributions:
        return "Everything else is the seed's."
    return f"Everything else: `{made.method}` of {len(made.contributions)} experts."
