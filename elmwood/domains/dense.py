"""Text -> unit vectors by a model: the hidden states of the seed, a sentence embedder, router LMs, or any function of texts.

Shapes: N documents, H components of the model's vectors, D dimensions, W steps of one text (tokens, or runs of words).

Hidden states of a language model point mostly one way, so vectors are mean-centred and projected onto D principal components,
both fitted on a sample. The model is a function here, so this file needs no torch. The files of a sentence embedder and of router
LMs are in the store and travel with the embedder; a seed is opened again by its digest.
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
from elmwood.records.plain_json import parse_json
from elmwood.registry import lookup, require
from elmwood.store import Store
from elmwood.store.headers import check_headers, load_arrays
from elmwood.threads import one_thread

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

# By text: texts -> x_NH, one row a text.
# By token: texts -> for each, (state_WH, end_W): a vector for each token, and the characters of the text up to its end.
Encode = Callable[[Sequence[str]], Any]
# The name of a model, and the store that has it -> its function. A module-level function, so that it can be sent to other processes.
Open = Callable[[str, Store], Encode]


class Model(NamedTuple):
    """The model of an embedder."""

    name: str  # what it is opened again by: a seed's digest, the blob that lists the model's files, or module:function
    encode: Encode


SAMPLE = 4096  # documents the components are fitted on: the first of a corpus, whose order is that of their hashes
BATCH = 64  # texts given to the model at once
LARGEST = 64 << 20  # bytes of embedder.json: the words of a vocabulary
MODEL, LISTED = "model/", "model.json"  # folder of the model's files among an embedder's, and the list of them
STRIDE = 32  # words after which a model by text reads a growing text again
PLAIN = {".safetensors", ".json", ".txt"}  # files of a model that are stored and opened: data, no code, no pickles


@dataclass(frozen=True, eq=False)
class Dense:
    """A fitted embedder by a model."""

    name: str
    model: Model
    mean_H: Floats
    map_HD: Floats
    by_token: bool = False

    @property
    def dimension(self) -> int:
        return self.map_HD.shape[1]

    def embed(self, texts: Sequence[str]) -> Floats:
        """Unit rows [N, D] float32; a zero row where the model gives zeros or no finite numbers."""
        parts: list[Floats] = [np.zeros((0, self.dimension))]
        for first in range(0, len(texts), BATCH):
            parts.append(self._project(_encode(self.model, self.by_token, texts[first : first + BATCH])))
        return np.concatenate(parts).astype(np.float32)

    def steps(self, text: str) -> tuple[Floats, Ints]:
        """What each step adds to the sum [W, D], and the length of the shortest prefix in which it counts [W].

        A token's state depends on what comes before it only, so the mean over a prefix is a running sum. A model by text reads
        the prefix again every STRIDE words; between them the embedding stays what it was.
        """
        if self.by_token:
            ((state_WH, end_W),) = self.model.encode([text])
            return (np.asarray(state_WH, np.float64) - self.mean_H) @ self.map_HD, np.asarray(end_W, np.int64)
        count_W = np.array([end for _, end in spans(text)][STRIDE - 1 :: STRIDE], np.int64)
        x_WD = self.embed([text[:count] for count in count_W]).astype(np.float64)
        return np.diff(x_WD, axis=0, prepend=0), count_W

    def counted(self, text: str) -> int:
        """The length of the prefix of a growing text that the embedding is of by now."""
        if self.by_token:
            return len(text)
        return max([end for _, end in spans(text) if end <= len(text)][STRIDE - 1 :: STRIDE], default=0)

    def save(self, store: Store) -> Embedder:
        """Write the files; those of a model that is a list of files are included, other models are named only."""
        return _save(self.name, self.model.name, self.mean_H, self.map_HD, store)

    def _project(self, x_NH: Floats) -> Floats:
        some_N1 = _finite(x_NH)[:, None]
        x_ND = np.where(some_N1, (np.where(some_N1, x_NH, 0) - self.mean_H) @ self.map_HD, 0)
        norm_N = np.sqrt(np.square(x_ND).sum(1))
        return x_ND / np.where(norm_N > 0, norm_N, 1)[:, None]


def save_router_lms(models: Sequence[Files], store: Store) -> Embedder:
    """The embedder of K router LMs, each a transformers folder: what each says of a text, scaled to length one together."""
    files = {f"{MODEL}{k}/{name}": blob for k, one in enumerate(models) for name, blob in one.items() if Path(name).suffix in PLAIN}
    name = store.put(json.dumps(files, sort_keys=True).encode())
    return _save("routers", name, np.zeros(len(models), np.float32), np.eye(len(models), dtype=np.float32), store)


def router_lms(name: str, store: Store) -> list[Files]:
    """The files of each router LM that a blob lists, in their order: "model/3/config.json" is the "config.json" of 3. Raises BadRecord."""
    found: dict[int, dict[str, str]] = {}
    for path, blob in listed(name, store).items():
        _, number, *rest = Path(path).parts
        if not number.isdecimal() or len(rest) != 1:
            raise BadRecord(f"this embedder of router LMs has a file {path[:80]!r}; its files are {MODEL}<number>/<name>: do not use it")
        found.setdefault(int(number), {})[rest[0]] = blob
    if sorted(found) != list(range(len(found))):
        raise BadRecord(f"this embedder has router LMs {sorted(found)[:8]}: they are numbered from 0 without gaps; download it again")
    return [found[number] for number in range(len(found))]


def _save(name: str, model: str, mean_H: Floats, map_HD: Floats, store: Store) -> Embedder:
    tensors, about = {"mean": mean_H, "map": map_HD}, json.dumps({"name": name, "model": model}).encode()
    files = {"embedder.safetensors": store.put(safetensors.numpy.save(tensors)), "embedder.json": store.put(about)}
    if model.startswith("sha256:"):
        files |= {LISTED: model, **listed(model, store)}
    return Embedder(name=name, dimension=map_HD.shape[1], files=files)


def sentence_model(source: str, store: Store) -> Model:
    """Read a sentence-transformers model into the store, from a folder or a hub id (which downloads it).

    Text beyond the model's context is not read. Raises BadInput, MissingExtra.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
                raise BadInput(f"{source} is not a folder: name a folder that sentence-transformers saved, or a hub id")
            folder = Path(scratch)
            require("sentence_transformers", "sentence").SentenceTransformer(source, device="cpu").save(scratch, safe_serialization=True)
        kept = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in PLAIN)
        files = {f"{MODEL}{path.relative_to(folder).as_posix()}": store.put(path) for path in kept}
    if f"{MODEL}modules.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise BadInput(f"{source} lacks modules.json or *.safetensors: name a folder that sentence-transformers saved")
    name = store.put(json.dumps(files, sort_keys=True).encode())
    return Model(name, open_sentence(name, store))


def open_sentence(name: str, store: Store) -> Encode:
    """The function of a sentence embedder in the store. Others may have made it, so only modules of its own library are opened.
    Raises BadInput, BadRecord, Damaged, MissingExtra."""
    files = listed(name, store)
    modules = json.loads(store.get(files[f"{MODEL}modules.json"]).read_bytes())
    if strange := [one["type"] for one in modules if not one["type"].startswith("sentence_transformers.")]:
        raise BadRecord(f"this sentence embedder wants {strange[0]}: only modules of sentence_transformers are opened; use another")
    check_headers(store.get(blob) for place, blob in files.items() if place.endswith(".safetensors"))
    folder = store.folder({place.removeprefix(MODEL): blob for place, blob in files.items()})
    loaded = require("sentence_transformers", "sentence").SentenceTransformer(
        str(folder), device=str(lookup({}, "elmwood.lm.devices:best_device")()), local_files_only=True, trust_remote_code=False
    )
    return lambda texts: loaded.encode(list(texts), show_progress_bar=False)


def listed(name: str, store: Store) -> Files:
    """The files of a model that travels with its embedder: path in the embedder -> blob. Raises BadRecord."""
    files = json.loads(store.get(name).read_bytes())
    if strange := [place for place in files if Path(place).suffix not in PLAIN or not place.startswith(MODEL)]:
        raise BadRecord(f"the model of an embedder is {', '.join(sorted(PLAIN))} files, and this one has {strange[0]}: do not use it")
    return files


@one_thread
def fit_dense(
    name: str, texts: Iterable[str], model: Model, *, by_token: bool = False, dimension: int = 100, rng_seed: int = 0,
    progress: Progress = silent,
) -> Dense:  # fmt: skip
    """Fit the mean and the principal components of a model's vectors. Raises BadCorpus, BadInput."""
    from sklearn.utils.extmath import randomized_svd  # takes two seconds, needed only here

    sample = list(islice(texts, SAMPLE))
    rows = []
    for first in range(0, len(sample), BATCH):
        rows.append(_encode(model, by_token, sample[first : first + BATCH]))
        progress("fit embedder", min(first + BATCH, len(sample)), len(sample), "documents")
    x_NH = np.concatenate(rows) if rows else np.zeros((0, 1))
    x_NH = x_NH[_finite(x_NH)]
    if not len(x_NH):
        raise BadCorpus(f"the model gives no vector other than zero for {len(sample)} documents: check the corpus and its --field")
    mean_H = x_NH.mean(0) if len(x_NH) > 1 else np.zeros(x_NH.shape[1])
    dimension = min(dimension, *x_NH.shape)
    _, _, map_DH = randomized_svd(x_NH - mean_H, dimension, random_state=rng_seed)
    return Dense(name, model, mean_H.astype(np.float32), np.ascontiguousarray(map_DH.T, np.float32), by_token)


def open_files(embedder: Embedder, store: Store, field: str, *needed: str) -> tuple[Any, dict[str, NDArray[Any]]]:
    """One field of what an embedder says of itself, and its tensors, among them the needed ones. Raises BadRecord, Damaged."""
    if absent := {"embedder.json", "embedder.safetensors"} - embedder.files.keys():
        raise BadRecord(f"embedder {embedder.name[:80]!r} has no file {min(absent)}: fetch its partition again")
    try:
        about = parse_json(store.get(embedder.files["embedder.json"]).read_bytes(), LARGEST)
        return about[field], load_arrays(store.get(embedder.files["embedder.safetensors"]), *needed)
    except (ValueError, TypeError, KeyError) as error:
        raise BadRecord(f"embedder {embedder.name[:80]!r}: its embedder.json is damaged ({error}): fetch its partition again") from error


def load_dense(embedder: Embedder, store: Store, open_model: Open, by_token: bool = False) -> Dense:
    """Open a saved embedder; `open_model` opens its model by the name that was saved. Raises BadRecord, Damaged."""
    name, tensors = open_files(embedder, store, "model", "mean", "map")
    if not isinstance(name, str):
        raise BadRecord(f"embedder {embedder.name}: it names no model; download it again")
    if tensors["mean"].ndim != 1 or tensors["map"].shape != (len(tensors["mean"]), embedder.dimension):
        raise BadRecord(f"embedder {embedder.name}: its projection does not give {embedder.dimension} dimensions; download it again")
    return Dense(embedder.name, Model(name, open_model(name, store)), tensors["mean"], tensors["map"], by_token)


def _encode(model: Model, by_token: bool, texts: Sequence[str]) -> Floats:
    """One vector a text [N, H] float64: the model's own, or the mean over tokens."""
    encoded = model.encode(texts)
    if by_token:
        encoded = [
            np.asarray(state_WH, np.float64).mean(0) if len(state_WH) else np.zeros(np.shape(state_WH)[1]) for state_WH, _ in encoded
        ]
    x_NH = np.asarray(encoded, np.float64)
    if x_NH.ndim != 2 or len(x_NH) != len(texts):
        raise BadInput(
            f"the embedder {model.name[:40]!r} gave an array of shape {x_NH.shape} for {len(texts)} texts: return one row per text"
        )
    return x_NH


def _finite(x_NH: Floats) -> NDArray[np.bool_]:
    """Which rows are finite and not zero [N]."""
    return np.all(np.isfinite(x_NH), axis=1) & np.any(x_NH, axis=1)
