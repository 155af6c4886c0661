"""Models on held-out text: what a comparison says, in one sentence."""

from elmwood.records import Comparison


def conclusion(comparison: Comparison) -> str:
    """The result in one sentence, whichever way it went: the ensemble chosen on the tune half against every control."""
    results = [row for row in comparison.rows if row.role == "result"]
    best = next((row for row in results if row.name == comparison.chosen), min(results, key=lambda row: row.bits_per_byte))
    margin = f" ({best.gain:+.4f} ± {best.gain_error:.4f} bits per byte against the strongest dense model)" if best.gain is not None else ""
    ahead = [row.name for row in comparison.rows if row.role in ("seed", "control") and row.bits_per_byte <= best.bits_per_byte]
    if ahead:
        return f"{best.name} was chosen on the tune half and does not beat: {'; '.join(ahead)}{margin}."
    if best.gain is not None and best.gain < 2 * (best.gain_error or 0):
        return f"{best.name} is level with the best control: the difference is within two standard errors{margin}."
    return f"{best.name} is better than every control{margin}."
