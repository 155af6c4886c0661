"""Each rule against its paper's formula, written here in float64 a second time, and agreed to 1e-12."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import full_expert, leave_statistics, tiny_seed

from elmwood.merge.checkpoint import Answer, assemble, merge
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.rules.table import RULES, on
from elmwood.merge.statistics import open_statistics
from elmwood.records import Merged
from elmwood.store import Store

WEIGHTS = (1.0, 0.5, 2.0)
NAMES = ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight")


def in_double(record, store, **changes):
    """The same record with float64 numbers, a little off those of float32."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: value.double() + 1e-9 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in load_file(store.get(record.files["model.safetensors"])).items()
    }
    path = Path(store.root) / "double.safetensors"
    save_file(weights, path, {"format": "pt"})
    made = record.model_copy(update={"files": record.files | {"model.safetensors": store.put(path)}, **changes})
    store.add(made)
    return made


@pytest.fixture(scope="module")
def doubles(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("doubles"))
    plain = tiny_seed(store)
    seed = in_double(plain, store)
    experts = sorted((in_double(full_expert(plain, store, n), store, seed=seed.digest) for n in range(3)), key=lambda one: one.digest)
    for place, expert in enumerate(experts):
        leave_statistics(expert, plain, store, place)
    return store, seed, experts


def numbers(record, store) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in load_file(store.get(record.files["model.safetensors"])).items()}


def merged(doubles, method, count=3, **settings) -> dict[str, np.ndarray]:
    store, seed, experts = doubles
    members = {one.digest: everywhere(weight) for one, weight in zip(experts[:count], WEIGHTS, strict=False)}
    (record,) = merge(seed, members, [Answer(method, settings)], store)
    return numbers(record, store)


# ---- the papers' formulas: (base, deltas [E], weights [E], settings, statistics [E]) -> merged


def fisher(base, deltas, weights, left, floor):
    up = sum(w * (f + floor) * (base + d) for w, d, f in zip(weights, deltas, left, strict=True))
    return up / sum(w * (f + floor) for w, f in zip(weights, left, strict=True))


def uncertainty(base, deltas, weights, left, prior):
    whole = prior + sum(w * f for w, f in zip(weights, left, strict=True))
    return base + sum(w * (prior + f) * d for w, d, f in zip(weights, deltas, left, strict=True)) / whole


def sce(base, deltas, weights, density=1.0):
    deltas = np.stack(deltas)
    if density < 1:
        variance = deltas.var(0)
        cut = np.sort(variance.ravel())[::-1][int(density * variance.size) - 1]
        kept = np.where(variance >= cut, deltas, 0.0)
    else:
        kept = deltas
    energy = np.array([w * (d**2).sum() for w, d in zip(weights, kept, strict=True)]).reshape(-1, *[1] * base.ndim)
    agrees = np.sign(kept) == np.where(deltas.sum(0) >= 0, 1, -1)
    share = (agrees * energy).sum(0)
    return base + np.where(share > 0, (agrees * energy * kept).sum(0) / np.where(share > 0, share, 1), 0)


def model_stock(base, deltas):
    """The paper's, for N experts of equal weight: t = N cos / (1 + (N - 1) cos)."""
    count = len(deltas)
    cosines = [
        (deltas[i] * deltas[j]).sum() / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j]) for i in range(count) for j in range(i)
    ]
    cosine = np.mean(cosines)
    share = count * cosine / (1 + (count - 1) * cosine)
    return base + share * np.mean(deltas, 0)


def slerp(first, second, share):
    cosine = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
    angle = np.arccos(cosine)
    return (np.sin((1 - share) * angle) * first + np.sin(share * angle) * second) / np.sin(angle)


def multislerp(deltas, weights):
    share = np.array(weights) / sum(weights)
    mean = sum(s * d / np.linalg.norm(d) for s, d in zip(share, deltas, strict=True))
    return mean / np.linalg.norm(mean) * sum(s * np.linalg.norm(d) for s, d in zip(share, deltas, strict=True))


def karcher(points, weights, steps=50):
    """Logarithm and exponential maps with the vectors themselves, to convergence."""
    share = np.array(weights) / sum(weights)
    units = [p / np.linalg.norm(p) for p in points]
    mean = sum(s * u for s, u in zip(share, units, strict=True))
    mean /= np.linalg.norm(mean)
    for _ in range(steps):
        step = 0
        for s, u in zip(share, units, strict=True):
            tangent = u - (u * mean).sum() * mean
            length = np.linalg.norm(tangent)
            step = step + s * np.arctan2(length, (u * mean).sum()) * (tangent / length if length else tangent)
        size = np.linalg.norm(step)
        if size < 1e-15:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean /= np.linalg.norm(mean)
    return mean * sum(s * np.linalg.norm(p) for s, p in zip(share, points, strict=True))


def least_squares(base, deltas, weights, grams):
    """argmin over W of sum w tr((W - W_i) G_i (W - W_i)ᵀ), by its normal equations over whole weights."""
    left = sum(w * g for w, g in zip(weights, grams, strict=True))
    right = sum(w * g @ (base + d).T for w, d, g in zip(weights, deltas, grams, strict=True))
    return np.linalg.solve(left, right).T


def iso_c(base, deltas, weights, scale):
    u, s, v = np.linalg.svd(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    rank = min(base.shape)
    return base + scale * s.mean() * u[:, :rank] @ v[:rank]


def tsv(base, deltas, weights, scale):
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    keep = int(min(base.shape) / len(deltas))
    u = np.concatenate([part[0][:, :keep] for part in parts], 1)
    v = np.concatenate([part[2][:keep] for part in parts])
    s = np.concatenate([w * part[1][:keep] for w, part in zip(weights, parts, strict=True)])

    def whiten(matrix):  # (M Mᵀ)^-1/2 M or M (Mᵀ M)^-1/2
        value, vector = np.linalg.eigh(matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix)
        root = vector / np.sqrt(value) @ vector.T
        return root @ matrix if matrix.shape[0] <= matrix.shape[1] else matrix @ root

    return base + scale * (whiten(u) * s) @ whiten(v)


def wanted(method, base, deltas, weights, grams, fishers):
    points = [base + d for d in deltas]
    match method:
        case "fisher":
            return fisher(base, deltas, weights, fishers, 1e-6)
        case "uncertainty":
            return uncertainty(base, deltas, weights, fishers, 0.3)
        case "sce":
            return sce(base, deltas, weights)
        case "sce_select":
            return sce(base, deltas, weights, 0.25)
        case "slerp":
            return slerp(points[0], points[1], weights[1] / sum(weights[:2]))
        case "nuslerp":
            return base + slerp(deltas[0], deltas[1], weights[1] / sum(weights[:2]))
        case "multislerp":
            return base + multislerp(deltas, weights)
        case "karcher":
            return karcher(points, weights)
        case "regmean":
            return least_squares(base, deltas, weights, [g * 0.9 + np.diag(np.diag(g)) * 0.1 for g in grams])
        case "wudi":
            return least_squares(base, deltas, weights, [d.T @ d / (d**2).sum() for d in deltas])
        case "iso_c":
            return iso_c(base, deltas, weights, 0.7)
        case "tsv":
            return tsv(base, deltas, weights, 0.7)
    raise AssertionError(method)


SETTINGS = {
    "uncertainty": {"prior": 0.3},
    "sce_select": {"density": 0.25},
    "slerp": {"straight": 1.0},
    "karcher": {"iterations": 100.0, "tolerance": 1e-15},
    "regmean": {"ridge": 0.0},
    "wudi": {"ridge": 0.0},
    "iso_c": {"scale": 0.7},
    "tsv": {"scale": 0.7},
}
FORMULAS = ("fisher", "uncertainty", "sce", "sce_select", "slerp", "nuslerp", "multislerp", "karcher", "regmean", "wudi", "iso_c", "tsv")


@pytest.mark.parametrize("method", FORMULAS)
def test_a_rule_is_its_formula(doubles, method):
    store, seed, experts = doubles
    count = 2 if "slerp" in method and method != "multislerp" else 3
    got, base = merged(doubles, method, count, **SETTINGS.get(method, {})), numbers(seed, store)
    for name in NAMES:
        deltas = [numbers(one, store)[name] - base[name] for one in experts[:count]]
        weights = WEIGHTS[:count]
        if on(RULES[method], name, base[name].shape) is RULES["average"]:
            right = base[name] + sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
        else:
            left = [open_statistics(one.digest, store) for one in experts[:count]]
            right = wanted(method, base[name], deltas, weights, [one.gram(name) for one in left], [one.fisher(name) for one in left])
        assert np.abs(got[name] - right).max() < 1e-12, name


def test_model_stock_of_equal_experts(doubles):
    store, seed, experts = doubles
    (record,) = merge(seed, {one.digest: everywhere(1.0) for one in experts}, [Answer("model_stock", {})], store)
    got, base = numbers(record, store), numbers(seed, store)
    for name in NAMES:
        deltas = [numbers(one, store)[name] - base[name] for one in experts]
        assert np.abs(got[name] - model_stock(base[name], deltas)).max() < 1e-12


def test_della_keeps_by_rank_and_keeps_the_mean(doubles):
    """Numbers of a row are kept with a chance that rises with their rank, and what is kept is made larger by as much."""
    store, seed, experts = doubles
    name, density, epsilon = "model.embed_tokens.weight", 0.5, 0.3
    base = numbers(seed, store)[name]
    delta = numbers(experts[0], store)[name] - base
    rank = np.abs(delta).astype(np.float32).argsort(1).argsort(1)
    chance = density - epsilon + 2 * epsilon * rank / (delta.shape[1] - 1)
    kept = np.zeros_like(delta)
    draws = 16
    members = {experts[0].digest: everywhere(1.0), experts[1].digest: everywhere(0.0)}
    settings = {"density": density, "epsilon": epsilon}
    for record in merge(seed, members, [Answer("della", settings | {"rng_seed": float(draw)}) for draw in range(draws)], store):
        got = numbers(record, store)[name] - base
        there = np.abs(got) > 1e-14
        np.testing.assert_allclose(got[there], (delta / chance)[there], atol=1e-12)
        kept += there
    by_rank = np.array([kept[rank == r].mean() / draws for r in range(delta.shape[1])])
    expected = density - epsilon + 2 * epsilon * np.arange(delta.shape[1]) / (delta.shape[1] - 1)
    assert np.abs(by_rank - expected).max() < 5 * 0.5 / np.sqrt(draws * len(delta))
    assert np.abs(merged(doubles, "della", density=1.0)[name] - merged(doubles, "task_arithmetic")[name]).max() < 1e-12


def test_layers_of_several_merges_in_one(doubles):
    store, seed, experts = doubles
    members = {one.digest: everywhere(1.0) for one in experts}
    one, other = merge(seed, members, [Answer("average", {}), Answer("task_arithmetic", {})], store)
    mixed = assemble({"0": one, "1": other, "outside": one}, store)
    got, first, second = (numbers(record, store) for record in (mixed, one, other))
    assert isinstance(mixed, Merged)
    for name in got:
        assert np.array_equal(got[name], (second if ".1." in name else first)[name])
    assert mixed.layers == {"0": one.digest, "1": other.digest, "outside": one.digest}
