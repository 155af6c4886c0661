"""Bytes and JSON changed at random, as damage and malice change them. The same random numbers make the same change."""

import json
import re
from collections.abc import Iterator
from random import Random
from typing import Any

SECRET = "../../outside/secret"  # a file that nothing may open
ODD = [
    '"\\ud800"', "1e999", "-1e308", "NaN", "Infinity", "-1", "0", "2.0", "true", "null", "[]", "{}", '""', "99999999999999999999",
    "1" * 5000,
    "[" * 5000, '{"a":' * 3000, '{"a":1,"a":2}', '"F64"', "9007199254740993", "[null]", '"' + "x" * 20_000 + '"', json.dumps(SECRET),
    '"/etc/passwd"', '"sha256:' + "0" * 64 + '"', '"' + "0" * 64 + '"', '"\\u0000"', '"[/x]\\u001b[2J"', '"(a+)+$"', '"os:system"',
    '"file:///etc/passwd"', "4294967296", "1e-320",
]  # fmt: skip

ODD_YAML = [
    "!!float x", "!!int x", "!!bool x", "!!timestamp x", "!!binary x", "!!python/name:os.system", "2020-99-99", "0x" + "f" * 5000,
    "190:20:30", "&a [*a]", "&a {b: *a}", "*a", "<<: 1", "? [a]", "- - - -", "|", ">", "%TAG", "---", "yes", "~", ".nan", "-.inf",
]  # fmt: skip


def places_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths to all values within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places_of(one, (*path, key))


def replace(value: Any, path: tuple, by: Any) -> Any:
    """The value with another one at this path."""
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replace(value[path[0]], path[1:], by)
    return copy


def at(value: Any, path: tuple) -> Any:
    """The value at this path."""
    for key in path:
        value = value[key]
    return value


def change_json(value: Any, rng: Random) -> bytes:
    """JSON with one or two values replaced: by an odd one, by another of the same JSON, or removed, or with a key more."""
    odd = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        paths = list(places_of(value))
        path, kind = rng.choice(paths), rng.random()
        here = at(value, path)
        if kind < 0.6:
            odd.append(rng.choice(ODD))
            value = replace(value, path, f"MARK{len(odd) - 1}KRAM")
        elif kind < 0.8:
            value = replace(value, path, at(value, rng.choice(paths)))
        elif isinstance(here, dict) and here:
            gone = rng.choice(sorted(here))
            value = replace(value, path, {key: one for key, one in here.items() if key != gone})
        elif isinstance(here, list) and here:
            value = replace(value, path, here * rng.choice((0, 2, 50)))
        elif isinstance(here, int | float):
            value = replace(value, path, rng.choice((here + 1, -here, here * 10**9, here + 0.5)))
        else:
            value = replace(value, path, {"more": here})
    text = json.dumps(value)
    for number, one in enumerate(odd):
        text = text.replace(f'"MARK{number}KRAM"', one)
    return text.encode(errors="surrogatepass")


def change_bytes(raw: bytes, rng: Random) -> bytes:
    """Bytes flipped, removed, added, repeated or cut off."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, kind = rng.randrange(len(data) + 1), rng.randrange(7)
        end = min(len(data), place + rng.choice((1, 2, 8, 64)))
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data[place:end] = b""
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.choice((1, 4, 32)))
        elif kind == 3:
            data[place:place] = data[place:end] * rng.choice((1, 100))
        elif kind == 4:
            data[place:end] = bytes(end - place)
        elif place < len(data):
            data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def change_yaml(raw: bytes, rng: Random) -> bytes:
    """YAML with one or two of its words replaced by odd ones."""
    words = list(re.finditer(rb"[\w.*]+", raw))
    for word in sorted(rng.sample(words, min(len(words), rng.choice((1, 1, 2)))), key=lambda word: -word.start()):
        raw = raw[: word.start()] + rng.choice([*ODD, *ODD_YAML]).encode() + raw[word.end() :]
    return raw


def change_safetensors(raw: bytes, rng: Random) -> bytes:
    """A safetensors file with another header, whose length fits, or with any bytes changed."""
    length = int.from_bytes(raw[:8], "little")
    try:
        header = change_json(json.loads(raw[8 : 8 + length]), rng)
    except ValueError:
        return change_bytes(raw, rng)
    values = raw[8 + length :]
    return len(header).to_bytes(8, "little") + header + (values if rng.random() < 0.8 else change_bytes(values, rng))


def change(raw: bytes, rng: Random, name: str = "") -> bytes:
    """The content of a file of this name, changed as its kind allows."""
    if name.endswith(".safetensors") and rng.random() < 0.7:
        return change_safetensors(raw, rng)
    if name.endswith(".yaml") and raw and rng.random() < 0.6:
        return change_yaml(raw, rng)
    try:
        value = json.loads(raw) if rng.random() < 0.75 else None
    except (ValueError, RecursionError):
        value = None
    return change_bytes(raw, rng) if value is None else change_json(value, rng)
