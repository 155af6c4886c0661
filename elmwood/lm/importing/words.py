"""The tokenizer of a model made elsewhere."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from elmwood.corpus.tokens import check_encodes, token_bytes
from elmwood.errors import BadSeed
from elmwood.lm.pretrained import open_tokenizer

Starts = tuple[int | None, int | None]


def read_tokenizer(folder: Path) -> tuple[Tokenizer, Starts]:
    """The fast tokenizer, and the ids of its bos and eos. Raises BadSeed."""
    found: Any = open_tokenizer(folder)
    return found.backend_tokenizer, (found.bos_token_id, found.eos_token_id)


def choose_separator(wanted: int | str | None, tokenizer: Tokenizer, starts: Starts, folder: Path) -> int:
    """The id of the token before each document: the one named, else "<|endoftext|>", bos or eos. Raises BadSeed."""
    if isinstance(wanted, int):
        return wanted
    if wanted is None:
        found = next((one for one in (tokenizer.token_to_id("<|endoftext|>"), *starts) if one is not None), None)
        if found is None:
            raise BadSeed(f"{folder}: the tokenizer has no <|endoftext|>, bos or eos to separate documents: name a token with --separator")
        return found
    found = tokenizer.token_to_id(wanted)
    if found is None and not (wanted.isascii() and wanted.isdecimal()):
        raise BadSeed(f"{folder}: the tokenizer has no token {wanted!r}: name one of its vocabulary, or its id")
    return int(wanted) if found is None else found


def check_tokenizer(tokenizer: Tokenizer, config: Any, separator: int, where: object) -> None:
    """Every token id that a text can yield must have a row in the embedding. Raises BadSeed.

    Special tokens are no text: a document that spells one yields its bytes. So one without a row (Gemma 3 as published) does no harm.
    """
    rows = config.get_text_config().vocab_size
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    largest = max((number for number in tokenizer.get_vocab(with_added_tokens=True).values() if number not in special), default=-1)
    if largest >= rows:
        raise BadSeed(
            f"{where}: the tokenizer has ids up to {largest}, the embedding only {rows} rows: "
            "use the tokenizer of this checkpoint, or resize its embedding first"
        )
    if not 0 <= separator < rows:
        raise BadSeed(f"{where}: the separator {separator} is not a token id below {rows}: choose one that is")


def check_spelling(tokenizer: Tokenizer, where: object) -> None:
    """Scores in bits per byte and generated text need the bytes of every token. Raises BadSeed."""
    check_encodes(tokenizer, where)
    try:
        token_bytes(tokenizer)
    except BadSeed as error:
        raise BadSeed(f"{where}: {error}") from error
