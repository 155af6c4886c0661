"""Every function that reads what a stranger may have written, with files that are right, for the fuzz bench.

A reader takes a folder with one file changed, and reads it as a command would. It ends, or raises an error of elmwood.
"""

import gzip
import json
import lzma
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import zstandard

from elmwood.corpus.read import read
from elmwood.domains import embed, partition, publish
from elmwood.ensemble.mixture import open_model
from elmwood.evaluate.columns import open_tensors
from elmwood.evaluate.harness import Answers
from elmwood.lm.adapters.peft_config import read_settings
from elmwood.lm.importing.seed import import_seed
from elmwood.merge import mergekit, statistics
from elmwood.records import Contest, Expert, Partition, Seed, Statistics, canonical, fingerprint, parse, references
from elmwood.report.contest import headline, lines
from elmwood.store import Store
from elmwood.store.headers import load_arrays, read_header
from elmwood.store.verify import verify
from elmwood.study import merging, page
from elmwood.study.ancestry import as_model
from elmwood.train.adopt import import_adapter
from elmwood.weights.tensors import places

MERGEKIT = """
merge_method: ties
base_model: seed
models:
  - model: full/0
    parameters: {weight: [0.5, 1.0], density: 0.5}
  - model: full/1
    parameters: {weight: [{filter: mlp, value: 0.3}, {value: 1}]}
parameters: {normalize: true}
dtype: float32
"""


class Reader(NamedTuple):
    """A kind of input."""

    read: Callable[[Path, Path, Store], object]  # the folder, the file that was changed, a store of its own
    files: str = "*"  # of its folder of right files, those that are changed
    share: int = 1  # how often it is drawn


def lay_out(world: Path, folder: Path) -> None:
    """The right files of every reader, from a world, in folders called as the readers are."""
    store = Store(world / "store")

    def place(reader: str, name: str, data: bytes) -> None:
        path = folder / reader / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    for reader in ("record", "used record", "relations"):
        for number, digest in enumerate(store.records()):
            place(reader, f"{number}.json", store.get(digest).read_bytes())
    for name, digest in store.names().items():
        place("ref", name.replace("/", "-"), digest.encode())
    headers = list((world / "out").rglob("*.safetensors"))
    for number, path in enumerate(headers):
        place("header", f"{number}.safetensors", path.read_bytes())
    for reader, source in (("adopt", "low"), ("adapter settings", "low"), ("import", "seed"), ("partition", "p"), ("state", "state")):
        shutil.copytree(world / "out" / source, folder / reader)
    with suppress(FileNotFoundError):
        for path in (folder / "adapter settings").iterdir():
            if path.name != "adapter_config.json":
                path.unlink()
    (folder / "import" / "model.safetensors.index.json").write_text(_index(folder / "import" / "model.safetensors"))
    place("column", "loglik.safetensors", safetensors.numpy.save({"loglik": -np.ones(50, np.float16), "windows": np.arange(3)}))
    found = next(one for one in map(store.read, store.records()) if isinstance(one, Statistics))
    place("statistics", "statistics.safetensors", store.get(found.files["statistics.safetensors"]).read_bytes())
    place("mergekit", "merge.yaml", MERGEKIT.encode())
    key = fingerprint("a")
    place("answers", "answers.jsonl", b"".join(json.dumps({"key": key, "answer": [-1.5, True]}).encode() + b"\n" for _ in range(5)))
    place("log", "log.jsonl", b'{"event": "done", "seconds": 1.5, "tokens": 20}\n' * 4)
    place("view", "config.json", b"{}")
    place("verified store", "0.json", canonical(store.read(store.resolve("seed"))))
    _lay_out_corpora(world, place)


def _index(path: Path) -> str:
    names = read_header(path).tensors
    return json.dumps({"metadata": {"total_size": path.stat().st_size}, "weight_map": dict.fromkeys(names, path.name)})


def _lay_out_corpora(world: Path, place: Callable[[str, str, bytes], None]) -> None:
    text = (world / "text.jsonl").read_bytes()[:3000].rpartition(b"\n")[0] + b"\n"
    rows = [json.loads(line) for line in text.splitlines()]
    table, sink, stream = pa.Table.from_pylist(rows), pa.BufferOutputStream(), pa.BufferOutputStream()
    pq.write_table(table, sink)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    kinds = {
        "a.jsonl": text, "a.json": json.dumps(rows).encode(), "a.csv": b"text,source\n" + b"".join(b"words of it,x\n" for _ in rows),
        "a.txt": text, "a.parquet": sink.getvalue().to_pybytes(), "a.arrow": stream.getvalue().to_pybytes(),
        "a.jsonl.gz": gzip.compress(text), "a.jsonl.zst": zstandard.compress(text), "a.jsonl.xz": lzma.compress(text),
    }  # fmt: skip
    for name, data in kinds.items():
        place("corpus", name, data)


# ---- readers ---------------------------------------------------------------------------------------------------------


def _record(folder: Path, file: Path, store: Store) -> None:
    record = parse(file.read_bytes())
    list(references(record))
    assert canonical(parse(canonical(record))) == canonical(record)
    page.summary(record)
    record._repr_html_()
    if isinstance(record, Contest):
        headline(record)
        lines(record)


def _kept(file: Path, store: Store) -> str:
    """Put the bytes of a record where a store has them, under the digest that they have."""
    data = file.read_bytes()
    digest = fingerprint_of(data)
    store.path(digest).write_bytes(data)
    return digest


def fingerprint_of(data: bytes) -> str:
    """sha256, hex."""
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _relations(folder: Path, file: Path, store: Store) -> None:
    digest = _kept(file, store)
    try:
        str(page.show(digest, store))
        store.load(digest)
    finally:
        store.path(digest).unlink()


def _used(folder: Path, file: Path, store: Store) -> None:
    digest = _kept(file, store)
    try:
        record = store.load(digest)
        if isinstance(record, Partition):
            embed.load(record.embedder, store)
            partition.centroids(record, store)
        elif record.kind == "comparison":
            page.report(record, output=folder / "report.html", store=store)
        else:
            open_model(as_model(record, store), store)
    finally:
        store.path(digest).unlink(missing_ok=True)


def _ref(folder: Path, file: Path, store: Store) -> None:
    path = store.root / "refs" / "odd"
    path.write_bytes(file.read_bytes())
    try:
        store.names()
        store.load("odd")
    finally:
        path.unlink()


def _header(folder: Path, file: Path, store: Store) -> None:
    for read_it in (read_header, load_arrays, lambda path: places([path])):
        read_it(file)


def _import(folder: Path, file: Path, store: Store) -> None:
    if file.name != "model.safetensors.index.json":
        (folder / "model.safetensors.index.json").unlink()
    import_seed(str(folder), store)


def _adopt(folder: Path, file: Path, store: Store) -> None:
    import_adapter(str(folder), store.load("seed", Seed), store)


def _settings(folder: Path, file: Path, store: Store) -> None:
    read_settings(file)


def _partition(folder: Path, file: Path, store: Store) -> None:
    found = publish.receive(folder, store)
    embed.load(found.embedder, store)
    partition.centroids(found, store)
    partition.assign(found, store, ["a ship with salt"])


def _state(folder: Path, file: Path, store: Store) -> None:
    merging.open_state(str(folder), store)


def _statistics(folder: Path, file: Path, store: Store) -> None:
    files = {"statistics.safetensors": store.put(file)}
    expert = store.load("full/0", Expert)
    found = statistics.ExpertStatistics(Statistics(expert=expert.digest, rows=1, tokens=1, fisher=1.0, files=files), store)
    for key in list(found.places)[:50]:
        kind, _, name = key.partition("|")
        found.fisher(name) if kind == "fisher" else found.gram(name)


def _mergekit(folder: Path, file: Path, store: Store) -> None:
    mergekit.read(file.read_bytes().decode(errors="replace"))


def _corpus(folder: Path, file: Path, store: Store) -> None:
    list(islice(read(str(file), Counter()), 10_000))


def _answers(folder: Path, file: Path, store: Store) -> None:
    path = store.root / "answers" / f"{'0' * 64}.jsonl"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(file, path)
    Answers(store, "0" * 64).look_up(("loglikelihood",), [("a", "b")], lambda missing: ((key, [-1.0, True]) for key in missing),
                                     lambda answer: isinstance(answer, list))  # fmt: skip


def _log(folder: Path, file: Path, store: Store) -> None:
    path = store.root / "logs" / "odd.jsonl"
    shutil.copy(file, path)
    store.logged("odd")


def _view(folder: Path, file: Path, store: Store) -> None:
    files = store.load("seed", Seed).files
    view = store.folder(files)
    (view / file.name).unlink()
    shutil.copy(file, view / file.name)
    store.folder(files)
    assert (view / file.name).is_symlink()


def _verified(folder: Path, file: Path, store: Store) -> None:
    small = Store(folder / "small")
    for name in ("records", "refs", "blobs/sha256/ab"):
        (small.root / name).mkdir(parents=True)
    data = file.read_bytes()
    (small.root / "records" / f"{fingerprint_of(data)}.json").write_bytes(data)
    (small.root / "records" / ("a" * 64 + ".json")).write_bytes(data)
    (small.root / "refs" / "odd").write_bytes(data)
    (small.root / "blobs/sha256/ab" / ("c" * 62)).write_bytes(data)
    assert list(verify(small))
    small.names()


READERS = {
    "record": Reader(_record, share=30),
    "relations": Reader(_relations, share=15),
    "used record": Reader(_used, share=4),
    "ref": Reader(_ref, share=2),
    "header": Reader(_header, share=30),
    "adopt": Reader(_adopt, share=3),
    "adapter settings": Reader(_settings, share=10),
    "import": Reader(_import, files="*.json", share=2),
    "partition": Reader(_partition, share=6),
    "state": Reader(_state, share=8),
    "column": Reader(lambda folder, file, store: open_tensors(file), share=8),
    "statistics": Reader(_statistics, share=6),
    "mergekit": Reader(_mergekit, share=8),
    "corpus": Reader(_corpus, share=20),
    "answers": Reader(_answers, share=4),
    "log": Reader(_log, share=2),
    "view": Reader(_view, share=1),
    "verified store": Reader(_verified, share=5),
}
