"""What a dishonest member might send instead of an honest adapter. Functions of tensors give tensors of the same names.

A [R, I], B [O, R] of each layer
"""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]
Change = Callable[[NDArray[Any], NDArray[Any]], tuple[NDArray[Any], NDArray[Any]]]


def pairs(tensors: Tensors) -> Iterator[tuple[str, str]]:
    """The names of A and B of each layer."""
    return ((name, name.replace("lora_A", "lora_B")) for name in sorted(tensors) if "lora_A" in name)


def change(tensors: Tensors, how: Change) -> Tensors:
    """Other factors for each layer."""
    made = {}
    for a, b in pairs(tensors):
        made[a], made[b] = (np.ascontiguousarray(part, np.float32) for part in how(tensors[a], tensors[b]))
    return made


def turned(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    """The same delta in another basis."""

    def how(a_RI: Any, b_OR: Any) -> Any:
        mix_RR = rng.standard_normal((len(a_RI), len(a_RI)))
        return np.linalg.solve(mix_RR, a_RI), b_OR @ mix_RR

    return change(tensors, how)


def noisy(tensors: Tensors, share: float, rng: np.random.Generator) -> Tensors:
    """The delta in another basis, with noise of a share of its length in each layer."""

    def how(a_RI: Any, b_OR: Any) -> Any:
        q_RR = np.linalg.qr(rng.standard_normal((len(a_RI), len(a_RI))))[0]
        a_RI, b_OR = q_RR.T @ a_RI, b_OR @ q_RR
        noise_OR = rng.standard_normal(b_OR.shape)
        length = np.linalg.norm(b_OR @ a_RI) / max(np.linalg.norm(noise_OR @ a_RI), 1e-12)
        return a_RI, b_OR + share * length * noise_OR

    return change(tensors, how)


def blend(several: list[Tensors], weights: list[float]) -> Tensors:
    """The best approximation, of the recipe's rank, of a weighted sum of deltas."""
    made: Tensors = {}
    for a, b in pairs(several[0]):
        delta_OI = sum(weight * (one[b] @ one[a]) for one, weight in zip(several, weights, strict=True))
        u, s, v = np.linalg.svd(delta_OI, full_matrices=False)
        rank = len(several[0][a])
        made[a], made[b] = np.ascontiguousarray(v[:rank], np.float32), np.ascontiguousarray(u[:, :rank] * s[:rank], np.float32)
    return made


def random_like(tensors: Tensors, rng: np.random.Generator, times: float = 1.0) -> Tensors:
    """Random factors whose delta has the length of this one's in each layer, times something."""

    def how(a_RI: Any, b_OR: Any) -> Any:
        other_RI, other_OR = rng.standard_normal(a_RI.shape), rng.standard_normal(b_OR.shape)
        return other_RI, other_OR * times * np.linalg.norm(b_OR @ a_RI) / np.linalg.norm(other_OR @ other_RI)

    return change(tensors, how)


def scaled(tensors: Tensors, times: float) -> Tensors:
    return change(tensors, lambda a_RI, b_OR: (a_RI, times * b_OR))


def with_value(tensors: Tensors, value: float) -> Tensors:
    """One number replaced."""
    made = {name: one.copy() for name, one in tensors.items()}
    made[min(made)].flat[0] = value
    return made


def malformed(tensors: Tensors) -> dict[str, bytes]:
    """Files that are no whole safetensors file, or another format under its name."""
    whole = safetensors.numpy.save(tensors, {"format": "pt"})
    size = struct.unpack("<Q", whole[:8])[0]
    said, values = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    first, second = [name for name in said if name != "__metadata__"][:2]

    def header(entries: Any, rest: bytes = values) -> bytes:
        raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        return struct.pack("<Q", len(raw)) + raw + rest

    one = said[first]
    return {
        "cut short": whole[:-5], "bytes behind": whole + b"more", "overlap": header(said | {second: one}),
        "hole": header(said | {second: said[second] | {"data_offsets": [n + 64 for n in said[second]["data_offsets"]]}}),
        "offsets that overflow": header(said | {first: one | {"data_offsets": [0, 2**63]}}),
        "a length that overflows": struct.pack("<Q", 2**63) + b"{}", "2 MB of header": header(json.dumps(said).encode().ljust(2 << 20)),
        "nested metadata": header(said | {"__metadata__": {"a": {"b": "c"}}}),
        "a key twice": header(json.dumps(said).replace(f'"{second}"', f'"{first}"').encode()),
        "rank without end": header(said | {first: one | {"shape": [1] * 100_000}}),
        "many empty tensors": header({str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)}, b""),
        "no object": header(b"[" * 50_000), "pickle": b"\x80\x04\x95" + bytes(64), "zip": b"PK\x03\x04" + bytes(64),
        "GGUF": b"GGUF" + bytes(64), "a name with ../": safetensors.numpy.save({**tensors, "../../x": np.zeros(1, np.float32)}),
        "a chat template": safetensors.numpy.save(tensors, {"format": "pt", "chat_template": "{{ x }}"}),
        "another rank": safetensors.numpy.save({name: np.repeat(one, 2, int("lora_B" in name)) for name, one in tensors.items()}),
    }  # fmt: skip
