"""Time to loss over slow links, composed of what was measured.

    python -m benches.links.table CURVES.jsonl ... --exchanges EXCHANGES.jsonl ... [--sizes 125M,1B] [--rates 20,100,1000] [--workers 4,8]
        [--steps 20,100] [--tflops 66] [--rows 65536] [--decision 1] [--methods ddp,diloco] [--markdown] [--plot hours.svg]

CURVES: lines of benches.star.loss, benches.links.loss and benches.seedless.curve (loss by tokens, of small models). EXCHANGES: lines of
benches.links.exchange (time of an exchange over a link of a rate, at two numbers of parameters). The model of the time of N parameters and
K workers, nothing of it overlapping:

    a step      6 N x tokens of a worker's step / (FLOP/s of its card x its MFU, together --tflops)
    ddp         a step and a sum of gradients, every step
    diloco      --steps steps and an exchange
    star        --steps steps, an upload, the coordinator's decision (without losses) and a download
    forest s %  s % of the tokens on one machine, that seed to all (2 bytes a parameter), the rest / K on each, an expert from each
    alone       as many steps as one worker takes, without the others: 1 / K of the tokens
    one machine all of the tokens, with a worker's batch

An exchange of N parameters takes a + b x what its bytes take at the rate; a and b go through two measured sizes of the same method, rate
and number of workers. Losses are those of the small models: the ratio to ddp of the same warm start and rng seed at equal tokens, with its
standard error over seeds. `faster`: ddp's hours over these, at equal tokens. `to its loss`: ddp's hours to the loss that the method ends
with, over the method's hours. `then`: the loss, relative to ddp at its end, that the method has after as many hours as diloco takes in all,
which is equal machine-hours. With --markdown `then` is that of the first rate.
"""

import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benches.common import integers, numbers, parser, say, words
from elmwood.report.plots import Series, hours_plot
from elmwood.units import parse_count

INT8 = 8.1  # bits a parameter, as a star sends
SENT = {"int4": 4.1, "top": 0.46}  # in its other forms
NAMES = {"star top": "star 2-bit"}


class Curve(NamedTuple):
    """A method's loss by the share of its tokens, relative to what ddp ends with; the mean over seeds."""

    share: np.ndarray
    ratio: np.ndarray
    error: float | None  # standard error of the last ratio
    seeds: int


def read_curves(paths: list[Path], workers: int, chosen: list[str]) -> dict[tuple[str, int], Curve]:
    """The curves of all methods and warm starts for so many workers. Ratios are to ddp of the same warm start, seed and parameters."""
    points: dict[tuple[Any, ...], dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in (json.loads(line) for path in paths for line in path.read_text().splitlines() if line.startswith("{")):
        if not {"method", "tokens", "loss"} <= set(line):
            continue
        method, count = line["method"], line["workers"]
        if method == "alone" and count == workers:
            method = "one machine"
        elif count != workers and method != "alone":
            continue
        # a forest shares its rows with a ddp that had no warm start
        warm = 0 if method.startswith("forest") else line["warm"]
        tokens = line["tokens"] + (line["warm"] if method.startswith("forest") else 0)
        points[line["parameters"], warm, line["rng_seed"]][method][tokens * (workers if method == "alone" else 1)] = line["loss"]
    found: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for (_, warm, _), methods in points.items():
        if "ddp" not in methods:
            continue
        end = methods["ddp"][max(methods["ddp"])]
        for method, by_tokens in methods.items():
            last = max(by_tokens)
            if max(by_tokens) != max(methods["ddp"]) or (method == "ddp" and len(by_tokens) == 1):
                continue  # it has not ended, or says nothing of the way there
            tokens = np.array(sorted(by_tokens), float)
            found[method, warm].append((tokens / last, np.array([by_tokens[one] for one in sorted(by_tokens)]) / end))
    return {
        key: Curve(
            runs[0][0], np.mean([ratio for share, ratio in runs if len(share) == len(runs[0][0])], 0),
            float(np.std([ratio[-1] for _, ratio in runs], ddof=1) / len(runs) ** 0.5) if len(runs) > 1 else None, len(runs),
        )
        for key, runs in found.items()
        if not chosen or key[0] in chosen
    }  # fmt: skip


class Taken(NamedTuple):
    """Seconds of an exchange: fixed + slope x those that its payload alone takes at the rate of the link."""

    fixed: float
    slope: float


def read_exchanges(paths: list[Path]) -> dict[tuple[str, int, float], Taken]:
    """By method, workers and rate: a line through the smallest and the largest payload; without a second one, through zero."""
    found: dict[tuple[str, int, float], list[tuple[float, float]]] = defaultdict(list)
    for line in (json.loads(line) for path in paths for line in path.read_text().splitlines() if line.startswith("{")):
        key = line["workers"], line["rate"]
        found[line["method"], *key].append((line["ideal"], line["seconds"]))
        if "decision" in line:  # of the coordinator, which the link does not slow: by parameters
            found[line["method"].replace(" up", " decision"), *key].append((line["parameters"], line["decision"]))
    made = {}
    for key, points in found.items():
        (near, first), (far, last) = min(points), max(points)
        slope = max(0.0 if "decision" in key[0] else 1.0, (last - first) / (far - near) if far > near else last / far)
        made[key] = Taken(max(0.0, last - slope * far), slope)
    return made


class Setting(NamedTuple):
    """A model, its workers and their links."""

    parameters: int
    workers: int
    rate: float  # bits a second
    steps: int  # between two exchanges
    flops: float  # a second
    rows: int  # tokens of a worker's step
    tokens: float  # of all workers together
    taken: dict[tuple[str, int, float], Taken]
    decision: float  # share of the coordinator's measured time that counts

    def exchange(self, method: str, bits: float) -> float:
        """Seconds, of `bits` a parameter."""
        fixed, slope = self.taken[method, self.workers, self.rate]
        return fixed + slope * bits * self.parameters / self.rate

    def seconds(self, method: str) -> float:
        """Of the whole run."""
        N, K = self.parameters, self.workers
        computing = 6 * N * self.tokens / K / self.flops
        steps, ring = self.tokens / K / self.rows, 64 * (K - 1) / K
        kind, _, form = method.partition(" ")
        if kind in ("alone", "one"):
            return computing * (K if kind == "one" else 1)
        if kind == "ddp":
            return computing + steps * self.exchange("ddp", ring)
        if kind == "diloco":
            return computing + steps / self.steps * self.exchange("diloco", ring)
        if kind == "star":
            near = "top" if form.startswith("top") else "int8"
            up, down = self.exchange(f"star {near} up", SENT.get(form.split()[0], INT8)), self.exchange(f"star {near} down", 32)
            fixed, slope = self.taken[f"star {near} decision", K, self.rate]
            return computing + steps / self.steps * (up + down + self.decision * (fixed + slope * N))
        share = float(form) / 100
        once = 16 * N / self.rate
        return computing * (K * share + 1 - share) + once * (1 + (share > 0))

    def sent(self, method: str) -> float:
        """Bytes that a worker sends over the whole run, per parameter."""
        steps, ring = self.tokens / self.workers / self.rows, 8 * (self.workers - 1) / self.workers
        kind, _, form = method.partition(" ")
        if kind == "star":
            return steps / self.steps * SENT.get(form.split()[0], INT8) / 8
        return {"alone": 0.0, "one": 0.0, "ddp": steps * ring, "diloco": steps / self.steps * ring, "forest": 2.0}[kind]


def rows_of(setting: Setting, curves: dict[tuple[str, int], Curve]) -> list[dict[str, Any]]:
    """One line of the table for each method."""
    whole, longest = setting.seconds("ddp"), max(warm for method, warm in curves if method == "ddp")
    limit = setting.seconds("diloco")
    found = []
    for (method, warm), curve in curves.items():
        ddp = curves["ddp", warm or longest]
        seconds, ends = setting.seconds(method), curve.ratio[-1]
        # the share of its tokens after which ddp is as good as this method at the end; losses fall
        there = float(np.interp(-ends, -ddp.ratio, ddp.share)) if ddp.ratio[0] >= ends else 0.0
        then = float(np.interp(min(1.0, limit / seconds), curve.share, curve.ratio)) if len(curve.share) > 1 else None
        if then is None and seconds <= limit:
            then = float(ends)
        found.append({
            "method": NAMES.get(method, method), "warm": warm, "hours": seconds / 3600, "loss": float(ends - 1), "error": curve.error,
            "seeds": curve.seeds, "faster": whole / seconds, "to its loss": there * whole / seconds,
            "then": None if then is None else then - 1, "bytes": setting.sent(method),
        })  # fmt: skip
    return sorted(found, key=lambda row: row["hours"])


def as_markdown(rows_R: list[list[dict[str, Any]]], rates: list[float]) -> str:
    """A line for each method; for each rate hours, how often faster at equal tokens and (to its loss)."""
    heads = [f"{rate:g} Mbit/s" for rate in rates]
    lines = [
        f"| method | warm | seeds | loss | then | bytes sent | {' | '.join(heads)} |",
        "|---|--:|--:|--:|--:|--:|" + "--:|" * len(rates),
    ]
    for row in rows_R[0]:
        error = f" ± {row['error']:.1%}" if row["error"] is not None else ""
        same = [next(one for one in rows if (one["method"], one["warm"]) == (row["method"], row["warm"])) for rows in rows_R]
        cells = [f"{one['hours']:,.3g} h, {one['faster']:.3g}× ({one['to its loss']:.3g}×)" for one in same]
        then = "–" if row["then"] is None else f"{row['then']:+.1%}"
        warm = f"{row['warm'] / 1e3:,.0f}k" if row["warm"] else "–"
        loss = f"{row['loss']:+.1%}{error} | {then} | {row['bytes']:,.3g}"
        lines.append(f"| {row['method']} | {warm} | {row['seeds']} | {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("curves", nargs="+", type=Path)
    options.add_argument("--exchanges", type=Path, nargs="+", required=True)
    options.add_argument("--sizes", type=words, default=["125M", "1B"])
    options.add_argument("--rates", type=numbers, default=[20.0, 100.0, 1000.0])
    options.add_argument("--workers", type=integers, default=[4, 8])
    options.add_argument("--steps", type=integers, default=[20, 100], help="between two exchanges; the curves were measured at 20")
    options.add_argument("--tflops", type=float, default=66.0, help="of a worker's card, used: 165 in bf16 at an MFU of 40 %%")
    options.add_argument("--rows", type=int, default=65_536, help="tokens of a worker's step")
    options.add_argument("--tokens", type=float, default=20.0, help="of all workers together, per parameter")
    options.add_argument("--decision", type=float, default=1.0, help="share of the time of a star's coordinator that counts")
    options.add_argument("--methods", type=words, default=[], help="only these")
    options.add_argument("--markdown", action="store_true")
    options.add_argument("--plot", type=Path, help="loss over hours, of the first of every setting")
    given = options.parse_args()
    taken, drawn = read_exchanges(given.exchanges), False
    for workers, size, steps in product(given.workers, given.sizes, given.steps):
        curves, N = read_curves(given.curves, workers, given.methods), parse_count(size)
        if not any(method == "ddp" for method, _ in curves):
            continue
        settings = [
            Setting(N, workers, rate * 1e6, steps, given.tflops * 1e12, given.rows, given.tokens * N, taken, given.decision)
            for rate in given.rates
        ]
        rows_R, about = [rows_of(setting, curves) for setting in settings], f"{size} parameters, {workers} workers"
        if given.markdown:
            print(f"\n{about}, an exchange every {steps} steps\n\n{as_markdown(rows_R, given.rates)}")
        for setting, rows in zip(settings, rows_R, strict=True) if not given.markdown else ():
            for row in rows:
                say("links.table", workers=workers, size=size, rate=setting.rate, steps=steps, **row)
        if given.plot and not drawn:
            lines = [
                Series(NAMES.get(name, name), curve.share[curve.share > 0] * settings[0].seconds(name) / 3600, curve.ratio[curve.share > 0])
                for (name, warm), curve in curves.items()
                if warm in (0, max(warm for _, warm in curves))
            ]
            given.plot.write_text(hours_plot(lines, f"Loss over hours: {about} at {given.rates[0]:g} Mbit/s"), encoding="utf-8")
            drawn = True


if __name__ == "__main__":
    main()
