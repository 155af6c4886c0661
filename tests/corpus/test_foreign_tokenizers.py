"""tokenizer.json of others: text does not grow without bound in it, and its patterns end."""

import base64
import json
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_seed, tiny_tokenizer
from tokenizers import Tokenizer

from elmwood.corpus.foreign_tokenizer import GROWTH, _growth, check_tokenizer_file
from elmwood.corpus.tokens import _sentencepiece, load_tokenizer
from elmwood.errors import BadSeed
from elmwood.lm.files import seed_folder, tokenizer
from elmwood.lm.load import import_seed
from elmwood.store import Store

# in use: GPT-2, Llama 3 and Qwen, o200k, DeepSeek, BLOOM, Command R, Kimi, CLIP, Granite
PATTERNS = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+",
    r" ?[^(\s|[.,!?…。,、।۔،])]+",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t)?",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"(?:\r?\n)+(?!\r?\n)",
    r"(?<=[a-z])(?=[A-Z])",
]
ENDLESS = [
    r"(a+)+$", r"(a|a)*b", r"(\w+\s?)*x", r"(.*)*", r"((a{1,9}){1,99})!", r"(a?){40}a{40}", r"(?:a|aa)+$", r"\s*\s*\s*\s*x", r"(a)\1*",
    r"(?<x>a\g<x>?b)", r"a**", r"(?x) (a + )+", r"([a-z]+[0-9]*)+!", r"(?=(a+)+b)", r"(?~ab)", "a" * 5000, 23 * "(" + "a", "[a",
    r"((a|b){16}){16}c", r"(a?){16}(a?){16}b", r"(a{1,16}){16}b", "x)y", r"(a+?)+?b", r"a{1000}{1000}",
]  # fmt: skip


def put(folder, **parts):
    spec = json.loads(tiny_tokenizer().to_str()) | parts
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(kind, steps):
    return {"type": "Sequence", kind: steps}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_in_use_are_read(pattern, tmp_path):
    opened = load_tokenizer(put(tmp_path, pre_tokenizer=sequence("pretokenizers", [split(pattern)])))
    assert opened.encode("two words, 1234 and \n\n more").ids


@pytest.mark.parametrize("pattern", ENDLESS, ids=range(len(ENDLESS)))
def test_patterns_that_may_never_end_are_refused(pattern, tmp_path):
    for parts in (
        {"pre_tokenizer": split(pattern)},
        {"pre_tokenizer": sequence("pretokenizers", [sequence("pretokenizers", [split(pattern)])])},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}},
        {"decoder": sequence("decoders", [{"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}])},
    ):
        with pytest.raises(BadSeed, match="pattern"):
            check_tokenizer_file(put(tmp_path, **parts) / "tokenizer.json")


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
# the library ends the process on some of these, panics on others, and the last ones it opens
FATAL = {
    "pieces of no letters": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "nothing before the text": {"normalizer": sequence("normalizers", [{"type": "Prepend", "prepend": ""}])},
    "precompiled_charsmap is damaged": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "//////////////////8="}},
    "is not a tokenizer": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "CAAAAP///////////////w=="}},
    "continuing_subword_prefix": {"model": BPE | {"continuing_subword_prefix": "##"}},
    "by chance": {"model": BPE | {"dropout": 0.5}},
    "the id 4294967295": {"model": BPE | {"vocab": {"a": 0, "b": 4294967295, "ab": 2}}},
    "200000 added tokens": {"added_tokens": 200_000 * [{"id": 3, "content": "x"}]},
    "cannot encode every text": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}},
    "every text .*unk_id": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["▁", -1.0], ["a", -2.0]], "byte_fallback": False}},
}


@pytest.mark.parametrize("complaint", FATAL)
def test_what_the_library_fails_on_is_refused(complaint, tmp_path):
    with pytest.raises(BadSeed, match=complaint):
        load_tokenizer(put(tmp_path, **FATAL[complaint]))


def test_tokens_that_only_look_like_bytes_are_text():
    assert [_sentencepiece(token) for token in ("<0x0A>", "<0xZZ>", "<0x_1>", "<0x+1>")] == [b"\n", b"<0xZZ>", b"<0x_1>", b"<0x+1>"]


CHARSMAP = base64.b64encode((0).to_bytes(4, "little") + b"short\0" + 500 * b"x" + b"\0").decode()
BOMBS = {
    "doubling": {"normalizer": sequence("normalizers", 40 * [replace("a", "aa")])},
    "one long": {"normalizer": replace("a", 1000 * "a")},
    "an empty pattern": {"normalizer": replace("", 1000 * "a")},
    "something before the text": {"normalizer": sequence("normalizers", [{"type": "Prepend", "prepend": 5000 * "a"}])},
    "sentencepiece's map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
    "the decoder": {"decoder": sequence("decoders", 30 * [replace("a", "aa")])},
    "steps": {"normalizer": sequence("normalizers", 100 * [{"type": "NFKD"}])},
    "tokens": {"post_processor": {"type": "TemplateProcessing", "single": 10**4 * [{"Sequence": {"id": "A", "type_id": 0}}]}},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_text_does_not_grow_without_bound(kind, tmp_path, store):
    plain = tiny_seed(store)
    files = plain.files | {"tokenizer.json": store.put((put(tmp_path, **BOMBS[kind]) / "tokenizer.json").read_bytes())}
    seed = plain.model_copy(update={"files": files})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in (lambda: tokenizer(seed, store), lambda: import_seed(str(seed_folder(seed, store)), Store(tmp_path / "other"))):
        with pytest.raises(BadSeed, match="original model"):
            use()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


STEPS = st.one_of(
    st.builds(replace, st.text("ab", min_size=1, max_size=2), st.text("ab", max_size=5)),
    st.builds(lambda text: {"type": "Prepend", "prepend": text}, st.text("ab", min_size=1, max_size=3)),
    st.just({"type": "Replace", "pattern": {"Regex": "a*"}, "content": "bb"}),
)


@given(st.lists(STEPS, max_size=4), st.text("ab", min_size=1, max_size=30))
def test_what_is_computed_bounds_what_the_library_makes(steps, text):
    spec = json.loads(tiny_tokenizer().to_str()) | {"normalizer": sequence("normalizers", steps)}
    made = Tokenizer.from_str(json.dumps(spec)).normalizer.normalize_str(text)
    factor, added = _growth(steps)
    assert len(made) <= factor * len(text) + added


def test_usual_normalisers_are_within_the_bound():
    usual = [replace("``", '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"}]
    assert _growth(usual)[0] == 1 < GROWTH
