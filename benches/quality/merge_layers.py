"""A scale for each layer: whether a search by layers, guided by the estimate and checked by true losses, beats the best single scale.

    python -m benches.quality.merge_layers STORE FOREST [--rule task_arithmetic] [--scales 0,0.1,0.2,0.35,0.5,0.75,1] [--kind fisher]
        [--documents 300] [--tune 40]

Settings are those of benches/quality/merge_quality.py. Experts need statistics (that bench makes them). One JSON line for each way: the
best scale for all layers; each layer from the merge with the least estimate there; and a search by layers, as
`elmwood merge --choose --per-layer` does it. The search begins at the best scale, tries the next two in each layer, most promising
first, and keeps what lowers the loss on the tune documents. Lines have bits per byte of the test half, the gain over the best single
scale with its paired standard error, and the cost of the search: candidates scored, tokens read, CPU seconds.
"""

import time
from argparse import Namespace
from collections.abc import Mapping

from benches.common import Lines, numbers, parser, say
from benches.quality.merge_quality import Bench
from elmwood.evaluate.losses import bits_per_byte, difference
from elmwood.merge.checkpoint import Answer, assemble, merge
from elmwood.merge.estimate import by_coordinates, estimates
from elmwood.merge.layer_weights import everywhere
from elmwood.records import Merged
from elmwood.study.quality.selection import TRIED


class Search:
    """Answers at every scale, and what was spent on true losses."""

    def __init__(self, bench: Bench, asked: Namespace):
        self.bench, self.known, self.started = bench, dict[str, float](), time.process_time()
        members = {one.digest: everywhere(1.0) for one in bench.experts}
        scales = [scale / len(members) if asked.rule in ("task_arithmetic", "iso_c", "tsv") else scale for scale in numbers(asked.scales)]
        made = merge(bench.seed, members, [Answer(asked.rule, {"scale": scale}) for scale in scales], bench.store)
        self.made = {f"{scale:g}": one for scale, one in zip(scales, made, strict=True)}
        self.scales = list(self.made)
        found = estimates(bench.seed, sorted(members), self.made, bench.store, asked.kind)
        self.estimated = {scale: dict(layers) for scale, layers in found.items()}
        self.layers = list(next(iter(self.estimated.values())))
        self.estimating = time.process_time() - self.started

    def model(self, choice: Mapping[str, str]) -> Merged:
        return assemble({layer: self.made[scale] for layer, scale in choice.items()}, self.bench.store)

    def loss(self, choice: Mapping[str, str]) -> float:
        """Bits per byte on the tune documents."""
        model = self.model(choice)
        if model.digest not in self.known:
            column = self.bench.column(model, self.bench.tune_D)
            self.known[model.digest] = bits_per_byte(column, self.bench.held, self.bench.tune_D).value
        return self.known[model.digest]

    def everywhere(self) -> dict[str, str]:
        """The best scale for all layers."""
        return min((dict.fromkeys(self.layers, scale) for scale in self.scales), key=self.loss)

    def by_estimate(self) -> dict[str, str]:
        """Each layer from the merge with the least estimate there."""
        return {layer: min(self.scales, key=lambda scale: self.estimated[scale][layer]) for layer in self.layers}

    def by_coordinates(self) -> dict[str, str]:
        """As `elmwood merge --choose --per-layer`."""
        begin, *others = sorted(self.scales, key=lambda scale: self.loss(dict.fromkeys(self.layers, scale)))
        return by_coordinates(begin, others[:TRIED], self.layers, self.estimated, self.loss)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store")
    options.add_argument("forest")
    options.add_argument("--rule", default="task_arithmetic")
    options.add_argument("--scales", default="0,0.1,0.2,0.35,0.5,0.75,1", help="of averages, rising")
    options.add_argument("--kind", default="fisher", choices=("fisher", "gram"))
    options.add_argument("--documents", type=int, default=300)
    options.add_argument("--tune", type=int, default=40)
    asked = options.parse_args()
    progress = Lines()
    bench = Bench(asked, progress)
    search = Search(bench, asked)
    ways = {"one scale for all layers": search.everywhere()}
    spent = {name: (len(search.known), time.process_time() - search.started) for name in ways}
    ways["each layer by its estimate"] = search.by_estimate()
    spent["each layer by its estimate"] = (0, search.estimating)
    ways["by coordinates"] = search.by_coordinates()
    spent["by coordinates"] = (len(search.known), time.process_time() - search.started)
    columns = {name: bench.column(search.model(choice), bench.test_D) for name, choice in ways.items()}
    tokens = int(bench.held.windows.length_W[list({*bench.held.window_N[bench.tune_D[bench.held.document_N]].tolist()})].sum())
    reference = columns["one scale for all layers"]
    for name, column in {"seed": bench.seed_N, **columns}.items():
        loss = bits_per_byte(column, bench.held, bench.test_D)
        behind = difference(column, reference, bench.held, bench.test_D)
        line: dict[str, object] = {"forest": asked.forest, "rule": asked.rule, "way": name}
        line |= {"bits_per_byte": loss.value, "error": loss.standard_error, "gain": -behind.value, "gain_error": behind.standard_error}
        if name in ways:
            answers, cpu = spent[name]
            line |= {"layers": ways[name], "answers": answers, "tokens": answers * tokens, "cpu": round(cpu, 1)}
        say("merge_layers", **line)


if __name__ == "__main__":
    main()
