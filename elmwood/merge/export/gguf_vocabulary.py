"""A tokenizer.json as the keys of a GGUF file: byte-level BPE (GPT-2 and after), and BPE with byte fallback (sentencepiece's kind).

V rows of the embedding
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from elmwood.corpus.tokens import load_tokenizer
from elmwood.errors import BadInput

CURE = "export it with --format transformers, and convert the folder with llama.cpp's convert_hf_to_gguf.py"

# How text is cut before it is merged: the regular expression of a tokenizer.json -> llama.cpp's name for it.
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}


def write_vocabulary(writer: GGUFWriter, folder: Path, config: Any, begins: bool) -> None:
    """Tokens, types, merges or scores, the name of the pre-tokenizer, special ids. `begins`: a text begins with the separator, which
    is the model's bos, whether or not the tokenizer says so. Raises BadInput for kinds of tokenizer that llama.cpp would read otherwise.
    """
    tokenizer = load_tokenizer(folder)
    spec = json.loads(tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise BadInput(f"{folder}: a {spec['model']['type']} tokenizer is not within reach of this exporter: {CURE}")
    kinds = {part["type"] for part in _parts(spec["pre_tokenizer"])}
    byte_level = "ByteLevel" in kinds
    tokens, types = _tokens(spec, config.vocab_size, byte_level)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(spec, folder))
        writer.add_token_merges(merges)
    elif spec["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_prefix(spec))
    else:
        raise BadInput(f"{folder}: a BPE tokenizer that is neither byte-level nor falls back to bytes is not within reach here: {CURE}")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _special(writer, folder, config, spec["model"].get("unk_token"), tokenizer, begins)


def _parts(one: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence."""
    return [] if one is None else one.get("pretokenizers") or one.get("normalizers") or [one]


def _tokens(spec: dict[str, Any], rows: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """V tokens and their types. Rows of the embedding that no token uses get a name."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, place in spec["model"]["vocab"].items():
        a_byte = not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
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


def _adds_prefix(spec: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalised = any(part["type"] == "Prepend" for part in _parts(spec["normalizer"]))
    return normalised or any(part.get("prepend_scheme") in ("first", "always") for part in _parts(spec["pre_tokenizer"]))


def pre_tokenizer(spec: dict[str, Any], where: Path | str = "") -> str:
    """What llama.cpp calls the way a byte-level tokenizer cuts text. Raises BadInput."""
    parts = _parts(spec["pre_tokenizer"])
    names, level = [part["type"] for part in parts], parts[-1]
    plain = level["type"] == "ByteLevel" and not level["add_prefix_space"]
    found = None
    if plain and names == ["ByteLevel"] and level["use_regex"]:
        found = "gpt-2"
    elif plain and names == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and level["use_regex"]:
        found = "smollm"
    elif plain and names == ["Split", "ByteLevel"] and parts[0]["behavior"] == "Isolated" and not level["use_regex"]:
        found = SPLITS.get(parts[0]["pattern"].get("Regex"))
    normal = {part["type"] for part in _parts(spec["normalizer"])}
    if found is None or normal - {"NFC"}:
        said = " then ".join([*sorted(normal), *names])
        raise BadInput(f"{where}: llama.cpp knows no name for how this tokenizer cuts text ({said}), as far as this exporter knows: {CURE}")
    return found


def _special(writer: GGUFWriter, folder: Path, config: Any, unknown: str | None, tokenizer: Any, begins: bool) -> None:
    """Ids of bos, eos, padding and the unknown token, and whether a text begins with bos."""
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_bytes()) if path.exists() else {}

    def number(name: str) -> int | None:
        token = said.get(name)
        found = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
        if found is None:
            found = getattr(config, f"{name}_id", None)
        return found[0] if isinstance(found, list) else found

    bos = number("bos_token")
    for token, add in ((bos, writer.add_bos_token_id), (number("eos_token"), writer.add_eos_token_id),
                       (number("pad_token"), writer.add_pad_token_id)):  # fmt: skip
        if token is not None:
            add(token)
    if unknown is not None and (place := tokenizer.token_to_id(unknown)) is not None:
        writer.add_unk_token_id(place)
    writer.add_add_bos_token(bos is not None and (begins or tokenizer.encode("a").ids[:1] == [bos]))
    if (template := folder / "chat_template.jinja").exists():
        writer.add_chat_template(template.read_text())
    elif isinstance(said.get("chat_template"), str):
        writer.add_chat_template(said["chat_template"])
