"""Does tuning a mixture fit? As `fit`, from the headers of its files and the config of its seed: no weights are read.

E experts, K experts per token, D width, Q width of all heads, F width of a feed-forward layer
"""

import math

from elmwood.errors import BadInput
from elmwood.lm.adapters.lowrank import FILE
from elmwood.records import Frozen, Mixture, Recipe, Seed
from elmwood.store import Store
from elmwood.store.headers import read_header
from elmwood.train.fit.formulas import BESIDE, FLOAT, Anatomy, anatomy, highest, logits, resident_memory, rows_at_once, speed, width_of
from elmwood.train.fit.predict import find_machine, in_passes, largest_number, load_config
from elmwood.train.router import ORDER, part_of


class TuningPrediction(Frozen):
    """A prediction, in bytes and tokens per second. `components` are those at the peak, and sum to `total`."""

    device: str
    parameters: int
    trained: int
    components: dict[str, int]
    total: int
    memory: int
    fits: bool
    tokens_per_second: float | None
    batch: int  # the largest that would fit in one pass; 0: none
    verdict: str


def fit_mixture(
    mixture: Mixture, recipe: Recipe, store: Store, *, memory: int | None = None, device: str | None = None
) -> TuningPrediction:
    """Memory and speed of tuning a mixture by this recipe. Raises BadInput."""
    if recipe.method != "router":
        raise BadInput(f"a mixture is tuned, not trained with method {recipe.method!r}: ask with --method router")
    place, count, body = find_machine(device, memory), count_parameters(mixture, store), _body(mixture, store)

    def fits(recipe: Recipe) -> bool:
        return sum(components(mixture, count, body, recipe, place.device).values()) <= place.memory

    parts = components(mixture, count, body, recipe, place.device)
    total = sum(parts.values())
    most = largest_number(lambda batch: fits(recipe.model_copy(update={"batch": batch, "accumulate": 1})), 1 << 16)
    have = f"{total / 1e9:.2f} GB of {place.memory / 1e9:.2f} GB"
    if total <= place.memory:
        verdict = f"fits: {have}; so would batch {most}"
    elif spread := in_passes(recipe, fits):
        verdict = f"does not fit: {have}; --accumulate {spread.accumulate} would"
    else:
        verdict = f"does not fit: {have}; tune less (--tuned routers), shorter rows, or mix --low-rank"
    return TuningPrediction(
        device=place.device, parameters=sum(count.values()), trained=_trained(count, recipe), components=parts, total=total,
        memory=place.memory, fits=total <= place.memory,
        tokens_per_second=speed(body, recipe.model_copy(update={"method": "full"}), place.device) if place.here else None,
        batch=most, verdict=verdict,
    )  # fmt: skip


def count_parameters(mixture: Mixture, store: Store) -> dict[str, int]:
    """Parameters of each part: routers, norms, shared, everything (the experts' own)."""
    found = dict.fromkeys(ORDER, 0)
    low = mixture.layout == "low-rank"
    files = [mixture.files] + ([store.load(mixture.seed, Seed).files] if low else [])
    names: dict[str, int] = {}
    for one in reversed(files):
        for path in sorted(store.folder(one).glob("*.safetensors")):
            names |= {name: math.prod(entry["shape"]) for name, entry in read_header(path).tensors.items()}
    for name, numbers in names.items():
        found["everything" if low and ".mlp." in name and "gate.weight" not in name else part_of(name)] += numbers
    return found


def components(mixture: Mixture, count: dict[str, int], body: Anatomy, recipe: Recipe, device: str) -> dict[str, int]:
    """Bytes at the peak of a pass, for a mixture with so many parameters of each part; the constants are those of `formulas`.

    On a CPU the experts of a checkpoint count twice: they are stacked in memory, and the file they were read from stays mapped.
    """
    own, low, positions = _trained(count, recipe), width_of(device), rows_at_once(recipe) * recipe.length
    numbers = positions * (activations(body, mixture, recipe) + recipe.length)
    head = body.vocabulary * body.width * FLOAT if recipe.tuned in ("shared", "everything") else 0
    gradients = own * FLOAT
    before = gradients if recipe.accumulate > 1 else 0
    return {
        "process": resident_memory() if device == "cpu" else 0,
        "libraries": BESIDE[device],
        "weights": sum(count.values()) * FLOAT,
        "files": count["everything"] * FLOAT if device == "cpu" and FILE not in mixture.files else 0,
        "optimiser": 2 * own * FLOAT,
        "logits": logits(body.vocabulary, positions, device),
        **highest(numbers * low, max(head, before), gradients, gradients - before, 0, device),
    }


def activations(body: Anatomy, mixture: Mixture, recipe: Recipe) -> int:
    """Numbers per token kept for the backward pass, without mask and loss.

    Frozen matrices keep no inputs, and if only routers are tuned nothing before the first gate needs a gradient.
    Per layer: inputs of norms (if tuned also normalised values and outputs), four tensors of attention, the gate's input; per expert
    before and after the activation and the other branch, the product if down_proj is tuned, and the output that is weighted.
    """
    tuned, low, k, wide = ORDER.index(recipe.tuned), FILE in mixture.files, mixture.gates.top_k, body.feed_forward
    norms, heads = (2, 4, 5, 5)[tuned] * body.width, (4 + (4 if tuned else 2) * body.query_norms) * body.heads
    above = norms + heads + (5 if low else 4 if recipe.tuned == "everything" else 3) * wide
    always = body.width + (2 if recipe.tuned == "everything" else 1) * k * body.width + 4 * len(mixture.experts) + 9 * k  # routing included
    first = 0 if tuned else above - 2 * wide * low  # what the first layer does not keep
    return body.layers * (above + always) - first + (2, 3, 4, 4)[tuned] * body.width


def _body(mixture: Mixture, store: Store) -> Anatomy:
    """The seed with one feed-forward layer per active expert (those of a low-rank mixture share one)."""
    body = anatomy(load_config(store.load(mixture.seed, Seed), store))
    more = mixture.gates.top_k - 1
    wide = tuple(shape for shape in body.shapes if body.feed_forward in shape)
    shapes = body.shapes if FILE in mixture.files else (*body.shapes, *wide * more)
    return body._replace(feed_forward=body.feed_forward * (1 + more), shapes=shapes)


def _trained(count: dict[str, int], recipe: Recipe) -> int:
    return sum(count[kind] for kind in ORDER[: ORDER.index(recipe.tuned) + 1])
