"""Experts as the sum sees them: whole tensors read from a checkpoint, or deltas worked out from an adapter's factors.

N values of a block of one tensor; O, I: what a linear layer gives out and takes in; R rank
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput, ForeignExpert
from elmwood.lm.adapters.peft_config import read_settings, scale, split_key
from elmwood.lm.files import seed_folder
from elmwood.records import Seed
from elmwood.store import Store
from elmwood.weights import exact
from elmwood.weights.tensors import Files, StoredTensor, decode, places

Doubles = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]
CONV1D = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel")  # architectures with linear layers of transformers' class Conv1D, and their names:
_TURNED = re.compile(r"(?:.+\.)?(?:c_attn|q_attn|c_proj|c_fc)\.weight")
SLICE = 21  # bits of a factor that are multiplied at once: 2 * 21 bits and a sum over up to 2^11 ranks fit into 53


def seed_places(seed: Seed, store: Store) -> dict[str, StoredTensor]:
    """The seed's tensors, and which of them stand as [inputs, outputs]."""
    found = places(sorted(seed_folder(seed, store).glob("*.safetensors")))
    if seed.architecture in CONV1D:
        found = {name: place._replace(turned=bool(_TURNED.fullmatch(name))) for name, place in found.items()}
    return found


class Whole:
    """A full checkpoint: every tensor of the seed, with other values."""

    whole = True

    def __init__(self, digest: str, folder: Path, seed: dict[str, StoredTensor], rows: bool = False):
        """`rows`: an embedding with other rows than the seed's is read as far as both go. Raises BadInput, ForeignExpert."""
        self.digest = digest
        self.places = places(sorted(folder.glob("*.safetensors")))
        if absent := sorted(set(seed) ^ set(self.places)):
            side = "lacks" if absent[0] in seed else "has besides the seed's"
            raise ForeignExpert(f"expert {digest[:8]} {side} the tensor {absent[0]} ({len(absent)} differ): a merge needs one architecture")
        for name, place in seed.items():
            mine = self.places[name]
            if mine.shape == place.shape:
                continue
            vocabulary = len(mine.shape) == len(place.shape) == 2 and mine.shape[1:] == place.shape[1:]
            if not vocabulary:
                raise ForeignExpert(
                    f"expert {digest[:8]}: {name} is {mine.shape}, the seed's {place.shape}: a merge needs one architecture"
                )
            if not rows:
                raise BadInput(
                    f"expert {digest[:8]}: {name} has {mine.shape[0]} rows, the seed's {place.shape[0]}: their vocabularies differ; "
                    "with --resize the rows they share are merged and the others are the seed's"
                )

    def has(self, name: str) -> bool:
        return True

    def reads(self, name: str, numbers: int) -> int:
        """How many of a tensor's first values this expert has."""
        return min(numbers, self.places[name].numbers)


class Low:
    """An adapter: delta = scale * B A for some tensors, none for the others."""

    whole = False

    def __init__(self, digest: str, folder: Path, seed: Mapping[str, StoredTensor], dora: bool = False):
        """`dora`: a weight-decomposed one is read too, and its deltas leave the magnitudes out. Which way a matrix stands is the seed's
        word, as in PEFT, whatever the adapter's settings say. Raises BadInput, ForeignExpert."""
        self.digest, self.files = digest, Files()
        settings = read_settings(folder / "adapter_config.json", dora=True)
        if settings.get("use_dora") and not dora:
            raise BadInput(f"expert {digest[:8]} is weight-decomposed: what it adds is no product B A; export it folded into its seed")
        parts: dict[str, dict[str, StoredTensor]] = {}
        for key, place in places([folder / "adapter_model.safetensors"]).items():
            layer, part = split_key(key) or ("", "")
            if not layer or (part == "m") > bool(settings.get("use_dora")):
                raise BadInput(f"expert {digest[:8]} has the tensor {key}: only the lora_A and lora_B of linear layers can be used")
            parts.setdefault(layer, {})[part] = place
        self.factors: dict[str, tuple[StoredTensor, StoredTensor, float]] = {}
        self.magnitudes: dict[str, StoredTensor] = {}  # m [O] of each tensor that is weight-decomposed
        self._turned: set[str] = set()
        for layer, found in parts.items():
            name = f"{layer}.weight"
            _check_pair(digest, layer, found, seed.get(name))
            self.factors[name] = (found["A"], found["B"], scale(settings, layer, found["A"].shape[0]))
            if settings.get("use_dora"):
                if "m" not in found or found["m"].shape != found["B"].shape[:1]:
                    raise BadInput(f"expert {digest[:8]}: {layer} is weight-decomposed and has no magnitude for each row: adopt it again")
                self.magnitudes[name] = found["m"]
            if seed[name].turned:
                self._turned.add(name)
        self._ready: tuple[str, Sequence[Any], Sequence[Any], float] | None = None

    @property
    def turned(self) -> bool:
        """Whether some of its matrices stand as [inputs, outputs]."""
        return bool(self._turned)

    def has(self, name: str) -> bool:
        return name in self.factors

    def pair(self, name: str) -> tuple[Doubles, Doubles, float]:
        """A [R, I], B [O, R] and the scale of their product, as stored. Raises BadInput where a value is not finite."""
        a, b, scale = self.factors[name]
        a_RI, b_OR = (decode(self.files.read(p, 0, p.numbers), p.dtype).astype(np.float64).reshape(p.shape) for p in (a, b))
        if not (np.isfinite(a_RI).all() and np.isfinite(b_OR).all()):
            raise BadInput(f"expert {self.digest[:8]}: {name} contains NaN or Inf; training diverged: leave this expert out")
        return a_RI, b_OR, scale

    def delta(self, name: str, first: int, last: int, width: int) -> Doubles:
        """Values first to last of the delta, of a tensor with rows of `width`; the same bits on every machine."""
        if self._ready is None or self._ready[0] != name:
            a_RI, b_OR, scale = self.pair(name)
            left, right = (a_RI.T, b_OR.T) if name in self._turned else (b_OR, a_RI)
            self._ready = name, slices(left), slices(right), scale
        _, left_slices, right_slices, scale = self._ready
        top, bottom = first // width, -(-last // width)
        product = exact_product([part[top:bottom] for part in left_slices], right_slices)
        product *= scale
        return product.reshape(-1)[first - top * width : last - top * width]


def _check_pair(digest: str, layer: str, found: Mapping[str, StoredTensor], place: StoredTensor | None) -> None:
    """Whether A and B are there, fit each other, and make a change of the seed's matrix. Raises BadInput, ForeignExpert."""
    a, b = found.get("A"), found.get("B")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise BadInput(f"expert {digest[:8]}: A and B of {layer} do not fit each other: the file is incomplete; download it again")
    shape = (b.shape[0], a.shape[1])
    if place is None or place.shape != (shape[::-1] if place.turned else shape):
        raise ForeignExpert(f"expert {digest[:8]} adapts {layer}, which the seed does not have in that shape: it grew on another one")


Source = Whole | Low


def read_values(
    one: Source, name: str, first: int, last: int, place: StoredTensor, raw: Any = None, at: int = 0, seed_N: Floats | None = None,
    bits: bool = False,
) -> Any:  # fmt: skip
    """What an expert has at values first to last of the seed's tensor at `place`: a full checkpoint its own values, an adapter its delta.

    raw: bytes of a full checkpoint, whose value `at` is the one at `first`. Where they end (it has fewer rows) the seed's follow.
    bits: bf16 values may come as their bits.
    """
    if isinstance(one, Low):
        return one.delta(name, first, last, place.shape[-1]) if one.has(name) else np.zeros(last - first)
    mine = one.places[name]
    mine_N = raw[at * mine.width : (at + last - first) * mine.width]
    if bits and mine.dtype == "BF16" and mine_N.size == 2 * (last - first):
        return mine_N.view("<u2")
    value_N = decode(mine_N, mine.dtype)
    if value_N.size < last - first:
        assert seed_N is not None
        value_N = np.concatenate([value_N, seed_N[value_N.size :]])
    return value_N


def delta(one: Source, value_N: Floats, seed_N: Floats | None, out: Doubles | None = None) -> Doubles:
    """Expert minus seed (the task vector), float64, from what `read_values` gave. Of an adapter the seed's values are not needed."""
    if not isinstance(one, Whole):
        return value_N.astype(np.float64, copy=False)
    assert seed_N is not None
    return np.subtract(value_N, seed_N, out=out, dtype=np.float64)


def read_delta(one: Source, name: str, place: StoredTensor, first: int, last: int, seed_N: Floats, files: Files) -> Doubles:
    """Values first to last of an expert's delta, from its file."""
    known = one.reads(name, last) if isinstance(one, Whole) else 0
    raw = files.read(one.places[name], min(first, known), known) if isinstance(one, Whole) else None
    return delta(one, read_values(one, name, first, last, place, raw, seed_N=seed_N), seed_N)


def refuse_nonfinite(value_N: Floats, one: Source, name: str) -> None:
    """Raises BadInput where an expert's tensor contains NaN or infinity."""
    if not exact.reach(value_N) < np.inf:
        raise BadInput(f"expert {one.digest[:8]}: {name} contains NaN or Inf; training diverged: leave this expert out")


def slices(matrix: Doubles) -> list[Doubles]:
    """A matrix as a sum of three, each of few enough bits that products of any two are exact in float64, in any order of sums.

    (Ozaki's scheme, Numerical Algorithms 59, 2012: why a BLAS that adds in its own order still gives the same bits.)
    """
    parts = []
    largest = float(np.abs(matrix).max(initial=0.0))
    exponent = int(np.frexp(largest)[1]) if largest else 0
    for _ in range(3):
        exponent -= SLICE
        unit = 2.0**exponent
        parts.append(np.rint(matrix / unit) * unit)
        matrix = matrix - parts[-1]
    return parts


def exact_product(left: Sequence[Doubles], right: Sequence[Doubles]) -> Doubles:
    """The product of two sliced matrices, good to 2^-60 of their largest values; smaller terms are added first."""
    total = left[0] @ right[2] + left[2] @ right[0] + left[1] @ right[1]
    total += left[0] @ right[1] + left[1] @ right[0]
    total += left[0] @ right[0]
    return total
