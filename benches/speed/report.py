"""The page of a forest grows with its experts alone: bytes, CPU seconds and memory at several numbers of experts.

    python -m benches.speed.report --experts 8,500,1000 [--into FOLDER]

Each page is drawn in a process of its own, from a report with every section: domains with terms and beginnings, 600 documents on the map,
training curves of 40 points, a table of 14 rows in every domain, routing, growth and lineage. Fields: bytes, cpu_seconds, peak_mib, and
bytes and seconds for each expert over those of the first number.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benches.common import numbers, parser, say

ROWS = 14


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--experts", default="8,500,1000", help="numbers of experts")
    arguments.add_argument("--into", type=Path, help="keep the pages in this folder")
    arguments.add_argument("--one", type=int, help="draw one page, and print what it took")
    asked = arguments.parse_args()
    if asked.one:
        return print(json.dumps(draw(asked.one, asked.into)))
    first: dict[str, float] = {}
    for count in map(int, numbers(asked.experts)):
        command = [sys.executable, "-m", "benches.speed.report", "--one", str(count), *(["--into", str(asked.into)] if asked.into else [])]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        each = {name: found[name] / count for name in ("bytes", "cpu_seconds")}
        first = first or each
        say("report", experts=count, **found, **{f"{name}_per_expert_ratio": each[name] / first[name] for name in each})


def draw(count: int, into: Path | None) -> dict[str, float]:
    from elmwood.records import Row
    from elmwood.report import Ancestor, Area, Curve, MapPoint, Report, html

    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(40)]
    areas = tuple(
        Area(name=" ".join(rng.choice(words, 3)), terms=tuple(rng.choice(words, 8)), fitted=90, documents=int(rng.integers(50, 150)),
             bytes=10**6, snippets=(" ".join(rng.choice(words, 22)),) * 3)
        for _ in range(count)
    )  # fmt: skip
    share_KC = rng.dirichlet(np.full(count + 1, 4 / count), count) * 0.4 + np.eye(count, count + 1) * 0.6
    loss = 2 + rng.random((ROWS, count))
    rows = tuple(
        Row(name=f"model {n}", bits_per_byte=float(loss[n].mean()), standard_error=0.01, perplexity=30.0, domains=tuple(loss[n].tolist()),
            role="control" if n == 1 else "result", gain=None if n == 1 else 0.01, gain_error=None if n == 1 else 0.004)
        for n in range(ROWS)
    )  # fmt: skip
    spots = max(600, count)
    report = Report(
        title=f"A forest of {count} experts", summary="A bench.", domains=areas, rows=rows, chosen="model 3",
        places=tuple(MapPoint(x=x, y=y, domain=n % count, text=areas[n % count].snippets[0]) for n, (x, y) in
                     enumerate(rng.random((spots, 2)).tolist())),
        curves=tuple(Curve(name=area.name, role="expert", domain=k, points=tuple((1000.0 * n, 3 - n / 40) for n in range(40)))
                     for k, area in enumerate(areas)),
        routing=tuple(map(tuple, share_KC.tolist())), growth=tuple((2.5 - n / (9 * count), 0.01) for n in range(count)),
        lineage=(Ancestor(depth=0, kind="forest", digest="f" * 64), *(
            Ancestor(depth=1, kind="expert", digest=f"{n:064x}", summary="lora, 1M tokens") for n in range(count))),
    )  # fmt: skip
    began = time.process_time()
    page = html(report)
    taken = time.process_time() - began
    if into:
        into.mkdir(parents=True, exist_ok=True)
        (into / f"{count}.html").write_text(page, encoding="utf-8")
    return {"bytes": len(page.encode()), "cpu_seconds": taken, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


if __name__ == "__main__":
    main()
