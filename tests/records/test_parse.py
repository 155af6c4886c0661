"""Records of strangers: each value is read in one way, or the record is refused with the reason."""

import json
import os

import pytest

from elmwood.errors import BadRecord
from elmwood.records import Recipe, Seed, canonical, parse, read_record
from elmwood.records.kinds import LARGEST

SEED = Seed(
    name="s", architecture="LlamaForCausalLM", parameters=3, vocabulary=8, context=4, separator=0, files={"a": "sha256:" + "0" * 64},
    recipe=Recipe(steps=3, learning_rate=1e-4),
)  # fmt: skip
GOOD = canonical(SEED)


def with_field(name: str, text: str) -> bytes:
    """The record with the JSON text of a value in place of one of its own."""
    marked = json.dumps(json.loads(GOOD) | {name: "MARK"})
    return marked.replace('"MARK"', text).encode()


BAD = {
    "a key twice": (GOOD[:-1] + b',"kind":"seed"}', "twice"),
    "a key twice within": (with_field("recipe", '{"steps": 3, "steps": 4}'), "twice"),
    "a format of 1.0": (with_field("format", "1.0"), "format"),
    "a format of true": (with_field("format", "true"), "format"),
    "a format of text": (with_field("format", '"9"'), "format"),
    "a format of 0": (with_field("format", "0"), "format"),
    "a kind of a list": (with_field("kind", "[]"), "kind"),
    "a kind of null": (with_field("kind", "null"), "kind"),
    "NaN": (with_field("recipe", '{"steps": 3, "learning_rate": NaN}'), "NaN"),
    "Infinity": (with_field("recipe", '{"steps": 3, "learning_rate": Infinity}'), "Infinity"),
    "too large a float": (with_field("recipe", '{"steps": 3, "learning_rate": 1e999}'), "too large"),
    "too large a whole number": (with_field("parameters", "1" + "0" * 400), "too large"),
    "a number as text": (with_field("recipe", '{"steps": 3, "learning_rate": "nan"}'), "learning_rate"),
    "deep": (with_field("files", "[" * 200_000 + "]" * 200_000), "deep"),
    "deep objects": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "deep"),
    "a list": (b"[]", "not a record"),
    "a text": (b'"seed"', "not a record"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not a record"),
    "half a pair": (with_field("name", '"\\ud800"'), "surrogates"),
    "a key of escapes": (with_field("name", '"s", "\\u001b[31m": 1'), r"\\x1b"),
    "a context of 0": (with_field("context", "0"), "context"),
    "a separator of -1": (with_field("separator", "-1"), "separator"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_can_be_read_in_two_ways_is_refused(kind):
    data, reason = BAD[kind]
    with pytest.raises(BadRecord, match=reason) as caught:
        parse(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_valid_record_keeps_its_digest():
    assert parse(GOOD) == SEED
    assert parse(GOOD).digest == SEED.digest


def test_a_record_from_elsewhere_has_the_digest_it_is_stored_under(tmp_path):
    path = tmp_path / "elmwood.json"
    path.write_text(json.dumps(json.loads(GOOD) | {"licence": None}, indent=2))
    assert parse(path.read_bytes()).digest != SEED.digest
    assert read_record(path).digest == SEED.digest


def test_what_is_no_record_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("{")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGEST + 1)
    for name in ("fifo", "link", "folder", "text", "large", "absent"):
        with pytest.raises(BadRecord, match=name):
            read_record(tmp_path / name)
