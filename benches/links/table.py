"""Time to loss over slow links, composed of what was measured.

    python -m benches.links.table CURVES.jsonl ... --exchanges EXCHANGES.jsonl ... [--sizes 125M,1B] [--rates 20,100,1000] [--workers 4,8]
        [--steps 100] [--tflops 66] [--rows 65536] [--decision 1] [--methods ddp,diloco 0.7/0.9] [--markdown] [--plot hours.svg]

CURVES: lines of benches.star.loss, benches.links.loss and benches.seedless.curve (loss by tokens, of small models). EXCHANGES: lines of
benches.links.exchange (time of an exchange over a link of a rate, at two numbers of parameters). The model of the time of N parameters and
K workers, nothing of it overlapping but where it says so:

    a step      6 N x tokens of a worker's step / (FLOP/s of its card x its MFU, together --tflops)
    ddp         a step and a sum of gradients, every step
    diloco      H steps and an exchange
    streaming   F times in H steps an exchange of N / F parameters; its bytes go during D steps, and what takes longer is waited for, as
                are the quorum and the checksum before each (the fixed part below)
    star        H steps, an upload, the coordinator's decision (without losses) and a download, which has 8.1 bits a parameter too
    forest s %  s % of the tokens on one machine, that seed to all (2 bytes a parameter), the rest / K on each, an expert from each
    alone       as many steps as one worker takes, without the others: 1 / K of the tokens
    one machine all of the tokens, with a worker's batch

H, F and D are those of the run whose loss stands beside it; --steps takes that loss for other H. An exchange of N parameters takes a + b x
what its bytes take at the rate; a and b go through two measured sizes of the same method, rate and number of workers.

Losses are those of the small models: the ratio to ddp of the same warm start and rng seed at equal tokens, with its standard error over
seeds. Of several learning rates of a method that is taken which ends lowest on the first rng seed that has all of them. `faster`: ddp's
hours over these, at equal tokens. `to its loss`: ddp's hours to the loss that the method ends with, over the method's hours; there ddp may
also stop earlier by plan, where CURVES has such runs (their learning rate has come down at their end). `then`: the loss, relative to ddp at
its end, that the method has after as many hours as the slowest diloco takes in all, which is equal machine-hours. With --markdown `then` is
that of the first rate.
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


class Form(NamedTuple):
    """What a row of the table is of."""

    method: str
    warm: int  # tokens of the warm start
    steps: int  # between two exchanges of a weight; 0 where there are none
    fragments: int
    delay: int  # steps during which an exchange goes on

    @property
    def kind(self) -> str:
        return self.method.partition(" ")[0]


class Curve(NamedTuple):
    """A method's loss by the share of its tokens, relative to what ddp ends with; the mean over seeds."""

    share: np.ndarray
    ratio: np.ndarray
    error: float | None  # standard error of the last ratio
    seeds: int


Run = dict[float, float]  # loss by tokens
Runs = dict[float, dict[int, Run]]  # of learning rates and rng seeds


def lines_of(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.startswith("{")]


def read_runs(paths: list[Path], workers: int) -> dict[tuple[int, Form], dict[float, Runs]]:
    """By parameters and form, and by the tokens at the end."""
    found: dict[tuple[int, Form, float, int], dict[float, Run]] = defaultdict(lambda: defaultdict(dict))
    for line in lines_of(paths):
        if not {"method", "tokens", "loss"} <= set(line) or line["workers"] != (1 if line["method"] == "alone" else workers):
            continue
        method, forest = line["method"], line["method"].startswith("forest")
        tokens = line["tokens"] * (workers if method == "alone" else 1) + (line["warm"] if forest else 0)
        exchanges = method.startswith(("diloco", "streaming", "star"))
        # a forest shares its rows with a ddp that had no warm start
        form = Form(
            method, 0 if forest else line["warm"], line.get("steps", 20) if exchanges else 0, line.get("fragments", 1), line.get("delay", 0)
        )
        planned = line.get("planned", 0) * (workers if method == "alone" else 1)
        found[line["parameters"], form, line.get("learning_rate", 0.0), line["rng_seed"]][planned][tokens] = line["loss"]
    runs: dict[tuple[int, Form], dict[float, Runs]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for (parameters, form, learning_rate, rng_seed), by_plan in found.items():
        for run in by_plan.values():
            runs[parameters, form][max(run)][learning_rate][rng_seed] = run
    return runs


def tuned(runs: Runs) -> dict[int, Run]:
    """The runs at the learning rate that ends lowest on the first rng seed that has all of them."""
    for rng_seed in sorted(set[int].union(*(set(by_seed) for by_seed in runs.values()))):
        if all(rng_seed in by_seed for by_seed in runs.values()):
            return min(runs.values(), key=lambda by_seed: by_seed[rng_seed][max(by_seed[rng_seed])])
    raise SystemExit(f"no rng seed has all learning rates ({sorted(runs)}): give the lines of one that has")


def mean(runs: list[tuple[np.ndarray, np.ndarray]]) -> Curve:
    last = [ratio[-1] for _, ratio in runs]
    error = float(np.std(last, ddof=1) / len(runs) ** 0.5) if len(runs) > 1 else None
    return Curve(runs[0][0], np.mean([ratio for share, ratio in runs if len(share) == len(runs[0][0])], 0), error, len(runs))


def read_curves(paths: list[Path], workers: int, chosen: list[str]) -> dict[Form, Curve]:
    """The curves of all forms for so many workers. Ratios: to ddp of the same warm start, seed and parameters. `ddp planned` has the ends
    of shorter runs of ddp, where there are some."""
    found: dict[Form, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    runs = read_runs(paths, workers)
    for (parameters, form), by_end in runs.items():
        ddp = runs.get((parameters, Form("ddp", form.warm, 0, 1, 0)))
        if not ddp or max(ddp) not in by_end:
            continue  # it has not ended
        whole, ends = max(ddp), {seed: run[max(ddp)] for seed, run in tuned(ddp[max(ddp)]).items()}
        for rng_seed, run in tuned(by_end[whole]).items():
            if rng_seed in ends and not (form.method == "ddp" and len(run) == 1):  # which says nothing of the way there
                tokens = np.array(sorted(run), float)
                found[form].append((tokens / whole, np.array([run[one] for one in sorted(run)]) / ends[rng_seed]))
            if rng_seed in ends and form.method == "ddp" and len(by_end) > 1:
                short = {end: tuned(one)[rng_seed][end] for end, one in by_end.items() if rng_seed in tuned(one)}
                if len(short) > 1:
                    tokens = np.array(sorted(short), float)
                    ratios = np.array([short[end] for end in sorted(short)]) / ends[rng_seed]
                    found[form._replace(method="ddp planned")].append((tokens / whole, ratios))
    return {form: mean(each) for form, each in found.items() if not chosen or form.method in chosen or form.kind == "ddp"}


class Taken(NamedTuple):
    """Seconds of an exchange: fixed + slope x those that its payload alone takes at the rate of the link."""

    fixed: float
    slope: float


def read_exchanges(paths: list[Path]) -> dict[tuple[str, int, float], Taken]:
    """By method, workers and rate: a line through the smallest and the largest payload; without a second one, through zero."""
    found: dict[tuple[str, int, float], list[tuple[float, float]]] = defaultdict(list)
    for line in lines_of(paths):
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
    steps: int  # between two exchanges; 0: those of the run whose loss it is
    flops: float  # a second
    rows: int  # tokens of a worker's step
    tokens: float  # of all workers together
    taken: dict[tuple[str, int, float], Taken]
    decision: float  # share of the coordinator's measured time that counts

    def exchange(self, method: str, bits: float, fragments: int = 1, hidden: float = 0.0) -> float:
        """Seconds, of `bits` a parameter; so many of those that the bytes take are `hidden` behind steps."""
        fixed, slope = self.taken[method, self.workers, self.rate]
        return fixed + max(0.0, slope * bits * self.parameters / fragments / self.rate - hidden)

    def seconds(self, form: Form) -> float:
        """Of the whole run."""
        N, K = self.parameters, self.workers
        computing = 6 * N * self.tokens / K / self.flops
        steps, ring, every = self.tokens / K / self.rows, 64 * (K - 1) / K, self.steps or form.steps
        kind, word = form.kind, form.method.partition(" ")[2]
        if kind in ("alone", "one"):
            return computing * (K if kind == "one" else 1)
        if kind == "ddp":
            return computing + steps * self.exchange("ddp", ring)
        if kind in ("diloco", "streaming"):
            hidden = form.delay * computing / steps
            return computing + steps / every * form.fragments * self.exchange("diloco", ring, form.fragments, hidden)
        if kind == "star":
            near = "top" if word.startswith("top") else "int8"
            up, down = self.exchange(f"star {near} up", SENT.get(word.split()[0], INT8)), self.exchange(f"star {near} down", INT8)
            fixed, slope = self.taken[f"star {near} decision", K, self.rate]
            return computing + steps / every * (up + down + self.decision * (fixed + slope * N))
        share = float(word) / 100
        once = 16 * N / self.rate
        return computing * (K * share + 1 - share) + once * (1 + (share > 0))

    def sent(self, form: Form) -> float:
        """Bytes that a worker sends over the whole run, per parameter."""
        steps, ring, every = self.tokens / self.workers / self.rows, 8 * (self.workers - 1) / self.workers, self.steps or form.steps
        if form.kind == "star":
            return steps / every * SENT.get(form.method.split()[1], INT8) / 8
        if form.kind in ("diloco", "streaming"):
            return steps / every * ring
        return {"alone": 0.0, "one": 0.0, "ddp": steps * ring, "forest": 2.0}[form.kind]


def share_to(ends: float, curve: Curve) -> float:
    """The share of its tokens after which a curve that falls is at `ends`."""
    return float(np.interp(-ends, -curve.ratio, curve.share)) if curve.ratio[0] >= ends else float(curve.share[0])


def rows_of(setting: Setting, curves: dict[Form, Curve]) -> list[dict[str, Any]]:
    """One line of the table for each form."""
    ddp = {form.warm: curve for form, curve in curves.items() if form.method == "ddp"}
    planned = {form.warm: curve for form, curve in curves.items() if form.method == "ddp planned"}
    forms = [form for form in curves if form.method != "ddp planned"]
    whole = setting.seconds(Form("ddp", 0, 0, 1, 0))
    limit = max((setting.seconds(form) for form in forms if form.kind == "diloco"), default=whole)
    found = []
    for form in forms:
        curve, warm = curves[form], form.warm or max(ddp)
        seconds, ends = setting.seconds(form), curve.ratio[-1]
        there = share_to(ends, ddp[warm])
        if warm in planned and form.method != "ddp":
            there = min(there, share_to(ends, planned[warm]))
        then = float(np.interp(min(1.0, limit / seconds), curve.share, curve.ratio)) if len(curve.share) > 1 else None
        if then is None and seconds <= limit:
            then = float(ends)
        found.append({
            "method": NAMES.get(form.method, form.method), "every": setting.steps or form.steps, "warm": form.warm, "hours": seconds / 3600,
            "loss": float(ends - 1), "error": curve.error, "seeds": curve.seeds, "faster": whole / seconds,
            "to its loss": there * whole / seconds, "then": None if then is None else then - 1, "bytes": setting.sent(form), "form": form,
        })  # fmt: skip
    return sorted(found, key=lambda row: row["hours"])


def as_markdown(rows_R: list[list[dict[str, Any]]], rates: list[float]) -> str:
    """A line for each method; for each rate hours, how often faster at equal tokens and (to its loss)."""
    heads = [f"{rate:g} Mbit/s" for rate in rates]
    lines = [
        f"| method | H | warm | seeds | loss | then | bytes sent | {' | '.join(heads)} |",
        "|---|--:|--:|--:|--:|--:|--:|" + "--:|" * len(rates),
    ]
    for row in rows_R[0]:
        error = f" ± {row['error']:.1%}" if row["error"] is not None else ""
        same = [next(one for one in rows if one["form"] == row["form"]) for rows in rows_R]
        cells = [f"{one['hours']:,.3g} h, {one['faster']:.3g}× ({one['to its loss']:.3g}×)" for one in same]
        then = "–" if row["then"] is None else f"{row['then']:+.1%}"
        warm = f"{row['warm'] / 1e3:,.0f}k" if row["warm"] else "–"
        loss = f"{row['loss']:+.1%}{error} | {then} | {row['bytes']:,.3g}"
        lines.append(f"| {row['method']} | {row['every'] or '–'} | {warm} | {row['seeds']} | {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("curves", nargs="+", type=Path)
    options.add_argument("--exchanges", type=Path, nargs="+", required=True)
    options.add_argument("--sizes", type=words, default=["125M", "1B"])
    options.add_argument("--rates", type=numbers, default=[20.0, 100.0, 1000.0])
    options.add_argument("--workers", type=integers, default=[4, 8])
    options.add_argument("--steps", type=integers, default=[0], help="between two exchanges, if others than in CURVES")
    options.add_argument("--tflops", type=float, default=66.0, help="of a worker's card, used: 165 in bf16 at an MFU of 40 %%")
    options.add_argument("--rows", type=int, default=65_536, help="tokens of a worker's step")
    options.add_argument("--tokens", type=float, default=20.0, help="of all workers together, per parameter")
    options.add_argument("--decision", type=float, default=1.0, help="share of the time of a star's coordinator that counts")
    options.add_argument("--methods", type=words, default=[], help="only these")
    options.add_argument("--markdown", action="store_true")
    options.add_argument("--plot", type=Path, help="loss over hours, of the first of every setting; choose at most eight --methods")
    given = options.parse_args()
    taken, drawn = read_exchanges(given.exchanges), False
    for workers, size, steps in product(given.workers, given.sizes, given.steps):
        curves, N = read_curves(given.curves, workers, given.methods), parse_count(size)
        if not any(form.method == "ddp" for form in curves):
            continue
        settings = [
            Setting(N, workers, rate * 1e6, steps, given.tflops * 1e12, given.rows, given.tokens * N, taken, given.decision)
            for rate in given.rates
        ]
        rows_R, about = [rows_of(setting, curves) for setting in settings], f"{size} parameters, {workers} workers"
        if given.markdown:
            print(f"\n{about}{f', H {steps}' if steps else ''}\n\n{as_markdown(rows_R, given.rates)}")
        for setting, rows in zip(settings, rows_R, strict=True) if not given.markdown else ():
            for row in rows:
                say("links.table", workers=workers, size=size, rate=setting.rate, **{key: one for key, one in row.items() if key != "form"})
        if given.plot and not drawn:
            lines = [
                Series(
                    NAMES.get(form.method, form.method) + (f", {form.steps}" if form.kind == "diloco" else ""),
                    curve.share[curve.share > 0] * settings[0].seconds(form) / 3600,
                    curve.ratio[curve.share > 0],
                )
                for form, curve in curves.items()
                if form.warm in (0, max(one.warm for one in curves)) and form.method != "ddp planned"
            ]
            given.plot.write_text(hours_plot(lines, f"Loss over hours: {about} at {given.rates[0]:g} Mbit/s"), encoding="utf-8")
            drawn = True


if __name__ == "__main__":
    main()
