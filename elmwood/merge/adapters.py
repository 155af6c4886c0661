"""LoRA experts merged to one LoRA. The dense product of a layer is never formed.

E experts; a layer maps I inputs to O outputs; R ranks of one expert, or of all together; X, Y dimensions of the core

The columns of all B span X dimensions of the outputs, the rows of all A span Y of the inputs, so with orthonormal bases p_OX and q_YI
every delta is p core q, exactly, with a small core of its own (Core Space, arXiv:2509.17786). Rules work on cores.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, UnknownName
from elmwood.merge.export.card import card
from elmwood.merge.layer_weights import check_total, depth_of, plain_weights, weight_of
from elmwood.merge.rules.base import REVISION, Settings, check_settings
from elmwood.merge.states import Weights, hold, open_all
from elmwood.records import Contribution, Merged, Seed, fingerprint
from elmwood.store import Store
from elmwood.threads import one_thread
from elmwood.weights.experts import Low
from elmwood.weights.tensors import StoredTensor, pack_header

Doubles = NDArray[np.float64]
Pair = tuple[Doubles, Doubles]  # B [O, R] and A [R, I] of one layer: delta = B A
CoreFn = Callable[[Iterable[Doubles], Sequence[float], Settings], Doubles]


class LowRule(NamedTuple):
    """A row: where it comes from, cores -> the merged core (none: the factors are only put side by side), settings with defaults."""

    paper: str
    core: CoreFn | None
    settings: Mapping[str, float]


# ---- cores: one for each expert -> one --------------------------------------------------------------------------


def sum_cores(cores: Iterable[Doubles], weight_E: Sequence[float], settings: Settings) -> Doubles:
    """The weighted sum, which is the core of the exact sum."""
    total = sum(weight * core_XY for weight, core_XY in zip(weight_E, cores, strict=True))
    return np.asarray(total)


def orthogonalise_cores(cores: Iterable[Doubles], weight_E: Sequence[float], settings: Settings) -> Doubles:
    """Each expert's first singular directions, made orthogonal to the others' (TSV-Merge, arXiv:2412.00081)."""
    found = [np.linalg.svd(core_XY, full_matrices=False) for core_XY in cores]
    kept = -(-len(found[0].S) // len(found))
    u_XR = np.concatenate([one.U[:, :kept] for one in found], 1)
    s_R = np.concatenate([weight * one.S[:kept] for weight, one in zip(weight_E, found, strict=True)])
    v_RY = np.concatenate([one.Vh[:kept] for one in found])
    return (_nearest_orthogonal(u_XR) * s_R) @ _nearest_orthogonal(v_RY)


def flatten_cores(cores: Iterable[Doubles], weight_E: Sequence[float], settings: Settings) -> Doubles:
    """The sum with all its singular values alike (Iso-C, arXiv:2502.04959)."""
    u_XR, s_R, v_RY = np.linalg.svd(sum_cores(cores, weight_E, settings), full_matrices=False)
    return float(s_R.mean()) * (u_XR @ v_RY)


def vote_cores(cores: Iterable[Doubles], weight_E: Sequence[float], settings: Settings) -> Doubles:
    """Trim, elect a sign, the mean of those who agree (TIES, arXiv:2306.01708), of values of the core."""
    core_EXY = np.stack(list(cores))
    magnitude_EN = np.abs(core_EXY).reshape(len(core_EXY), -1)
    kept = max(1, int(settings["density"] * magnitude_EN.shape[1]))
    low_E = np.partition(magnitude_EN, -kept, axis=1)[:, -kept]
    weight_E11 = np.asarray(weight_E)[:, None, None]
    vote_EXY = np.where(np.abs(core_EXY) >= low_E[:, None, None], core_EXY * weight_E11, 0)
    agree_EXY = (vote_EXY != 0) & ((vote_EXY > 0) == (vote_EXY.sum(0) >= 0))
    weight_XY = (agree_EXY * np.abs(weight_E11)).sum(0)
    return (vote_EXY * agree_EXY).sum(0) / np.where(weight_XY > 0, weight_XY, 1)


def _nearest_orthogonal(matrix: Doubles) -> Doubles:
    """The polar factor."""
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


# `rank` 0: as much as the result has
_PLAIN = {"rank": 0.0, "scale": 1.0, "normalise": 0.0}
LOW_RULES: dict[str, LowRule] = {
    "concat": LowRule("arXiv:2409.05976", None, {"scale": 1.0, "normalise": 0.0}),
    "svd": LowRule("Eckart and Young, Psychometrika 1, 1936", sum_cores, _PLAIN),
    "core_space": LowRule("arXiv:2509.17786, with TSV of arXiv:2412.00081", orthogonalise_cores, _PLAIN),
    "core_space_iso": LowRule("arXiv:2509.17786, with Iso-C of arXiv:2502.04959", flatten_cores, _PLAIN),
    "core_space_ties": LowRule("arXiv:2509.17786, with TIES of arXiv:2306.01708", vote_cores, {**_PLAIN, "density": 0.2}),
}


def settle_low(name: str, given: Settings) -> tuple[LowRule, dict[str, float]]:
    """A rule by name with all its settings. Raises UnknownName, BadInput."""
    if name not in LOW_RULES:
        raise UnknownName(f"no rule {name!r} that makes an adapter of adapters; have {', '.join(sorted(LOW_RULES))}")
    rule = LOW_RULES[name]
    if unknown := set(given) - set(rule.settings):
        raise BadInput(f"{name} has no setting {sorted(unknown)[0]!r}; it has {', '.join(rule.settings)}")
    if (rank := given.get("rank", 0.0)) < 0 or rank != int(rank):
        raise BadInput(f"rank {rank:g}: a rank is an integer; 0 keeps all that the result has")
    check_settings(given)
    return rule, {key: float(given.get(key, value)) for key, value in rule.settings.items()}


# ---- one layer --------------------------------------------------------------------------------------------------


def side_by_side(pairs: Sequence[Pair], weight_E: Sequence[float]) -> Pair:
    """The exact sum: B of all experts beside one another, each times its weight, A of all below one another."""
    return np.concatenate([weight * b for weight, (b, _) in zip(weight_E, pairs, strict=True)], 1), np.concatenate([a for _, a in pairs])


@one_thread
def merged_pair(pairs: Sequence[Pair], weight_E: Sequence[float], rule: LowRule, settings: Settings) -> Pair:
    """Factors of one layer's merge, of rank `rank` at most. The best of that rank for the merged core (Eckart and Young)."""
    total = sum(weight_E) if settings["normalise"] else 1.0
    factor = settings["scale"] / total if total else 0.0
    if rule.core is None:
        return side_by_side(pairs, [weight * factor for weight in weight_E])
    b_OR, a_RI = side_by_side(pairs, [1.0] * len(pairs))
    p_OX, left_XR = np.linalg.qr(b_OR)
    q_IY, right_YR = np.linalg.qr(a_RI.T)
    ends = np.cumsum([a.shape[0] for _, a in pairs])[:-1]
    cores = (left @ right.T for left, right in zip(np.split(left_XR, ends, 1), np.split(right_YR, ends, 1), strict=True))
    u_XR, s_R, v_RY = np.linalg.svd(rule.core(cores, weight_E, settings), full_matrices=False)
    rank = min(int(settings["rank"]) or len(s_R), len(s_R))
    root_R = np.sqrt(s_R[:rank] * abs(factor))
    return p_OX @ (u_XR[:, :rank] * root_R) * np.sign(factor), (root_R[:, None] * v_RY[:rank]) @ q_IY.T


@one_thread
def norm(pair: Pair) -> float:
    """Frobenius norm of B A."""
    left, right = (np.linalg.qr(half).R for half in (pair[0], pair[1].T))
    return float(np.linalg.norm(left @ right.T))


def distance(one: Pair, other: Pair) -> float:
    """Frobenius norm of the difference of two products."""
    return norm((np.concatenate([one[0], -other[0]], 1), np.concatenate([one[1], other[1]])))


# ---- whole adapters ---------------------------------------------------------------------------------------------


def merge_adapters(
    seed: Seed, members: Mapping[str, Weights], answers: Sequence[tuple[str, Settings]], store: Store, progress: Progress = silent
) -> list[Merged]:
    """One reading of LoRA experts, an adapter for each answer; a layer of all experts in memory at a time.

    `concat` copies A and multiplies B, so it is the same bytes everywhere; the others go through LAPACK, which rounds differently on
    other machines. Raises ForeignExpert, BadInput, UnknownName.
    """
    if len(members) < 2:
        raise BadInput("a merge takes two experts or more; one alone is exported as it is: `elmwood export`")
    plain = plain_weights(members)
    rules = [settle_low(*answer) for answer in answers]
    keys = [fingerprint("merge", REVISION, seed, plain, name, settings) for (name, _), (_, settings) in zip(answers, rules, strict=True)]
    with hold(keys, store, progress):
        if all(store.done(key) for key in keys):
            return [store.load(store.done(key) or "", Merged) for key in keys]
        tensors, experts, weights, turned = _open_adapters(seed, members, answers[0][0], store)
        depth = depth_of(tensors)
        names = [name for name in tensors if any(one.has(name) for one in experts)]
        if any(settings["normalise"] for _, settings in rules):
            _check_totals(names, experts, weights, depth)
        writers = [AdapterFile(store.work(key) / "out", tensors, turned) for key in keys]
        reach = [0.0] * len(experts)
        for place, name in enumerate(names):
            pairs, weight_E = _pairs(experts, weights, name, depth, reach)
            exact = side_by_side(pairs, weight_E)
            for writer, (rule, settings) in zip(writers, rules, strict=True):
                total = settings["scale"] / (sum(weight_E) if settings["normalise"] and sum(weight_E) else 1.0)
                writer.put(name, merged_pair(pairs, weight_E, rule, settings), (exact[0] * total, exact[1]))
            progress("merge", place + 1, len(names), "layers")
        rows = tuple(
            Contribution(expert=one.digest, weight=weight, whole=False, reach=int(np.ceil(most)))
            for one, weight, most in zip(experts, weights, reach, strict=True)
        )
        made = []
        for (name, _), (rule, settings), key, writer in zip(answers, rules, keys, writers, strict=True):
            files = {path.name: store.put(path) for path in writer.close(seed)}
            about = f"Its relative distance from the exact sum of the experts' deltas, over all layers (Frobenius): {writer.error:.6g}."
            text = card(seed, name, rule.paper, settings, rows, files, library="peft", about=about)
            files["README.md"] = store.put(text.encode())
            made.append(Merged(seed=seed.digest, method=name, settings=settings, contributions=rows, files=files, error=writer.error))
            store.finish(key, made[-1])
        return made


def _check_totals(names: Sequence[str], experts: Sequence[Low], weights: Sequence[Weights], depth: int) -> None:
    """Raises BadInput where a mean of those that change a tensor is over weights that add up to 0."""
    for name in names:
        check_total([weight_of(shares, name, depth) for one, shares in zip(experts, weights, strict=True) if one.has(name)], name)


def _open_adapters(
    seed: Seed, members: Mapping[str, Weights], method: str, store: Store
) -> tuple[dict[str, StoredTensor], list[Low], list[Weights], bool]:  # fmt: skip
    """Tensors of the seed, the experts with their weights, and whether their matrices are transposed. Raises BadInput, ForeignExpert."""
    tensors, sources, weights = open_all(seed, members, store, False)
    if whole := [one.digest for one in sources if one.whole]:
        raise BadInput(f"expert {whole[0][:8]} is a full checkpoint: {method} makes an adapter of adapters; use average or ties")
    experts = [one for one in sources if isinstance(one, Low)]
    return tensors, experts, weights, any(one.turned for one in experts)


def _pairs(experts: Sequence[Low], weights: Sequence[Weights], name: str, depth: int, reach: list[float]) -> tuple[list[Pair], list[float]]:
    """Factors of those that change a tensor, and their weights there. Notes what each may reach."""
    pairs, found = [], []
    for e, (one, shares) in enumerate(zip(experts, weights, strict=True)):
        weight = weight_of(shares, name, depth)
        if not one.has(name) or not weight:
            continue
        a_RI, b_OR, scale = one.pair(name)
        pairs.append((b_OR * scale, a_RI))
        found.append(weight)
        reach[e] = max(reach[e], abs(weight) * float(np.max(np.abs(pairs[-1][0]) @ np.abs(a_RI).max(1))))
    if not pairs:  # all weights are zero here: a layer of nothing
        a_RI, b_OR, _ = next(one for one in experts if one.has(name)).pair(name)
        return [(b_OR[:, :1] * 0.0, a_RI[:1] * 0.0)], [1.0]
    return pairs, found


class AdapterFile:
    """A PEFT adapter folder, written layer by layer in float32; how far it is from the exact sum is added up on the way."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor], turned: bool):
        self.folder, self.tensors, self.turned = folder, tensors, turned
        folder.mkdir(parents=True, exist_ok=True)
        self.ranks: dict[str, int] = {}
        self.sizes: list[tuple[str, tuple[int, ...]]] = []
        self.off2 = self.all2 = 0.0
        self.numbers = (folder / "numbers").open("wb")

    def put(self, name: str, pair: Pair, exact: Pair) -> None:
        """One layer, and what the exact sum would be."""
        layer = name.removesuffix(".weight")
        b_OR, a_RI = (half.astype("<f4") for half in pair)
        self.ranks[layer] = a_RI.shape[0]
        for half, value in (("A", a_RI), ("B", b_OR)):
            self.sizes.append((f"base_model.model.{layer}.lora_{half}.weight", value.shape))
            self.numbers.write(value.tobytes())
        self.off2 += distance((b_OR.astype(np.float64), a_RI.astype(np.float64)), exact) ** 2
        self.all2 += norm(exact) ** 2

    @property
    def error(self) -> float:
        """Relative Frobenius distance over all layers, to six digits."""
        return float(f"{(self.off2 / self.all2) ** 0.5:.6g}") if self.all2 else 0.0

    def close(self, seed: Seed) -> Iterator[Path]:
        """Finish the two files."""
        self.numbers.close()
        entries = [(name, "F32", shape, 4 * shape[0] * shape[1]) for name, shape in self.sizes]
        path = self.folder / "adapter_model.safetensors"
        with path.open("wb") as file, (self.folder / "numbers").open("rb") as numbers:
            file.write(pack_header(entries, {"format": "pt"}))
            while part := numbers.read(1 << 22):
                file.write(part)
        os.unlink(self.folder / "numbers")
        (self.folder / "adapter_config.json").write_text(json.dumps(self._settings(seed), indent=1, sort_keys=True), encoding="utf-8")
        yield from (self.folder / "adapter_config.json", path)

    def _settings(self, seed: Seed) -> dict[str, Any]:
        """What PEFT reads. Alpha is the rank, so that B A counts as it is."""
        most = max(self.ranks.values())
        others = {layer: rank for layer, rank in self.ranks.items() if rank != most}
        leaves = {layer.rpartition(".")[2] for layer in self.ranks}
        matrices = [name.removesuffix(".weight") for name, place in self.tensors.items() if len(place.shape) == 2]
        complete = all(layer in self.ranks for layer in matrices if layer.rpartition(".")[2] in leaves)
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": (seed.hub or seed.name).partition("@")[0],
            "r": most, "lora_alpha": most, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "inference_mode": True,
            "fan_in_fan_out": self.turned, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": sorted(leaves if complete else self.ranks),
        }  # fmt: skip
