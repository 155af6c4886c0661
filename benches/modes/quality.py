"""Adapters in the last layers only, and adapters that act only from a point on, against adapters that act everywhere, at equal tokens.

    python -m benches.modes.quality FOLDER [--rng-seeds 0,1,2] [--tokens 0.45M] [--layers 8 --seed-tokens 3M] [--arms ...]

The seed is the demo's, or with --layers a deeper one, trained here. All arms share seed, domains, batch, steps and the router `live`, and
are mixed with settings of the tune half:

- `full`: LoRA in all layers.
- `half`, `quarter`: LoRA in the last share of the layers (rounded up), at the same rank; `half, equal`, `quarter, equal`: at the rank that
  makes as many parameters as `full` has.
- `activated`: LoRA in all layers that acts only from a point of each document on (arXiv:2504.12397): tokens before it are read by the seed,
  so all experts can share their keys and values. The point is drawn anew for each document of each step, evenly over its tokens. The loss
  is that of the tokens after it: what is before does not depend on the adapter. Scored as a server would continue texts: the tokens of each
  block of --block as after a prompt that ends before it.
- `full, activated`: the experts of `full`, read as `activated`: without training for it.
- `activated, everywhere`: the experts of `activated`, read as `full`.
- `full, served`: the experts of `full` under `--mixing activated`, with distances of the beginning of each block and a memory that begins
  there, as a server has them; the best on the tune half of the routers below.

Beside each: the gain over the seed, over `full` and over the experts of random clusters under the same router (`random`: for these arms),
with standard errors over documents; and one LoRA trained on all text with as many tokens (`dense`). One JSON line per arm and rng seed of
training. Finished steps in FOLDER are found again. About 25 minutes of one core.

N scored tokens, K experts, B rows, L tokens of a row, R rank, I inputs, O outputs of a layer
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch

from benches.common import Lines, integers, parser, say, words
from benches.quality.adapters_in_forest import paired, train_experts
from benches.quality.clusters import Bench
from elmwood.corpus.build import build
from elmwood.corpus.tokens import pack
from elmwood.domains.partition import partition as divide
from elmwood.evaluate.calibration import Calibration
from elmwood.evaluate.comparison import Control, ExpertColumns, Side, compare
from elmwood.evaluate.holdout import Holdout, open_holdout
from elmwood.evaluate.losses import row as row_of
from elmwood.lm.adapters.peft_import import LoraLayer
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model
from elmwood.records import Ensemble, Expert, Forest, Partition, Recipe, fingerprint
from elmwood.store import Store
from elmwood.study.demo import Study, scratch
from elmwood.study.demo_seed import install_seed
from elmwood.study.quality.evaluation import measure_distances
from elmwood.study.training import shards
from elmwood.train.adapter import add_adapter
from elmwood.train.data import UNSCORED, Batch, batches
from elmwood.train.loop import adamw, add_gradients, update_weights, use_threads
from elmwood.train.loss import base_model, find_abilities
from elmwood.units import parse_count

ROUTER = "live"
SHARES = {"full": 1.0, "half": 0.5, "quarter": 0.25}
RATES = {"full": 6e-3, "half": 1e-2, "quarter": 1.2e-2, "activated": 6e-3, "dense": 3e-3}  # docs/log/adapters.md
EVERYWHERE = 1 << 30  # a block longer than any window
AT_ONCE = 32  # rows


# ---- adapters that act from a point on -------------------------------------------------------------------------------


class Switch:
    """Lets the LoRA of some tokens of a batch act, of others not."""

    def __init__(self, model: Any):
        self.on_BL1: torch.Tensor | None = None  # None: of all tokens
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.forward = MethodType(self._forward, module)

    def _forward(self, module: Any, x_BLI: torch.Tensor) -> torch.Tensor:
        a_RI, b_OR = module.lora_A["default"].weight, module.lora_B["default"].weight
        more_BLO = (x_BLI @ a_RI.t() @ b_OR.t()) * module.scaling["default"]
        return module.base_layer(x_BLI) + (more_BLO if self.on_BL1 is None else more_BLO * self.on_BL1)


def draw(batch: Batch, rng: np.random.Generator) -> np.ndarray:
    """Which tokens come after the point of their document [B, L], or of the part of it that the row has."""
    length = batch.positions_BL.shape[1]
    on_BL = np.zeros(batch.positions_BL.shape, bool)
    for positions_L, on_L in zip(batch.positions_BL, on_BL, strict=True):
        cuts = [*np.flatnonzero(positions_L == 0).tolist(), length]
        for first, last in pairwise(cuts):
            on_L[first + int(rng.random() * (last - first)) : last] = True
    return on_BL


def train_activated(bench: Bench, division: Partition, place: int, recipe: Recipe, report: Callable[..., None]) -> Any:
    """One expert, as `train` makes it, but for the switch. In memory only."""
    model = add_adapter(load_model(bench.seed, bench.store, device="cpu"), recipe, "seed")
    switch, able = Switch(model), find_abilities(model)
    packed = pack(shards(division, place), tokenizer(bench.seed, bench.store), bench.seed.separator, bench.store)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = adamw(weights, recipe)
    model.train()
    with torch.random.fork_rng():
        for step, batch in zip(range(recipe.steps), batches(packed, recipe), strict=False):
            on_BL = draw(batch, np.random.default_rng((recipe.rng_seed, step)))
            switch.on_BL1 = torch.from_numpy(on_BL[..., None]).float()
            add_gradients(model, able, batch._replace(targets_BL=np.where(on_BL, batch.targets_BL, UNSCORED)), recipe)
            update_weights(optimizer, recipe, step)
    switch.on_BL1 = None
    report(place)
    return model.eval(), switch


@torch.inference_mode()
def score_blocks(model: Any, switch: Switch, held: Holdout, block: int) -> np.ndarray:
    """Log-likelihoods [N] where each block of a window is read as after a prompt that ends before it: the adapter acts from the last token
    of the prompt on, whose output says the first token of the block."""
    windows, plain = held.windows, base_model(model)
    loglik_WL = np.zeros(windows.rows_WL.shape, np.float32)
    for first in range(0, windows.rows_WL.shape[1], block):
        inside_W = np.flatnonzero(windows.length_W > max(1, first))
        for chosen_B in np.array_split(inside_W, max(1, math.ceil(len(inside_W) / AT_ONCE))) if len(inside_W) else []:
            end = min(first + block, int(windows.length_W[chosen_B].max()))
            tokens_BL = torch.from_numpy(windows.rows_WL[chosen_B, :end].astype(np.int64))
            switch.on_BL1 = (torch.arange(end - 1) >= first - 1).float()[None, :, None] if first else None
            begin = max(1, first)
            hidden_BUD = plain.base_model(input_ids=tokens_BL[:, :-1], use_cache=False)[0][:, begin - 1 :]
            logp_BUV = torch.log_softmax(plain.get_output_embeddings()(hidden_BUD).float(), -1)
            loglik_WL[chosen_B, begin:end] = logp_BUV.gather(-1, tokens_BL[:, begin:, None])[..., 0].numpy()
    switch.on_BL1 = None
    return loglik_WL[windows.scored_WL]


# ---- the arms --------------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """Experts of one division, read in one way."""

    loglik_NK: np.ndarray
    parameters: int  # of one expert


def keep(folder: Path, make: Callable[[], dict[str, np.ndarray]], *key: object) -> dict[str, np.ndarray]:
    """What was made with this key, or is made now."""
    path = folder / "modes" / f"{fingerprint(*map(str, key))}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path.with_suffix(".tmp.npz"), **make())
        path.with_suffix(".tmp.npz").replace(path)
    with np.load(path) as found:
        return dict(found)


def size(bench: Bench, recipe: Recipe) -> int:
    model = add_adapter(load_model(bench.seed, bench.store, device="cpu"), recipe, "seed")
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def plain(bench: Bench, division: Partition, recipe: Recipe) -> tuple[Arm, list[str]]:
    """Experts trained by `train`, read as they are."""
    digests, _ = train_experts(bench, division, recipe)
    columns = bench.columns(digests, bench.holdout(division))
    return Arm(np.column_stack([columns[one] for one in digests]), size(bench, recipe)), digests


def activated(bench: Bench, division: Partition, recipe: Recipe, held: Holdout, block: int) -> dict[str, Arm]:
    """Experts trained to act from a point on, read so and everywhere."""

    def make() -> dict[str, np.ndarray]:
        columns: dict[str, list[np.ndarray]] = {"activated": [], "everywhere": []}
        for place in range(len(division.domains)):
            model, switch = train_activated(bench, division, place, recipe, lambda place: bench.progress("activated", place, 0, "experts"))
            columns["activated"].append(score_blocks(model, switch, held, block))
            columns["everywhere"].append(score_blocks(model, switch, held, EVERYWHERE))
        return {name: np.column_stack(found) for name, found in columns.items()}

    made = keep(
        bench.store.root, make, "activated", division.digest, recipe.model_dump_json(), block, bench.holdout(division).model_dump_json()
    )
    return {name: Arm(made[name], size(bench, recipe)) for name in ("activated", "everywhere")}


def untrained(bench: Bench, division: Partition, digests: Sequence[str], held: Holdout, block: int) -> np.ndarray:
    """Experts that act everywhere, read from a point on."""

    def make() -> dict[str, np.ndarray]:
        found = []
        for digest in digests:
            model = load_model(bench.seed, bench.store, bench.store.load(digest, Expert), "cpu")
            found.append(score_blocks(model, Switch(model), held, block))
        return {"loglik_NK": np.column_stack(found)}

    return keep(bench.store.root, make, "untrained", *digests, block, bench.holdout(division).model_dump_json())["loglik_NK"]


def served(bench: Bench, division: Partition, digests: Sequence[str], fits: Sequence[Calibration], block: int) -> list[np.ndarray]:
    """Columns of ensembles that read experts as `activated`, with the settings of some routers."""
    forest = Forest(seed=bench.seed.digest, partition=division.digest, experts=tuple(digests))
    bench.store.add(forest)
    found = []
    for fit in fits:
        settings = {
            name: value for name, value in asdict(fit.routing).items() if name in ("router", "top_k", "temperature", "seed_distance")
        }
        settings |= {"memory": fit.routing.memory, "decay": fit.routing.decay} if fit.routing.router == "live" else {}
        made = Ensemble(forest=forest.digest, mixing="activated", block=block, **settings)
        bench.store.add(made)
        found.append(bench.columns([made.digest], bench.holdout(division))[made.digest])
    return found


def study(bench: Bench, asked: Namespace, rng_seed: int, arms: Sequence[str]) -> None:
    k = bench.study.domains
    divisions = {method: divide(bench.corpus, bench.store, domains=k, method=method) for method in ("balanced", "random")}
    spec = bench.holdout(divisions["balanced"])
    held = open_holdout(spec, bench.store)
    dist = {method: measure_distances(held, division, bench.store) for method, division in divisions.items()}
    seed_N = bench.columns([bench.seed.digest], spec)[bench.seed.digest]
    base = Recipe(
        method="lora", rank=asked.rank, steps=bench.study.steps, batch=bench.study.batch, length=bench.study.length, rng_seed=rng_seed,
        learning_rate=RATES["full"],
    )  # fmt: skip
    layers = load_model(bench.seed, bench.store, device="cpu").config.num_hidden_layers
    full_N: np.ndarray | None = None
    full: list[str] = []
    fits: list[Calibration] = []
    dense = base.model_copy(update={"steps": k * base.steps, "learning_rate": RATES["dense"]})
    pooled, _ = plain(bench, divide(bench.corpus, bench.store, domains=1), dense)
    control = Control("dense", pooled.loglik_NK[:, 0])

    def side(method: str, loglik_NK: np.ndarray) -> Side:
        dist2_NK, sparse2_NK = dist[method]
        return Side(loglik_NK, dist2_NK, sparse2_NK=sparse2_NK)

    def tell(name: str, arm: Arm, recipe: Recipe, random_NK: np.ndarray | None) -> np.ndarray:
        compared = compare(
            held, seed_N, side("balanced", arm.loglik_NK), [control],
            None if random_NK is None else side("random", random_NK), router=ROUTER,
        )  # fmt: skip
        over_seed = row_of("", compared.column_N, held, domains=k, against_N=seed_N)
        more: dict[str, object] = {row.name: row.bits_per_byte for row in compared.rows if row.role == "control"}
        if random_NK is not None:
            other = compare(held, seed_N, side("random", random_NK), router=ROUTER)
            more["over random"] = paired(compared.column_N, other.column_N, held, k)
        if full_N is not None:
            more["over full"] = paired(compared.column_N, full_N, held, k)
        say(
            "modes", arm=name, rng_seed=rng_seed, layers=layers, adapted=math.ceil(recipe.late * layers), rank=recipe.rank,
            parameters=arm.parameters, rate=recipe.learning_rate, tokens=recipe.tokens * k, chosen=compared.chosen,
            bits_per_byte=over_seed.bits_per_byte, gain=over_seed.gain, gain_error=over_seed.gain_error,
            over_dense=paired(compared.column_N, control.loglik_N, held, k), **more,
        )  # fmt: skip
        return compared.column_N

    for name in arms:
        kind, equal = name.partition(",")[0], name.endswith("equal")
        if name in SHARES or equal:
            late = SHARES[kind]
            rank = round(base.rank * layers / math.ceil(late * layers)) if equal else base.rank
            recipe = base.model_copy(update={"late": late, "rank": rank, "learning_rate": RATES[kind]})
            arm, digests = plain(bench, divisions["balanced"], recipe)
            random_NK = plain(bench, divisions["random"], recipe)[0].loglik_NK if name in words(asked.random) else None
            found_N = tell(name, arm, recipe, random_NK)
            if name == "full":
                full_N, full = found_N, digests
                mixture = ExpertColumns.of(held, seed_N, side("balanced", arm.loglik_NK))
                fits = [fit for router in ("centroid", "sparse", "live") for fit in mixture.calibrate(router, [2])]
        elif kind == "activated":
            recipe = base.model_copy(update={"learning_rate": asked.activated_rate or RATES[kind]})
            ways = activated(bench, divisions["balanced"], recipe, held, asked.block)
            random_NK = None
            if name in words(asked.random):
                random_NK = activated(bench, divisions["random"], recipe, held, asked.block)["activated"].loglik_NK
            tell(name, ways["activated"], recipe, random_NK)
            tell("activated, everywhere", ways["everywhere"], recipe, None)
        elif name == "full, served":
            columns = served(bench, divisions["balanced"], full, fits, asked.block)
            column_N = max(columns, key=lambda one_N: one_N[held.tune_N].mean())
            row = row_of("", column_N, held, domains=k, against_N=seed_N)
            beside = {"over dense": paired(column_N, control.loglik_N, held, k)}
            beside |= {} if full_N is None else {"over full": paired(column_N, full_N, held, k)}
            about = {"arm": name, "rng_seed": rng_seed, "layers": layers}
            say("modes", **about, bits_per_byte=row.bits_per_byte, gain=row.gain, gain_error=row.gain_error, **beside)
        elif name == "full, activated":
            loglik_NK = untrained(bench, divisions["balanced"], full, held, asked.block)
            tell(name, Arm(loglik_NK, size(bench, base)), base, None)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--rng-seeds", default="0,1,2")
    options.add_argument("--tokens", default="0.45M", help="of further training, all experts together")
    options.add_argument("--layers", type=int, help="of a seed trained here; without it the demo's seed is taken")
    options.add_argument("--seed-tokens", default="3M")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--block", type=int, default=64)
    options.add_argument("--activated-rate", type=float)
    options.add_argument("--documents", type=int, default=60)
    options.add_argument(
        "--arms", default="full;full, served;activated;quarter;half;full, activated;quarter, equal;half, equal", help="by ;"
    )
    options.add_argument("--random", default="full,activated,half", help="arms with random clusters beside them")
    asked = options.parse_args()
    store, progress = Store(asked.folder), Lines()
    sizes = {"layers": asked.layers} if asked.layers else {}
    plan = Study(seed_tokens=parse_count(asked.seed_tokens), tokens=parse_count(asked.tokens), documents=asked.documents, **sizes)
    corpus = build(["sample"], store, progress=progress)
    seed = scratch(plan, corpus, store, progress) if asked.layers else install_seed(corpus, store)
    bench = Bench(plan, corpus, seed, store, 1, progress)
    with use_threads(1):
        for rng_seed in integers(asked.rng_seeds):
            study(bench, asked, rng_seed, [one.strip() for one in asked.arms.split(";")])


if __name__ == "__main__":
    main()
