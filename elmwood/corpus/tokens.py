"""Train or load a tokenizer, pack documents into one memory map of tokens, cut windows for evaluation.

T tokens of all documents together, D documents; W windows of at most L tokens
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from elmwood.corpus.build import documents, open_work
from elmwood.corpus.foreign_tokenizer import check_tokenizer_file, tokenizer_errors
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, BadSeed
from elmwood.records import Packing, Shard, fingerprint
from elmwood.store import Store

END = "<|endoftext|>"
SMALLEST = 257  # the separator and every byte
PROBE = (
    " ".join(map(chr, range(1, 0x250))) + " the sea\t\r\n\n海 \u0e01 \u0627 \U0001f642 e\u0301 \u200d \ufffd 123"
)  # many kinds of letters
BATCH = 1_000_000  # characters encoded at once, about


class Packed(NamedTuple):
    """All documents as one array of tokens. Each document is the separator and then its text."""

    tokens: np.ndarray  # [T] uint16 or uint32, memory-mapped
    starts: np.ndarray  # [D] int64: document d is tokens[starts[d] : starts[d + 1]]; the last one ends at T
    separator: int


class Windows(NamedTuple):
    """Documents cut into rows for evaluation. Row w scores tokens score_from_W[w] <= l < length_W[w], given all tokens before them."""

    rows_WL: np.ndarray  # int32, padded with the separator
    length_W: np.ndarray  # int64, number of tokens without padding
    score_from_W: np.ndarray  # int64
    document_W: np.ndarray  # int64, index of the document in the packing; windows of one document are consecutive

    @property
    def count_W(self) -> np.ndarray:
        """How many tokens of each window are scored."""
        return self.length_W - self.score_from_W

    @property
    def scored_WL(self) -> np.ndarray:
        """Which tokens of each window are scored."""
        place_L = np.arange(self.rows_WL.shape[1])
        return (place_L >= self.score_from_W[:, None]) & (place_L < self.length_W[:, None])

    def batches(self, some_W: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
        """Some windows in batches of at most so many tokens, padding included; the windows of a batch have their first scored token at the
        same place, and are sorted by length, the longest first."""
        order_W, place = some_W[np.lexsort((-self.length_W[some_W], self.score_from_W[some_W]))], 0
        while place < len(order_W):
            batch = order_W[place : place + max(1, tokens // int(self.length_W[order_W[place]]))]
            batch = batch[self.score_from_W[batch] == self.score_from_W[batch[0]]]
            yield batch
            place += len(batch)

    def documents(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each document and all its tokens [T], the separator first. Windows overlap by the tokens that they do not score."""
        begins = np.flatnonzero(np.diff(self.document_W, prepend=-1))
        for first, last in zip(begins, [*begins[1:], len(self.document_W)], strict=True):
            scored = [self.rows_WL[w, self.score_from_W[w] : self.length_W[w]] for w in range(first, last)]
            yield int(self.document_W[first]), np.concatenate([self.rows_WL[first, :1], *scored])


# ---- tokenizers -------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer.json of a checkpoint folder, without truncation or padding. Raises BadSeed."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadSeed(f"{folder} has no tokenizer.json: save the tokenizer there with save_pretrained of transformers")
    return _read_tokenizer(path)


def _read_tokenizer(path: Path) -> Tokenizer:
    check_tokenizer_file(path)
    with tokenizer_errors(f"{path} is not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    check_encodes(tokenizer, path)
    return tokenizer


def check_encodes(tokenizer: Tokenizer, where: object) -> None:
    """Text of many letters can be encoded: some tokenizers fail on letters that are not in their vocabulary. Raises BadSeed."""
    with tokenizer_errors(f"{where}: the tokenizer cannot encode every text"):
        tokenizer.encode(PROBE, add_special_tokens=False)


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two tokenizer.json files hold one tokenizer, however they spell it (merges as "a b" or as pairs). Raises BadSeed."""
    return one.read_bytes() == other.read_bytes() or _read_tokenizer(one).to_str() == _read_tokenizer(other).to_str()


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can encode any text. Token 0 is the separator `<|endoftext|>`. Raises BadInput."""
    if vocabulary < SMALLEST:
        raise BadInput(f"a byte-level vocabulary needs at least {SMALLEST} tokens, and is {vocabulary}: use 1024 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token id: b"" for special tokens and unused ids.

    The bytes of byte-level BPE tokens (GPT-2, OPT, Llama 3, Qwen) join to the text. Those of sentencepiece-like vocabularies (▁, <0xAB>)
    join to the normalised text, with a space before it if the model adds one. Raises BadSeed for other kinds.
    """
    spec = json.loads(tokenizer.to_str())
    kinds = {name for part in ("pre_tokenizer", "decoder") for name in _types(spec[part])}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    byte_level = "ByteLevel" in kinds
    if not byte_level and not any("▁" in token for token in vocabulary):
        raise BadSeed(
            "the bytes of tokens are known for byte-level and sentencepiece-like tokenizers only, and this is neither: use another seed"
        )
    spelled = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        spelled[number] = _byte_level(token) if byte_level else _sentencepiece(token)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        spelled[number] = b"" if added.special else added.content.encode()
    return spelled


def _types(part: dict | None) -> Iterator[str]:
    """The types of a pre-tokenizer or decoder, and of the parts of a sequence of them."""
    if part:
        yield part["type"]
        for inner in (*part.get("pretokenizers", ()), *part.get("decoders", ())):
            yield from _types(inner)


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2 maps to themselves; the others start at U+0100
_BYTE = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


_AS_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # as sentencepiece spells a byte


def _byte_level(token: str) -> bytes:
    return bytes(_BYTE[letter] for letter in token) if all(letter in _BYTE for letter in token) else token.encode()


def _sentencepiece(token: str) -> bytes:
    if byte := _AS_BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode()


@contextmanager
def special_tokens_as_text(tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    """Encode documents: text that spells a special token, such as `<|endoftext|>`, becomes the tokens of its bytes."""
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        yield tokenizer
    finally:
        tokenizer.encode_special_tokens = before


# ---- packing ----------------------------------------------------------------------------------------------------


def pack(shards: Sequence[Shard], tokenizer: Tokenizer, separator: int, store: Store, progress: Progress = silent) -> Packed:
    """Encode the documents of shards into the store. The same shards are packed once for each tokenizer."""
    spec = tokenizer.to_str().encode()
    key = fingerprint("pack-2", [shard.blob for shard in shards], spec.decode(), separator)
    if not (done := store.done(key)):
        with open_work(store, key, progress) as work:
            if not (done := store.done(key)):
                packing = _pack(shards, tokenizer, separator, work, store, progress)
                store.finish(key, packing)
                done = packing.digest
    return _open(store.load(done, Packing), store)


def _pack(shards: Sequence[Shard], tokenizer: Tokenizer, separator: int, work: Path, store: Store, progress: Progress) -> Packing:
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    dtype = np.dtype("<u2" if max(*ids, separator) < 1 << 16 else "<u4")
    starts: list[int] = []
    count = done = 0
    total = sum(shard.bytes for shard in shards)
    with (work / "tokens").open("wb") as file:
        for texts in _batches(document.text for document in documents(shards, store)):
            with special_tokens_as_text(tokenizer), tokenizer_errors("the tokenizer cannot encode a document"):
                encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for encoding in encoded:
                tokens = np.array([separator, *encoding.ids], dtype)
                starts.append(count)
                count += len(tokens)
                file.write(tokens.tobytes())
            done += sum(len(text.encode()) for text in texts)
            progress("tokenise", done, total, "bytes")
    return Packing(
        shards=tuple(shard.blob for shard in shards),
        tokenizer=store.put(tokenizer.to_str().encode()),
        separator=separator,
        tokens=(store.put(work / "tokens"),) if count else (),
        starts=(store.put(np.array(starts, "<i8").tobytes()),) if count else (),
        dtype=dtype.str,
        count=count,
    )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of about BATCH characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open(packing: Packing, store: Store) -> Packed:
    if not packing.count:
        return Packed(np.empty(0, packing.dtype), np.empty(0, "<i8"), packing.separator)
    tokens = np.memmap(store.get(packing.tokens[0]), packing.dtype, "r")
    return Packed(tokens, np.fromfile(store.get(packing.starts[0]), "<i8"), packing.separator)


# ---- windows ----------------------------------------------------------------------------------------------------


def windows(packed: Packed, length: int, carry: int = 0) -> Windows:
    """Cut documents into windows of `length` tokens. Every token except the separators is scored exactly once.

    The first token of a row is not scored. Windows of one document overlap by max(1, carry) tokens, so from the second window on,
    every scored token has at least that many before it. Raises BadInput.
    """
    overlap = max(1, carry)
    if not overlap < length:
        raise BadInput(
            f"a window must be longer than the {overlap} tokens it shares with the previous one, and is {length}: reduce the overlap"
        )
    size_D = np.diff(packed.starts, append=len(packed.tokens))
    stride = length - overlap
    count_D = np.where(size_D > 1, 1 + np.maximum(0, -(-(size_D - length) // stride)), 0)
    document_W = np.repeat(np.arange(len(size_D)), count_D)
    nth_W = np.arange(len(document_W)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
    start_W = packed.starts[document_W] + nth_W * stride
    length_W = np.minimum(length, (packed.starts + size_D)[document_W] - start_W)
    rows_WL = np.full((len(document_W), length), packed.separator, np.int32)
    for row, start, size in zip(rows_WL, start_W, length_W, strict=True):
        row[:size] = packed.tokens[start : start + size]
    return Windows(rows_WL, length_W, np.where(nth_W == 0, 1, overlap), document_W)
