"""Text -> unit vectors, by a neural model: the seed's hidden states, or a sentence embedder.

Shapes: N documents, H numbers of the model, D dimensions, W steps of one text (tokens, or runs of words).

Hidden states of a language model point mostly one way, so their mean over a sample is taken off and the rest is turned
to its D main directions. Torch stays outside: what embeds is a function. Opening a saved embedder opens its model again:
a sentence embedder's files are in the store, and go where the embedder goes; a seed is opened by a function of `lm`.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from elmwood.domains.words import spans
from elmwood.engine import Progress, silent
from elmwood.errors import BadCorpus, BadInput, BadRecord
from elmwood.records import Embedder, Files
from elmwood.registry import require
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

# "sentence": texts -> x_NH, one row a text.
# "seed": texts -> for each, (state_WH, end_W): a vector for each token, and the characters of the text up to its end.
Encode = Callable[[Sequence[str]], Any]
# The name of a model and the store that has it -> its function. Of a module's top, so that it can be sent to other processes.
Open = Callable[[str, Store], Encode]


class Model(NamedTuple):
    """The neural model of an embedder: a name to know it again by (the digest of a seed, or of a list of files), and the function."""

    name: str
    encode: Encode


DENSE = {
    "seed": "mean hidden state of the seed LM",
    "sentence": "any sentence embedder, such as arXiv:1908.10084",
}
SAMPLE = 4096  # documents the directions are fitted on: the first of a corpus, which stand in no special order
BATCH = 64  # texts given to the model at once
MODEL, LISTED = "model/", "model.json"  # where a sentence embedder's files, and the list of them, stand among an embedder's
STRIDE = 32  # words after which a sentence model looks again at a text that grows
PLAIN = {".safetensors", ".json", ".txt"}  # files of a sentence embedder that are kept, and opened: data, no code, nothing pickled


@dataclass(frozen=True, eq=False)
class Dense:
    """A fitted neural embedder."""

    name: str
    model: Model
    mean_H: Floats
    map_HD: Floats

    @property
    def dimension(self) -> int:
        return self.map_HD.shape[1]

    def embed(self, texts: Sequence[str]) -> Floats:
        """Unit rows [N, D] float32; a zero row for a text the model says nothing of."""
        parts: list[Floats] = [np.zeros((0, self.dimension))]
        for first in range(0, len(texts), BATCH):
            parts.append(self._project(_whole(self.name, self.model.encode, texts[first : first + BATCH])))
        return np.concatenate(parts).astype(np.float32)

    def steps(self, text: str) -> tuple[Floats, Ints]:
        """What each step adds to the sum [W, D], and the length of the shortest prefix in which it counts [W].

        A token's state looks back only, so the mean over a prefix is a running sum. A sentence model must look again: it
        does so every STRIDE words, and between them the text counts as it was.
        """
        if self.name == "seed":
            ((state_WH, end_W),) = self.model.encode([text])
            return (np.asarray(state_WH, np.float64) - self.mean_H) @ self.map_HD, np.asarray(end_W, np.int64)
        count_W = np.array([end for _, end in spans(text)][STRIDE - 1 :: STRIDE], np.int64)
        x_WD = self.embed([text[:count] for count in count_W]).astype(np.float64)
        return np.diff(x_WD, axis=0, prepend=0), count_W

    def counted(self, text: str) -> int:
        """The length of the prefix of a growing text that counts by now."""
        if self.name == "seed":
            return len(text)
        return max([end for _, end in spans(text) if end <= len(text)][STRIDE - 1 :: STRIDE], default=0)

    def save(self, store: Store) -> Embedder:
        """Write the files. A sentence embedder that is in the store goes along; a seed is named by its digest."""
        tensors = {"mean": self.mean_H, "map": self.map_HD}
        about = json.dumps({"name": self.name, "model": self.model.name}).encode()
        files = {"embedder.safetensors": store.put(safetensors.numpy.save(tensors)), "embedder.json": store.put(about)}
        if self.model.name.startswith("sha256:"):
            files |= {LISTED: self.model.name, **_listed(self.model.name, store)}
        return Embedder(name=self.name, dimension=self.dimension, files=files)

    def _project(self, x_NH: Floats) -> Floats:
        said_N1 = _said(x_NH)[:, None]
        x_ND = np.where(said_N1, (np.where(said_N1, x_NH, 0) - self.mean_H) @ self.map_HD, 0)
        norm_N = np.sqrt(np.square(x_ND).sum(1))
        return x_ND / np.where(norm_N > 0, norm_N, 1)[:, None]


def sentence_model(source: str, store: Store) -> Model:
    """A sentence-transformers model, from a folder or a hub id (downloads it); text beyond its context is not seen.

    Its files are put in the store. Raises BadInput, MissingExtra.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
                raise BadInput(f"{source} is no folder: name one that sentence-transformers saved, or a hub id")
            folder = Path(scratch)
            require("sentence_transformers", "sentence").SentenceTransformer(source).save(scratch, safe_serialization=True)
        kept = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in PLAIN)
        files = {f"{MODEL}{path.relative_to(folder).as_posix()}": store.put(path) for path in kept}
    if f"{MODEL}modules.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise BadInput(f"{source} lacks modules.json or *.safetensors: name a folder that sentence-transformers saved")
    name = store.put(json.dumps(files, sort_keys=True).encode())
    return Model(name, open_sentence(name, store))


def open_sentence(name: str, store: Store) -> Encode:
    """The function of a sentence embedder in the store. It may be a stranger's: only its own library's modules are opened.
    Raises BadRecord, Damaged, MissingExtra."""
    files = _listed(name, store)
    modules = json.loads(store.get(files[f"{MODEL}modules.json"]).read_bytes())
    if strange := [one["type"] for one in modules if not one["type"].startswith("sentence_transformers.")]:
        raise BadRecord(f"this sentence embedder wants {strange[0]}: only modules of sentence_transformers are opened; take another")
    folder = store.folder({place.removeprefix(MODEL): blob for place, blob in files.items()})
    loaded = require("sentence_transformers", "sentence").SentenceTransformer(str(folder), local_files_only=True, trust_remote_code=False)
    return lambda texts: loaded.encode(list(texts), show_progress_bar=False)


def _listed(name: str, store: Store) -> Files:
    """The files of a sentence embedder, as they stand in an embedder. Raises BadRecord."""
    files = json.loads(store.get(name).read_bytes())
    if strange := [place for place in files if Path(place).suffix not in PLAIN or not place.startswith(MODEL)]:
        raise BadRecord(f"a sentence embedder of {', '.join(sorted(PLAIN))} files holds {strange[0]}: do not use it")
    return files


def fit_dense(
    name: str, texts: Iterable[str], model: Model, *, dimension: int = 100, rng_seed: int = 0, progress: Progress = silent
) -> Dense:
    """Find the mean and the main directions of a model's vectors. Raises BadCorpus, BadInput."""
    from sklearn.utils.extmath import randomized_svd  # two seconds that only fitting needs

    sample = list(islice(texts, SAMPLE))
    rows = []
    for first in range(0, len(sample), BATCH):
        rows.append(_whole(name, model.encode, sample[first : first + BATCH]))
        progress("fit embedder", min(first + BATCH, len(sample)), len(sample), "documents")
    x_NH = np.concatenate(rows) if rows else np.zeros((0, 1))
    x_NH = x_NH[_said(x_NH)]
    if not len(x_NH):
        raise BadCorpus(f"the model says nothing of {len(sample)} documents: an embedder needs text; check the corpus and its field")
    mean_H = x_NH.mean(0) if len(x_NH) > 1 else np.zeros(x_NH.shape[1])
    dimension = min(dimension, *x_NH.shape)
    _, _, map_DH = randomized_svd(x_NH - mean_H, dimension, random_state=rng_seed)
    return Dense(name, model, mean_H.astype(np.float32), np.ascontiguousarray(map_DH.T, np.float32))


def load_dense(embedder: Embedder, store: Store, open_model: Open | None) -> Dense:
    """Open a saved embedder and its model; one that is not in the store, such as a seed, is `open_model`'s to open.
    Raises BadInput, BadRecord, Damaged."""
    name = json.loads(store.get(embedder.files["embedder.json"]).read_bytes())["model"]
    if not name.startswith("sha256:") and open_model is None:
        raise BadInput(f"this partition embeds with the {embedder.name} model {name[:16]!r}, and nothing here opens it: pass open_model")
    tensors = safetensors.numpy.load_file(store.get(embedder.files["embedder.safetensors"]))
    if tensors["map"].shape != (len(tensors["mean"]), embedder.dimension):
        raise BadRecord(f"embedder {embedder.name}: map and mean do not give {embedder.dimension} numbers; get it again")
    opened = open_sentence if name.startswith("sha256:") else open_model
    return Dense(embedder.name, Model(name, opened(name, store)), tensors["mean"], tensors["map"])  # type: ignore[misc]


def _whole(name: str, encode: Encode, texts: Sequence[str]) -> Floats:
    """One vector a text [N, H] float64: the mean over tokens, or the model's own."""
    encoded = encode(texts)
    if name == "seed":
        encoded = [
            np.asarray(state_WH, np.float64).mean(0) if len(state_WH) else np.zeros(np.shape(state_WH)[1]) for state_WH, _ in encoded
        ]
    x_NH = np.asarray(encoded, np.float64)
    if x_NH.ndim != 2 or len(x_NH) != len(texts):
        raise BadInput(f"the embedding function gave an array of {x_NH.shape} for {len(texts)} texts: one row a text is needed")
    return x_NH


def _said(x_NH: Floats) -> NDArray[np.bool_]:
    """Which rows are finite and not zero [N]."""
    return np.all(np.isfinite(x_NH), axis=1) & np.any(x_NH, axis=1)
