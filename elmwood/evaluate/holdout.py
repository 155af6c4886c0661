"""Held-out documents as the models see them: windows of tokens, each token scored once.

D documents, W windows of at most L tokens, N scored tokens, K domains, B blocks of about 2 KiB
"""

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer

from elmwood.corpus.build import documents
from elmwood.corpus.tokens import Packed, Windows, pack, token_bytes, windows
from elmwood.domains import embed
from elmwood.domains.distances import token_distances
from elmwood.domains.partition import centroids
from elmwood.engine import Progress, each, silent
from elmwood.errors import BadInput
from elmwood.lm.files import tokenizer as load_tokenizer
from elmwood.records import Corpus, Digest, Frozen, Partition, Seed, fingerprint
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

FEWEST = 4  # documents: two on each half, so that each has a standard error
BLOCK = 2048  # bytes of UTF-8 text
AUDIT = 0.2  # of the documents that report: kept for rare, final checks
TUNE, GATE, AUDITED = 0, 1, 2  # splits


class HoldoutSpec(Frozen):
    """Which held-out text, and how it is cut."""

    partition: Digest
    seed: Digest  # whose tokenizer
    length: int = Field(256, gt=1)  # tokens per window
    carry: int | None = Field(None, ge=0)  # context given again at the start of a later window; None: a quarter of the length
    documents: int | None = Field(None, ge=FEWEST)  # at most so many, chosen by hash; None: all

    @property
    def carried(self) -> int:
        return self.length // 4 if self.carry is None else self.carry

    @property
    def protocol(self) -> str:
        """The rules that every scorer must follow. Documents begin with the separator, which is given and not scored."""
        return f"windows-v1:length={self.length},carry={self.carried}"


class Holdout(NamedTuple):
    """Documents in order of id, so that all partitions of a corpus share their columns. Scored tokens in order of reading."""

    name: str  # "holdout-" + fingerprint of tokens and windows
    protocol: str
    windows: Windows
    tokenizer: Tokenizer
    document_N: Ints  # which document each scored token belongs to
    bytes_D: Ints  # of the document's UTF-8 text
    domain_D: Ints  # where the partition put the whole document
    tune_D: Bools  # the half that settings are chosen on; the other is for reporting
    block_N: Ints  # which block each scored token belongs to, int64
    block_bytes_B: Ints  # of the text of its tokens, int64; they sum to those of the documents
    block_domain_B: Ints  # every block is text of one domain
    split_B: Ints  # TUNE, or one of the two parts of the other half: GATE, for decisions, and AUDITED

    @property
    def scored_WL(self) -> Bools:
        """Which tokens of each window are scored; read row by row they are the N of every column."""
        return self.windows.scored_WL

    @property
    def count_W(self) -> Ints:
        """How many tokens of each window are scored. A column has them window by window."""
        return self.windows.count_W

    @property
    def window_N(self) -> Ints:
        """Which window each scored token is in."""
        return np.repeat(np.arange(len(self.count_W)), self.count_W)

    @property
    def tune_N(self) -> Bools:
        return self.tune_D[self.document_N]


def open_holdout(spec: HoldoutSpec, store: Store, progress: Progress = silent) -> Holdout:
    """The holdout of a partition in the tokens of a seed. Raises BadInput when it is too small to halve."""
    partition, seed = store.load(spec.partition, Partition), store.load(spec.seed, Seed)
    corpus, tokenizer = store.load(partition.corpus, Corpus), load_tokenizer(seed, store)
    packed = pack(corpus.holdout, tokenizer, seed.separator, store, progress)
    read = [(document.id, len(document.text.encode())) for document in documents(corpus.holdout, store)]
    home = {document.id: k for k, domain in enumerate(partition.domains) for document in documents(domain.holdout, store)}
    size_D = np.diff(packed.starts, append=len(packed.tokens))
    order = [place for place in np.argsort([name for name, _ in read], kind="stable") if size_D[place] > 1 and read[place][0] in home]
    if len(order) < FEWEST:
        raise BadInput(
            f"a comparison needs {FEWEST} held-out documents, two to tune on and two to report on, and there are {len(order)}: "
            "add documents, or hold out a larger share"
        )
    if spec.documents is not None and len(order) > spec.documents:
        cut = sorted(chance(read[place][0], "sample") for place in order)[spec.documents - 1]
        order = [place for place in order if chance(read[place][0], "sample") <= cut]
    ids = [read[place][0] for place in order]
    packed = _choose(packed, order)
    cut_W = windows(packed, spec.length, spec.carried)
    document_N = np.repeat(cut_W.document_W, cut_W.length_W - cut_W.score_from_W)
    bytes_D, domain_D = np.array([read[place][1] for place in order]), np.array([home[name] for name in ids])
    tune_D = halve(np.array([chance(name, "half") for name in ids]))
    split_D = np.where(tune_D, TUNE, choose_audited(np.array([chance(name, "audit") for name in ids]), ~tune_D))
    end_N = ends(packed, bytes_D, tokenizer)
    return Holdout(
        name="holdout-" + _fingerprint(packed, spec),
        protocol=spec.protocol,
        windows=cut_W,
        tokenizer=tokenizer,
        document_N=document_N,
        bytes_D=bytes_D,
        domain_D=domain_D,
        tune_D=tune_D,
        **blocks(document_N, end_N, bytes_D, domain_D, split_D)._asdict(),
    )


def chance(name: str, salt: str) -> float:
    """A number in [0, 1) that depends on a document's id alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8], "big") / 2**64


def halve(chance_D: Floats) -> Bools:
    """The tune half: documents whose chance is below one half, but at least two on each side."""
    count = int(np.clip((chance_D < 0.5).sum(), 2, len(chance_D) - 2))
    tune_D = np.zeros(len(chance_D), bool)
    tune_D[np.argsort(chance_D, kind="stable")[:count]] = True
    return tune_D


def choose_audited(chance_D: Floats, test_D: Bools) -> Ints:
    """AUDITED for the documents outside the tune half with the smallest chance, about AUDIT of them, at least one; GATE for others."""
    test = np.flatnonzero(test_D)
    count = int(np.clip((chance_D[test] < AUDIT).sum(), 1, len(test) - 1))
    split_D = np.full(len(chance_D), GATE)
    split_D[test[np.argsort(chance_D[test], kind="stable")[:count]]] = AUDITED
    return split_D


def ends(packed: Packed, bytes_D: Ints, tokenizer: Tokenizer) -> Ints:
    """Where each scored token ends in its document's UTF-8 text [N] int64: exactly for byte-level tokenizers, in proportion for
    those that normalise the text first."""
    spelled = token_bytes(tokenizer)
    length_V = np.zeros(max(len(spelled), int(packed.tokens.max()) + 1), np.int64)
    length_V[: len(spelled)] = [len(piece) for piece in spelled]
    length_T = length_V[packed.tokens]
    length_T[packed.starts] = 0  # separators are given
    size_D = np.diff(packed.starts, append=len(packed.tokens))
    sum_T = np.cumsum(length_T)
    total_D = np.add.reduceat(length_T, packed.starts)
    end_T = sum_T - np.repeat(sum_T[packed.starts], size_D)
    end_T = np.rint(end_T * np.repeat(bytes_D / np.maximum(total_D, 1), size_D)).astype(np.int64)
    last_D = packed.starts + size_D - 1
    end_T[last_D] = bytes_D
    return np.delete(end_T, packed.starts)


class Blocks(NamedTuple):
    """See Holdout."""

    block_N: Ints
    block_bytes_B: Ints
    block_domain_B: Ints
    split_B: Ints


def blocks(document_N: Ints, end_N: Ints, bytes_D: Ints, domain_D: Ints, split_D: Ints) -> Blocks:
    """Cut the text of each split and domain, its documents joined, into equal blocks of about BLOCK bytes.

    A token belongs to the block it begins in. So a block has one split and one domain, and another domain's documents do not move it.
    `end_N`: where each token ends in its document, bytes.
    """
    group_D = split_D * (domain_D.max() + 1) + domain_D
    order_D = np.argsort(group_D, kind="stable")
    _, place_D, group_D = np.unique(group_D, return_index=True, return_inverse=True)
    total_G = np.bincount(group_D, bytes_D).astype(np.int64)
    count_G = np.maximum(1, np.rint(total_G / BLOCK).astype(np.int64))
    offset_D = np.empty(len(bytes_D), np.int64)  # where the document begins in its group
    offset_D[order_D] = np.cumsum(bytes_D[order_D]) - bytes_D[order_D]
    offset_D -= (np.cumsum(total_G) - total_G)[group_D]
    first_N = np.diff(document_N, prepend=-1) > 0
    size_N = np.where(first_N, end_N, np.diff(end_N, prepend=0))
    begin_N = offset_D[document_N] + end_N - size_N
    group_N = group_D[document_N]
    nth_N = np.minimum(begin_N * count_G[group_N] // np.maximum(total_G[group_N], 1), count_G[group_N] - 1)
    number_N = (np.cumsum(count_G) - count_G)[group_N] + nth_N
    met, block_N = np.unique(number_N, return_inverse=True)  # a token longer than a block leaves one empty
    group_B = np.repeat(np.arange(len(count_G)), count_G)[met]
    return Blocks(
        block_N.astype(np.int64),
        np.bincount(block_N, size_N).astype(np.int64),
        domain_D[place_D][group_B],
        split_D[place_D][group_B],
    )


def distances(
    holdout: Holdout, partition: Partition, store: Store, progress: Progress = silent, *, signal: str = "dense"
) -> Floats:  # fmt: skip
    """Squared distances of the whole document so far to the partition's centroids, as a live router sees them [N, K] float32.

    `signal` is what the router looks at, "dense" or "sparse". Raises BadInput.
    """
    fitted, spelled = embed.load(partition.embedder, store), token_bytes(holdout.tokenizer)
    centroid_KD = centroids(partition, store, signal)
    parts = [np.zeros((0, len(centroid_KD)), np.float32)]
    total = len(np.unique(holdout.windows.document_W))
    for _, tokens_T in each(holdout.windows.documents(), "route", total, "documents", progress):
        parts.append(token_distances(fitted, centroid_KD, tokens_T, spelled)[1:])
    return np.concatenate(parts)


def _choose(packed: Packed, order: list[int]) -> Packed:
    """Some documents of a packing, in this order."""
    end_D = np.append(packed.starts[1:], len(packed.tokens))
    parts = [packed.tokens[packed.starts[place] : end_D[place]] for place in order]
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    return Packed(np.concatenate(parts), starts, packed.separator)


def _fingerprint(packed: Packed, spec: HoldoutSpec) -> str:
    tokens = hashlib.sha256(packed.tokens.astype("<u4").tobytes()).hexdigest()
    starts = hashlib.sha256(packed.starts.astype("<i8").tobytes()).hexdigest()
    return fingerprint(tokens, starts, packed.separator, spec.protocol)
