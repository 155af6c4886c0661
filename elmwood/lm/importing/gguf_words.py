"""The vocabulary of a GGUF file as a tokenizer.json: byte-level BPE (GPT-2 and after), BPE with byte fallback (sentencepiece's kind)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from elmwood.errors import BadSeed

CURE = "import the original checkpoint, from which the file was made"
UNKNOWN, CONTROL, USER, UNUSED = 2, 3, 4, 5  # types of tokens
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def _level(regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _level(False)]


# llama.cpp's name for how text is cut before it is merged -> steps of a tokenizer.json
CUTS = {
    "gpt-2": [_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _level(True)],
    "llama-bpe": _split(LLAMA3),
    "qwen2": _split(QWEN2),
}
CUTS |= {"llama3": CUTS["llama-bpe"], "llama-v3": CUTS["llama-bpe"], "gpt2": CUTS["gpt-2"]}


def write_words(path: Path, keys: Mapping[str, Any], folder: Path, config: Any) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises BadSeed for kinds that are not understood."""
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items() if key.startswith("tokenizer.ggml.")}
    kind, tokens = said.get("model"), list(said.get("tokens", ()))
    types = list(said.get("token_type", [1] * len(tokens)))
    if kind == "gpt2":
        spec = _byte_level(path, said, tokens, types)
    elif kind == "llama":
        spec = _sentencepiece(said, tokens, types)
    else:
        raise BadSeed(f"{path}: a tokenizer of kind {kind!r} is not read from GGUF here, only gpt2 and llama (sentencepiece): {CURE}")
    names = {name: said.get(f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    texts = {name: tokens[number] for name, number in names.items() if number is not None and number < len(tokens)}
    spec["added_tokens"] = [
        {"id": number, "content": tokens[number], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": one != USER}
        for number, one in enumerate(types) if one in (UNKNOWN, CONTROL, USER)
    ]  # fmt: skip
    if said.get("add_bos_token", kind == "llama") and "bos" in texts:
        spec["post_processor"] = _begins(texts["bos"], int(said["bos_token_id"]))
    whole = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, **spec}
    Tokenizer.from_str(json.dumps(whole)).save(str(folder / "tokenizer.json"))
    special = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }
    settings |= {special[name]: text for name, text in texts.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    if template := keys.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _begins(token: str, number: int) -> dict[str, Any]:
    steps = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*steps, {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing", "single": steps, "pair": pair,
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }  # fmt: skip


def _byte_level(path: Path, said: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    cut = said.get("pre")
    if cut not in CUTS:
        raise BadSeed(f"{path}: how text is cut before it is merged (tokenizer.ggml.pre {cut!r}) is not understood here: {CURE}")
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": CUTS[cut] is CUTS["llama-bpe"],
        "vocab": {token: number for number, token in enumerate(tokens) if types[number] != UNUSED},
        "merges": [merge.split(" ", 1) for merge in said["merges"]],
    }  # fmt: skip
    steps = CUTS[cut]
    return {
        "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": _level(True) | {"add_prefix_space": True}, "model": model,
    }  # fmt: skip


def _sentencepiece(said: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """llama.cpp joins the two neighbours whose joint token scores highest; a merge of every way to cut a token does the same."""
    scores = said["scores"]
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    plain = [number for number, one in enumerate(types) if one == 1 and len(tokens[number]) > 1]
    merges = []
    for number in sorted(plain, key=lambda number: (-scores[number], number)):
        token = tokens[number]
        merges += [[token[:at], token[at:]] for at in range(1, len(token)) if token[:at] in vocabulary and token[at:] in vocabulary]
    unknown = tokens[said["unknown_token_id"]] if said.get("unknown_token_id") is not None else None
    model = {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocabulary, "merges": merges,
    }  # fmt: skip
    prefix = said.get("add_space_prefix", True)
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    ends: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    ends += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": ends}, "model": model,
    }  # fmt: skip
