"""The model card of a merge: lineage, method, digests. The same merge has the same card."""

from collections.abc import Mapping, Sequence

from elmwood.records import Contribution, Seed, Share

EXACT = "Summed in whole numbers of 2^-44, so that any machine and any order of the experts makes the same bytes."


def card(
    seed: Seed, method: str, paper: str, settings: Mapping[str, float], rows: Sequence[Contribution], files: Mapping[str, str], *,
    library: str = "transformers", about: str = EXACT,
) -> str:  # fmt: skip
    """Markdown with the header that model hubs read; `library` opens the files, `about` is a sentence on how they were made."""
    top = ["---", f"library_name: {library}", "tags: [merge, elmwood]", *([f"license: {seed.licence}"] if seed.licence else []), "---"]
    given = ", ".join(f"{name} {value:g}" for name, value in sorted(settings.items()))
    lines = [*top, f"# {len(rows)} experts of {seed.name}, merged", ""]
    lines += [f"Method: `{method}` ({paper}){'; ' + given if given else ''}.", ""]
    lines += [f"Seed: {seed.name}, {seed.architecture}, `{seed.digest}`.", "", "| expert | weight |", "|---|---|"]
    lines += [f"| `{row.expert}` | {'; '.join(_said(share) for share in row.weight)} |" for row in rows]
    lines += ["", "| file | digest |", "|---|---|", *(f"| {name} | `{digest}` |" for name, digest in sorted(files.items())), ""]
    lines += [about, ""]
    return "\n".join(lines)


def _said(share: Share) -> str:
    where = [f"names with {share.tensors!r}"] if share.tensors else []
    where += [f"layers {share.layers[0]} to {share.layers[1] - 1}"] if share.layers else []
    return " → ".join(f"{value:g}" for value in share.values) + (f" ({', '.join(where)})" if where else "")
