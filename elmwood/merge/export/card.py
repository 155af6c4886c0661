"""Model cards: lineage, licence, method, digests, how to run it. The same model has the same card."""

from collections.abc import Mapping, Sequence

from elmwood.lm.mixture_card import licence, plain
from elmwood.records import Contribution, Expert, Merged, Mixture, Seed, Share

RUN = {
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SEED), FOLDER)  # SEED: the seed, exported""",
    "gguf": "llama-cli -m FOLDER/model.gguf -p TEXT",
    "gguf-adapter": "llama-cli -m SEED/model.gguf --lora FOLDER/model.gguf -p TEXT  # SEED: the seed, exported as gguf",
}

EXACT = "Summed in whole numbers, so that any machine and any order of the experts makes the same bytes."
KERNELS = "The same bytes in any order of the experts, on machines with the same libraries of linear algebra."


def card(
    seed: Seed, method: str, paper: str, settings: Mapping[str, float], rows: Sequence[Contribution], files: Mapping[str, str], *,
    library: str = "transformers", about: str = EXACT,
) -> str:  # fmt: skip
    """Markdown with the header that model hubs read; `library` opens the files, `about` is a sentence on how they were made."""
    top = ["---", f"library_name: {library}", "tags: [merge, elmwood]", *licence(seed), "---"]
    given = ", ".join(f"{name} {value:g}" for name, value in sorted(settings.items()))
    lines = [*top, f"# {len(rows)} experts of {plain(seed.name)}, merged", ""]
    lines += [f"Method: `{method}` ({paper}){'; ' + given if given else ''}.", ""]
    lines += [f"Seed: {plain(seed.name)}, {plain(seed.architecture)}, `{seed.digest}`.", "", "| expert | weight |", "|---|---|"]
    lines += [f"| `{row.expert}` | {'; '.join(_spell(share) for share in row.weight)} |" for row in rows]
    lines += ["", "| file | digest |", "|---|---|", *(f"| {plain(name)} | `{digest}` |" for name, digest in sorted(files.items())), ""]
    lines += [about, ""]
    return "\n".join(lines)


def _spell(share: Share) -> str:
    where = [f"names with {plain(repr(share.tensors))}"] if share.tensors else []
    where += [f"layers {share.layers[0]} to {share.layers[1] - 1}"] if share.layers else []
    return " → ".join(f"{value:g}" for value in share.values) + (f" ({', '.join(where)})" if where else "")


def model_card(
    record: Seed | Expert | Merged | Mixture, seed: Seed, form: str, domain: str | None, files: Mapping[str, str], notes: Sequence[str] = ()
) -> str:
    """Markdown with the header that model hubs read, for one exported folder. `domain`: what an expert's is called; `notes`: sentences
    on this format."""
    top = [
        "---",
        f"library_name: {form.partition('-')[0]}",
        f"tags: [elmwood, {record.kind}]",
        *licence(seed),
        "---",
    ]
    name = plain(seed.name)
    title, facts = name, [f"elmwood {record.kind} `{record.digest}`."]
    match record:
        case Expert():
            title = f"An expert of {name}" + (f" for {plain(domain)}" if domain else "")
            recipe = record.recipe
            facts += [
                f"Trained: {recipe.method}, {recipe.tokens} tokens" + (f", rank {recipe.rank}" if recipe.method != "full" else "") + "."
            ]
            facts += [f"Contributed by {plain(record.contributor)}."] if record.contributor else []
            facts += [f"Partition `{record.partition}`, domain {record.domain}."] if record.partition else []
        case Merged():
            title = f"{len(record.contributions)} experts of {name}, merged"
            facts += [f"Method: `{plain(record.method)}`."]
            facts += [f"- expert `{row.expert}`, weight {'; '.join(_spell(share) for share in row.weight)}" for row in record.contributions]
        case Mixture():
            title = f"{len(record.experts)} experts of {name} in one mixture"
            facts += [
                f"Gates: {plain(record.gates.kind)}, top-{record.gates.top_k}.",
                *(f"- expert `{digest}`" for digest in record.experts),
            ]
    if form in ("transformers", "gguf") and "adapter_config.json" in record.files:
        facts += ["An adapter folded into its seed: each number rounded once."]
    facts += [f"Seed: {name}, {plain(seed.architecture)}, {seed.parameters} parameters, `{seed.digest}`."]
    facts += [f"Licence of the seed: {plain(seed.licence or 'not stated')}.", f"A text begins with token {seed.separator}.", *notes]
    shell = "sh" if form.startswith("gguf") else "python"
    rows = ["| file | digest |", "|---|---|", *(f"| {plain(name)} | `{digest}` |" for name, digest in sorted(files.items()))]
    return "\n".join([*top, f"# {title}", "", *facts, "", f"```{shell}", RUN[form], "```", "", *rows, ""])
