"""A tokenizer.json as the keys of a GGUF file: byte-level BPE (GPT-2 and after), and BPE with byte fallback (sentencepiece's kind).

V rows of the embedding
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from elmwood.corpus.tokens import load_tokenizer
from elmwood.errors import BadInput
from elmwood.lm.importing.gguf_words import LLAMA3, QWEN2

CURE = "export it with --format transformers, and convert the folder with llama.cpp's convert_hf_to_gguf.py"

COMPOSED = "The tokenizer composes letters and accents (NFC) before it cuts a text, and llama.cpp does not: give it text that is composed."
BYTE = re.compile("<0x[0-9A-F]{2}>")
# How text is cut before it is merged: the regular expression of a tokenizer.json -> llama.cpp's name for it.
SPLITS = {LLAMA3: "llama-bpe", QWEN2: "qwen2"}


def write_vocabulary(writer: GGUFWriter, folder: Path, config: Any, begins: bool) -> list[str]:
    """Tokens, types, merges or scores, the name of the pre-tokenizer, special ids. `begins`: a text begins with the separator, which
    is the model's bos, whether or not the tokenizer says so. Returns sentences for the card. Raises BadInput for kinds of tokenizer
    that llama.cpp would read otherwise.
    """
    tokenizer = load_tokenizer(folder)
    spec = json.loads(tokenizer.to_str())
    _check_model(spec, folder)
    byte_level = "ByteLevel" in {part["type"] for part in _parts(spec["pre_tokenizer"])}
    tokens, types = _tokens(spec, config.vocab_size, byte_level)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    if byte_level:
        pre = pre_tokenizer(spec, folder)
        if bool(spec["model"].get("ignore_merges")) != (pre == "llama-bpe"):  # what llama.cpp does where it is called so
            _check_reachable(tokenizer, spec, folder)
        _check_bytes(ByteLevel.alphabet(), spec, folder)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
    elif spec["model"].get("byte_fallback"):
        prefix = adds_prefix(spec, folder)
        _check_reachable(tokenizer, spec, folder)
        _check_bytes([f"<0x{byte:02X}>" for byte in range(256)], spec, folder)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(prefix)
    else:
        raise BadInput(f"{folder}: a BPE tokenizer that is neither byte-level nor falls back to bytes is not within reach here: {CURE}")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _special(writer, folder, config, spec["model"].get("unk_token"), tokenizer, begins)
    return [COMPOSED] if "NFC" in _names(spec["normalizer"]) else []


def _check_model(spec: dict[str, Any], where: Path) -> None:
    """Raises BadInput where llama.cpp has no such thing."""
    model, normalised = spec["model"], bool(_parts(spec["normalizer"])) and not {"NFC"}.issuperset(_names(spec["normalizer"]))
    if model["type"] != "BPE":
        raise BadInput(f"{where}: a {model['type']} tokenizer is not within reach of this exporter: {CURE}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise BadInput(f"{where}: a BPE tokenizer with {name} {model[name]!r} is not within reach of this exporter: {CURE}")
    for added in spec["added_tokens"]:
        flags = ["lstrip", "rstrip", "single_word", *(["normalized"] if normalised else [])]
        if wrong := next((flag for flag in flags if added.get(flag)), None):
            raise BadInput(f"{where}: the added token {added['content']!r} has {wrong}, which llama.cpp would not look at: {CURE}")


def _check_reachable(tokenizer: Tokenizer, spec: dict[str, Any], where: Path) -> None:
    """That every token is what its own text becomes. Otherwise llama.cpp finds it by its text, where the merges do not. Raises BadInput."""
    spec = spec | {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    spec["model"] = spec["model"] | {"ignore_merges": False}
    added, bare = {one["content"] for one in json.loads(tokenizer.to_str())["added_tokens"]}, Tokenizer.from_str(json.dumps(spec))
    for token, number in spec["model"]["vocab"].items():
        if len(token) > 1 and token not in added and not BYTE.fullmatch(token) and bare.encode(token).ids != [number]:
            raise BadInput(f"{where}: the merges of the tokenizer never make its token {token!r}, and llama.cpp would: {CURE}")


def _check_bytes(alphabet: Iterable[str], spec: dict[str, Any], where: Path) -> None:
    """Raises BadInput."""
    if lost := sorted(set(alphabet) - spec["model"]["vocab"].keys()):
        raise BadInput(f"{where}: the tokenizer has no token for {len(lost)} bytes, first {lost[0]!r}, and llama.cpp needs all: {CURE}")


def _parts(one: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence."""
    return [] if one is None else one.get("pretokenizers") or one.get("normalizers") or [one]


def _names(one: dict[str, Any] | None) -> list[str]:
    return [part["type"] for part in _parts(one)]


def _tokens(spec: dict[str, Any], rows: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """V tokens and their types. Rows of the embedding that no token uses get a name."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, place in spec["model"]["vocab"].items():
        a_byte = not byte_level and BYTE.fullmatch(token)
        tokens[place], types[place] = token, int(TokenType.BYTE if a_byte else TokenType.NORMAL)
    for added in spec["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if added["content"] == spec["model"].get("unk_token") and not byte_level:
            kind = TokenType.UNKNOWN
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Sentencepiece joins the pair whose result scores highest: the result of an earlier merge scores higher."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault(pair.replace(" ", ""), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def adds_prefix(spec: dict[str, Any], where: Path | str = "") -> bool:
    """Whether a space is put before a text, whatever it begins with, where a space is written as ▁. Raises BadInput."""
    steps = [{key: value for key, value in part.items() if key != "type"} for part in _parts(spec["normalizer"])]
    space = {"pattern": {"String": " "}, "content": "▁"}
    cut = [{key: part.get(key) for key in ("type", "prepend_scheme", "split")} for part in _parts(spec["pre_tokenizer"])]
    if steps in ([{"prepend": "▁"}, space], [space]) and not cut:
        return len(steps) == 2
    if not steps and cut == [{"type": "Metaspace", "prepend_scheme": "never", "split": False}]:
        return False
    said = " then ".join([*_names(spec["normalizer"]), *_names(spec["pre_tokenizer"])]) or "nothing"
    raise BadInput(f"{where}: llama.cpp does not prepare text for a byte-fallback tokenizer as this one does ({said}): {CURE}")


def pre_tokenizer(spec: dict[str, Any], where: Path | str = "") -> str:
    """What llama.cpp calls the way a byte-level tokenizer cuts text. Raises BadInput."""
    parts = _parts(spec["pre_tokenizer"])
    names, level = _names(spec["pre_tokenizer"]), parts[-1]
    plain = level["type"] == "ByteLevel" and not level["add_prefix_space"]
    found = None
    if plain and names == ["ByteLevel"] and level["use_regex"]:
        found = "gpt-2"
    elif plain and names == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and level["use_regex"]:
        found = "smollm"
    elif plain and names == ["Split", "ByteLevel"] and parts[0]["behavior"] == "Isolated" and not level["use_regex"]:
        found = SPLITS.get(parts[0]["pattern"].get("Regex"))
    normal = set(_names(spec["normalizer"]))
    if found is None or normal - {"NFC"}:
        said = " then ".join([*sorted(normal), *names])
        raise BadInput(f"{where}: llama.cpp knows no name for how this tokenizer cuts text ({said}), as far as this exporter knows: {CURE}")
    return found


def _special(writer: GGUFWriter, folder: Path, config: Any, unknown: str | None, tokenizer: Tokenizer, begins: bool) -> None:
    """Ids of bos, eos, padding and the unknown token, what a text begins and ends with, and the template of a chat. Raises BadInput."""
    said, made = (_settings(folder / name) for name in ("tokenizer_config.json", "generation_config.json"))

    def number(name: str) -> int | None:
        token = said.get(name)
        found = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
        if found is None:
            found = made.get(f"{name}_id", getattr(config, f"{name}_id", None))
        return found[0] if isinstance(found, list) else found

    plain, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    before, after = whole[:at], whole[at + len(plain) :]
    bos, eos = before[0] if before else number("bos_token"), number("eos_token")
    if len(before) > 1 or after not in ([], [eos]):
        raise BadInput(f"{folder}: the tokenizer puts {before} before a text and {after} after it, llama.cpp bos and eos: {CURE}")
    for token, add in ((bos, writer.add_bos_token_id), (eos, writer.add_eos_token_id), (number("pad_token"), writer.add_pad_token_id)):
        if token is not None:
            add(token)
    ends = made.get("eos_token_id", config.eos_token_id)
    others = [token for token in (ends if isinstance(ends, list) else [ends]) if token not in (None, eos)]
    for token, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token)
    if unknown is not None and (place := tokenizer.token_to_id(unknown)) is not None:
        writer.add_unk_token_id(place)
    writer.add_add_bos_token(bos is not None and (begins or bool(before)))
    writer.add_add_eos_token(bool(after))
    if (template := folder / "chat_template.jinja").exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    elif isinstance(said.get("chat_template"), str):
        writer.add_chat_template(said["chat_template"])


def _settings(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
