"""The model card of a mixture: lineage, gates, and what all experts share; and names of others in any card."""

import json
import re

from elmwood.records import Mixture, Seed

MARKS = re.compile(r"[<>&`|*\[\]\\$]")  # what Markdown or HTML would take for more than text
SIMPLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,+()/_-]*")


def mixture_card(made: Mixture, seed: Seed) -> str:
    """Markdown with the header that model hubs read."""
    top = ["---", "library_name: transformers", "tags: [moe, elmwood]", *licence(seed), "---"]
    gates = made.gates
    lines = [*top, f"# {len(made.experts)} experts of {plain(seed.name)} in one mixture", ""]
    lines += [f"Seed: {plain(seed.name)}, {plain(seed.architecture)}, `{seed.digest}`. Forest: `{made.forest}`.", ""]
    lines += [f"Gates: {plain(gates.kind)}, scale {gates.scale:g}, top-{gates.top_k}. {_tuned(made)}", ""]
    lines += ["| number | expert |", "|---|---|"]
    lines += [f"| {e} | `{digest}`{' (the seed itself)' if digest == seed.digest else ''} |" for e, digest in enumerate(made.experts)]
    lines += ["", f"Feed-forward layers are the experts' own{_own(made)}. {_shared(made)}", ""]
    lines += [line for digest in made.removed for line in (_remains(made, digest), "")]
    return "\n".join(lines)


def plain(text: str) -> str:
    """A name as one line of Markdown that is nothing but text. Names may come from others."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return MARKS.sub(lambda mark: f"&#{ord(mark.group())};", " ".join(line.split()))


def licence(seed: Seed) -> list[str]:
    """The line of the header; a licence that is more than an identifier is quoted."""
    if not seed.licence:
        return []
    return [f"license: {seed.licence if SIMPLE.fullmatch(seed.licence) else json.dumps(' '.join(seed.licence.split()))}"]


def _own(made: Mixture) -> str:
    return ", tuned" if made.recipe and made.recipe.tuned == "everything" else ", bit by bit"


def _tuned(made: Mixture) -> str:
    if made.recipe is None:
        return "Never tuned."
    origin = "" if made.removed else f", from mixture `{made.parent}`"
    return f"Tuned for {made.recipe.tokens} tokens: {made.recipe.tuned}{origin}."


def _shared(made: Mixture) -> str:
    tuned = ", then tuned" if made.recipe and made.recipe.tuned in ("shared", "everything") else ""
    tuned = ", norms then tuned" if made.recipe and made.recipe.tuned == "norms" else tuned
    if not made.contributions:
        return f"Everything else is the seed's{tuned}."
    return f"Everything else: `{made.method}` of {len(made.contributions)} experts{tuned}."


def _remains(made: Mixture, digest: str) -> str:
    """What is left of an expert that was taken out."""
    first = f"Expert `{digest}` was taken out: its feed-forward layers and its rows of the gates."
    if any(one.expert == digest for one in made.contributions):
        among = len(made.contributions) + (made.seed in (*made.experts, *made.removed))
        return (
            f"{first} What all share holds it still: it was one of {among} in `{made.method}`, so {1 / among:.1%} of that, and tuning has "
            "changed the sum since, so it cannot be subtracted; mix again without it and tune again to be rid of it."
        )
    beside = "" if made.recipe is None else " What was tuned was tuned beside it."
    if made.contributions:
        return f"{first} What all share was averaged again without it, exactly.{beside}"
    return f"{first} Nothing else had anything of it.{beside}"
