"""Vocabularies in GGUF files: llama.cpp cuts text as the tokenizer does, or the tokenizer is refused."""

import json

import pytest
from gguf import GGUFReader, GGUFWriter
from llama_server import Llama
from tiny_merges import SMALL, folder_of
from tiny_models import SHAPE, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig

from elmwood.errors import BadInput
from elmwood.merge.export.gguf import write_gguf
from elmwood.merge.export.gguf_vocabulary import SPLITS, pre_tokenizer, write_vocabulary


def byte_level(*first, use_regex=True):
    made = tiny_tokenizer()
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])
    return json.loads(made.to_str())


def test_how_text_is_cut_has_a_name():
    assert pre_tokenizer(json.loads(tiny_tokenizer().to_str())) == "gpt-2"
    assert pre_tokenizer(byte_level(pre_tokenizers.Digits(individual_digits=True))) == "smollm"
    for pattern, name in SPLITS.items():
        assert pre_tokenizer(byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), use_regex=False)) == name
    for other in (byte_level(pre_tokenizers.Digits()), byte_level(pre_tokenizers.Split(Regex("a"), "isolated"), use_regex=False)):
        with pytest.raises(BadInput, match="no name"):
            pre_tokenizer(other)


def sentencepiece(words):
    """BPE that falls back to bytes, as Llama 2 and Mistral have it."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator([words] * 3, trainers.BpeTrainer(vocab_size=SHAPE.vocabulary, special_tokens=special, show_progress=False))
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [one for one in spec["added_tokens"] if one["id"] < 3]
    return Tokenizer.from_str(json.dumps(spec))


ODD = [
    "the cat sat on the mat", " leading space", "  two lead", "two  spaces   three ", "12345 and 1,234.5%", "tab\tand\nline\n\nend ",
    " \n \n", "\r\nwindows\r\n", "it's we'll I'M THEY'RE don'T", "naïve café 海 猫 🙂 \U0001f469\u200d\U0001f467", "punct!!! ...—“q”",
    "a\u00a0b \u200b\u2028 \u0085y", "e\u0301 ⅷ ² ٣٤ १२", "a\x00b\x1c", "<|endoftext|>after <s>hello</s> there <unk>", "▁already ▁▁x",
    "a <tool> b<tool>", "again and again and again aaaaaaaa",
]  # fmt: skip


def edited(words, **changes):
    """A tokenizer with other parts; those of its model have a name that begins so."""
    spec = json.loads(words.to_str())
    for name, value in changes.items():
        (spec["model"] if name.startswith("model_") else spec)[name.removeprefix("model_")] = value
    return Tokenizer.from_str(json.dumps(spec))


def with_token(words, **flags):
    words.add_tokens([AddedToken("<tool>", **{"special": False, "normalized": False} | flags)])
    return words


def cut_by(*first, use_regex=True):
    return Tokenizer.from_str(json.dumps(byte_level(*first, use_regex=use_regex)))


def metaspace(scheme, split=False):
    return {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}}


def around(before=(), after=()):
    steps = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before] + [{"Sequence": {"id": "A", "type_id": 0}}]
    steps += [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    known = {token: {"id": token, "ids": [place], "tokens": [token]} for place, token in enumerate(("<unk>", "<s>", "</s>"))}
    return {"post_processor": {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": known}}


SPOKEN = "the cat sat on the mat and sailed over the sea again and again"
KEPT = {
    "gpt-2": tiny_tokenizer,
    "digits": lambda: cut_by(pre_tokenizers.Digits(individual_digits=True)),
    **{name: lambda p=pattern: cut_by(pre_tokenizers.Split(Regex(p), "isolated"), use_regex=False) for pattern, name in SPLITS.items()},
    "merges ignored": lambda: edited(tiny_tokenizer(), model_ignore_merges=True),
    "added": lambda: with_token(tiny_tokenizer()),
    "byte fallback": lambda: sentencepiece(SPOKEN),
    "byte fallback, added": lambda: with_token(sentencepiece(SPOKEN)),
    "byte fallback, no space before": lambda: edited(sentencepiece(SPOKEN), **metaspace("never")),
    "byte fallback, bos and eos": lambda: edited(sentencepiece(SPOKEN), **around(["<s>"], ["</s>"])),
}


@pytest.mark.parametrize("name", KEPT)
def test_llama_cpp_cuts_odd_text_as_the_tokenizer_does(name, tmp_path):
    words = KEPT[name]()
    spoken = {"bos_token_id": 1, "eos_token_id": 2} if "fallback" in name else {}
    folder = folder_of(LlamaConfig(**SMALL | spoken | {"vocab_size": words.get_vocab_size()}), tmp_path)
    words.save(str(folder / "tokenizer.json"))
    write_gguf(folder, folder / "model.gguf", name="tiny")
    theirs = Llama(folder / "model.gguf")
    for text in ODD:
        assert theirs.tokenize(text, special=True) == words.encode(text, add_special_tokens=False).ids, text
    assert theirs.tokenize("a cat", begins=True) == words.encode("a cat").ids


LOST = {
    "Unigram": lambda: Tokenizer(models.Unigram([("<unk>", -9.0), ("a", 0.0), ("b", -1.0)], 0)),
    "WordPiece": lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1})),
    "WordLevel": lambda: Tokenizer(models.WordLevel({"a": 0})),
    "dropout": lambda: edited(tiny_tokenizer(), model_dropout=0.5),
    "end_of_word_suffix": lambda: edited(tiny_tokenizer(), model_end_of_word_suffix="</w>"),
    "lstrip": lambda: with_token(tiny_tokenizer(), lstrip=True),
    "single_word": lambda: with_token(tiny_tokenizer(), single_word=True),
    "normalized": lambda: with_token(sentencepiece(SPOKEN), normalized=True),
    "Lowercase": lambda: edited(tiny_tokenizer(), normalizer={"type": "Lowercase"}),
    "Metaspace": lambda: edited(sentencepiece(SPOKEN), **metaspace("first")),
    "as this one does": lambda: edited(sentencepiece(SPOKEN), **metaspace("never", True)),
    "never make its token 'ca'": lambda: edited(sentencepiece(SPOKEN), model_vocab=vocabulary_with("ca")),
    "no token for 1 bytes": lambda: edited(sentencepiece(SPOKEN), model_vocab=vocabulary_with("é", "<0x41>")),
    "before a text": lambda: edited(sentencepiece(SPOKEN), **around(["<s>", "<s>"])),
}


def vocabulary_with(token, place="<0xFF>"):
    found = json.loads(sentencepiece(SPOKEN).to_str())["model"]["vocab"]
    return {name: number for name, number in found.items() if name != place} | {token: found[place]}


@pytest.mark.parametrize("complaint", LOST)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(complaint, tmp_path):
    LOST[complaint]().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match=complaint):
        write_vocabulary(GGUFWriter(tmp_path / "model.gguf", "llama"), tmp_path, LlamaConfig(**SMALL), False)


def test_what_llama_cpp_leaves_out_is_said(tmp_path):
    edited(tiny_tokenizer(), normalizer={"type": "NFC"}).save(str(tmp_path / "tokenizer.json"))
    (note,) = write_vocabulary(GGUFWriter(tmp_path / "model.gguf", "llama"), tmp_path, LlamaConfig(**SMALL), False)
    assert "NFC" in note


def test_the_special_tokens_of_a_file(tmp_path):
    folder = folder_of(LlamaConfig(**SMALL | {"bos_token_id": 1, "eos_token_id": 2}), tmp_path)
    words = sentencepiece(SPOKEN)
    words.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    write_gguf(folder, folder / "model.gguf", name="tiny", begins=True)
    read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    fields = {name.removeprefix("tokenizer.ggml."): one.contents() for name, one in GGUFReader(folder / "model.gguf").fields.items()}
    assert [fields[f"{name}_token_id"] for name in ("bos", "eos", "eot", "unknown")] == [1, 2, 7, 0]
    assert (fields["add_bos_token"], fields["add_eos_token"], fields["token_type"][:4]) == (True, False, [2, 3, 3, 6])
    for text in ("the cat sat", "again — 海 the mat", "sea  over"):
        assert read(text, add_special_tokens=False)["input_ids"] == words.encode(text).ids
