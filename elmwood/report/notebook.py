"""Records in notebooks: plain HTML tables in the style of the notebook, and drawings as images.

Pure functions from records to HTML. All text is escaped. `draw_records` makes them the `_repr_html_` of their records.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from markupsafe import Markup

from elmwood.records import Comparison, Contest, Ensemble, Expert, Forest, Merged, Mixture, Partition, Row, Seed, State, Verdict
from elmwood.records.base import displays
from elmwood.report.contest import headline, lines
from elmwood.report.domain_map import COLOURS, LIGHT
from elmwood.report.formats import digits, signed, spell_time, with_prefix
from elmwood.report.plots import wealth_plot
from elmwood.units import printable

STYLES = {"control": "", "seed": "", "result": "", "bound": "opacity:.6"}
LESS = "Bits per byte on documents that no model was trained on: less is better."


def draw_records() -> None:
    """Register the HTML of these records, so that notebooks show it."""
    displays.update({
        "comparison": show_comparison, "contest": show_contest, "verdict": show_verdict, "partition": show_partition, "seed": show_seed,
        "expert": show_expert, "forest": show_forest, "ensemble": show_ensemble, "merged": show_merged, "mixture": show_mixture,
        "state": show_state,
    })  # fmt: skip


# ---- pieces ---------------------------------------------------------------------------------------------------------


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", styles: Sequence[str] = ()) -> Markup:
    """A table: the first column is text, the others are numbers. `styles` is CSS for each row."""
    titles = Markup("").join(
        Markup('<th style="text-align:{}">{}</th>').format("right" if place else "left", title) for place, title in enumerate(head)
    )
    body = Markup("").join(
        Markup('<tr style="{}">{}</tr>').format(
            styles[number] if styles else "",
            Markup("").join(
                Markup('<td style="text-align:{};white-space:nowrap">{}</td>').format("right" if place else "left", cell)
                for place, cell in enumerate(row)
            ),
        )
        for number, row in enumerate(rows)
    )
    above = Markup('<caption style="text-align:left;caption-side:top">{}</caption>').format(caption) if caption else Markup()
    table = Markup("<table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(above, titles, body)
    return Markup(printable(table))


def facts(title: str, values: Mapping[str, object]) -> Markup:
    """A heading and what there is to say, a line each."""
    rows = Markup("").join(
        Markup('<tr><th style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>').format(name, value)
        for name, value in values.items()
        if value not in (None, "")
    )
    card = Markup('<table><caption style="text-align:left;caption-side:top"><b>{}</b></caption><tbody>{}</tbody></table>').format(
        title, rows
    )
    return Markup(printable(card))


def image(svg: str, width: int = 760) -> Markup:
    """A drawing that keeps its style to itself."""
    data = base64.b64encode(printable(svg).encode()).decode()
    return Markup('<img style="max-width:100%" width="{}" src="data:image/svg+xml;base64,{}"/>').format(width, data)


def swatch(domain: int) -> Markup:
    """The colour of a domain, as the map and the page have it."""
    return Markup('<span style="color:{}">■</span> ').format(LIGHT[domain % COLOURS])


# ---- results --------------------------------------------------------------------------------------------------------


def show_comparison(comparison: Comparison) -> Markup:
    """Every row with its standard error; the gain over the strongest dense control where there is one."""
    return rows_of_loss(comparison.rows, comparison.chosen)


def rows_of_loss(rows: Sequence[Row], chosen: str | None = None) -> Markup:
    """Models side by side. The chosen one is bold, bounds are faint."""
    gained, costed = any(row.gain is not None for row in rows), any(row.tokens for row in rows)
    loss_digits, gain_digits = digits(row.standard_error for row in rows), digits(row.gain_error for row in rows)
    head = ["model", "bits per byte", "±", "perplexity", *(["gain", "±"] if gained else []), *(["tokens", "wall clock"] if costed else [])]
    cells, styles = [], []
    for row in rows:
        line = [row.name, f"{row.bits_per_byte:.{max(3, loss_digits)}f}", f"{row.standard_error:.{loss_digits}f}", f"{row.perplexity:.4g}"]
        if gained:
            line += ["", ""] if row.gain is None else [signed(row.gain, gain_digits), f"{row.gain_error or 0:.{gain_digits}f}"]
        if costed:
            line += [with_prefix(row.tokens) if row.tokens else "", spell_time(row.wall_seconds) if row.wall_seconds else ""]
        cells.append(line)
        styles.append("font-weight:bold" if row.name == chosen else STYLES[row.role])
    reference = next((row.name for row in rows if row.gain is None), None) if gained else None
    caption = LESS + (f" Gain is over {reference}, on the same documents." if reference else "")
    return grid(head, cells, caption, styles)


def show_contest(contest: Contest) -> Markup:
    """The answer, how sure it is, and the wealth that decided it."""
    found = facts(headline(contest), dict(lines(contest)))
    if not contest.wealth or contest.drawn == contest.touched:
        return found
    above_T, below_T = (np.array([0.0, *(look[column] for look in contest.wealth)]) * np.log(10) for column in (1, 2))
    drawn_T = np.array([0, *(look[0] for look in contest.wealth)])
    every_T = np.arange(1, contest.wealth[-1][0] + 1)
    svg = wealth_plot(
        np.interp(every_T, drawn_T, above_T), np.interp(every_T, drawn_T, below_T), alpha=contest.alpha, beta=contest.beta,
        names=("better", "not better"),
    )  # fmt: skip
    return found + image(svg)


def show_verdict(verdict: Verdict) -> Markup:
    """Every check with its value and threshold."""
    rows = [
        (
            f"{'✓' if check.passed else '✗'} {check.name}",
            "not measured" if check.value is None else f"{check.value:+.4f}",
            "none was set" if check.threshold is None else f"{check.side} {check.threshold:g}",
        )
        for check in verdict.checks
    ]
    title = f"Expert {verdict.expert[:8]} {'may join' if verdict.accepted else 'may not join'} the forest."
    styles = ["" if check.passed else "font-weight:bold" for check in verdict.checks]
    return grid(("check", "value", "threshold"), rows, title, styles)


class WithError(Protocol):
    """A mean and its standard error."""

    @property
    def value(self) -> float: ...

    @property
    def standard_error(self) -> float: ...


def show_ranking(title: str, losses: Mapping[str, WithError], behind: Mapping[str, WithError]) -> Markup:
    """Models by their loss, best first, and how far each is behind the best on the same documents."""
    rows = [
        (name, f"{losses[name].value:.4f}", f"{losses[name].standard_error:.4f}", f"{behind[name].value:.4f}",
         f"{behind[name].standard_error:.4f}")
        for name in sorted(losses, key=lambda name: losses[name].value)
    ]  # fmt: skip
    styles = ["font-weight:bold", *[""] * (len(rows) - 1)]
    return grid(("", "bits per byte", "±", "behind the best", "±"), rows, title, styles)


def show_sample(prompt: str, text: str, experts: Mapping[str, float]) -> Markup:
    """A prompt, what a model made of it, and each expert's share of the prediction."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in experts.items() if share >= 0.005)
    shown = Markup('<p style="white-space:pre-wrap"><b>{}</b>{}</p>').format(printable(prompt), printable(text))
    return shown + (Markup('<p style="opacity:.6">{}</p>').format(shares) if shares else Markup())


# ---- things that are made ---------------------------------------------------------------------------------------------


def show_partition(partition: Partition) -> Markup:
    """The domains, in the colours of the map."""
    rows = [
        (
            swatch(number) + f"{number} {domain.name}",
            f"{domain.documents:,}",
            f"{with_prefix(domain.bytes)}B",
            f"{sum(shard.documents for shard in domain.holdout):,}",
            ", ".join(domain.terms[:6]),
        )
        for number, domain in enumerate(partition.domains)
    ]
    caption = f"{len(partition.domains)} domains; {partition.method} clusters, embedder {partition.embedder.name}"
    return grid(("domain", "documents", "text", "held out", "terms"), rows, caption)


def show_seed(seed: Seed) -> Markup:
    return facts(
        f"Seed {seed.name}",
        {
            "digest": seed.digest[:12], "architecture": seed.architecture, "parameters": with_prefix(seed.parameters),
            "vocabulary": f"{seed.vocabulary:,}", "context": f"{seed.context:,} tokens", "licence": seed.licence,
            "training loss": f"{seed.curve[-1].loss:.3f} nats per token" if seed.curve else None,
        },
    )  # fmt: skip


def show_expert(expert: Expert) -> Markup:
    return facts(
        f"Expert {expert.digest[:12]}",
        {
            "domain": "all" if expert.domain is None else expert.domain, "method": expert.recipe.method,
            "tokens": with_prefix(expert.recipe.tokens), "seed": expert.seed[:12], "contributor": expert.contributor,
            "training loss": f"{expert.curve[-1].loss:.3f} nats per token" if expert.curve else None,
        },
    )  # fmt: skip


def show_forest(forest: Forest) -> Markup:
    experts = ", ".join(digest[:12] for digest in forest.experts)
    return facts(f"Forest of {len(forest.experts)} experts", {"experts": experts, "seed": forest.seed[:12], "digest": forest.digest[:12]})


def show_ensemble(ensemble: Ensemble) -> Markup:
    probabilities = "next-token probabilities"
    mixed = {"weights": "adapters, summed for each prompt", "activated": f"{probabilities} of experts that act from the end of a prompt on"}
    mixing = mixed.get(ensemble.mixing, probabilities)
    return facts(
        f"Ensemble {ensemble.digest[:12]}",
        {"mixes": mixing, "router": ensemble.router, "top-k": ensemble.top_k, "temperature": f"{ensemble.temperature:.3g}"},
    )  # fmt: skip


def show_merged(merged: Merged) -> Markup:
    settings = ", ".join(f"{name} {value:g}" for name, value in merged.settings.items())
    return facts(
        f"Merge {merged.digest[:12]}",
        {"method": merged.method, "settings": settings, "experts": len(merged.contributions),
         "off the exact sum": None if merged.error is None else f"{merged.error:.2g}"},
    )  # fmt: skip


def show_state(state: State) -> Markup:
    part = "" if state.part == (0, 1) else f"{state.part[0]}/{state.part[1]}"
    return facts(f"State {state.digest[:12]}", {"method": state.method, "experts": len(state.contributions), "part": part})


def show_mixture(mixture: Mixture) -> Markup:
    tuned = mixture.recipe and f"{mixture.recipe.tuned}, {with_prefix(mixture.recipe.tokens)} tokens"
    return facts(
        f"Mixture {mixture.digest[:12]}",
        {"experts": len(mixture.experts), "gates": mixture.gates.kind, "top-k": mixture.gates.top_k, "layout": mixture.layout,
         "tuned": tuned},
    )  # fmt: skip
