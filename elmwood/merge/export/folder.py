"""Models as folders that other programs read: transformers checkpoints, PEFT adapters, GGUF files. Looked at again after writing."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged
from elmwood.lm.files import says_little, seed_folder
from elmwood.merge.export.card import RUN, model_card
from elmwood.merge.export.fold import fold
from elmwood.merge.moe.build import write_copies
from elmwood.merge.moe.densify import densify
from elmwood.merge.moe.trial import try_copies
from elmwood.records import Expert, Merged, Mixture, Partition, Seed
from elmwood.registry import require
from elmwood.store import Store, hash_file
from elmwood.store.headers import read_header
from elmwood.weights.experts import Low, seed_places
from elmwood.weights.tensors import check_finite, places

Model = Seed | Expert | Merged | Mixture
FORMATS = ("transformers", "peft", "gguf", "gguf-adapter")
DTYPES = ("F32", "F16", "BF16")
FILE, ADAPTER = "model.gguf", "adapter_config.json"


def export(
    record: Model, store: Store, folder: Path, form: str | None = None, dtype: str | None = None, progress: Progress = silent
) -> None:
    """Write a model into a new folder. By default an adapter stays an adapter and all else is a transformers checkpoint; an adapter
    asked for as a checkpoint is folded into its seed. `dtype` is for GGUF. Raises BadInput, Damaged, MissingExtra.
    """
    form = check_form(record, form, dtype)
    seed = record if isinstance(record, Seed) else store.load(record.seed, Seed)
    folder.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    if form == "peft":
        shutil.copytree(store.folder(record.files), folder, dirs_exist_ok=True)
        check_adapter(folder, seed, record.digest, store)
    elif form == "transformers":
        checkpoint(record, seed, store, folder, progress)
        check_checkpoint(folder, progress)
    elif form == "gguf-adapter":
        require("gguf", "gguf")
        from elmwood.merge.export.gguf import write_lora  # an extra

        low = Low(record.digest, store.folder(record.files), seed_places(seed, store))
        write_lora(seed_folder(seed, store), low, folder / FILE, name=f"{seed.name}-{record.digest[:8]}")
    else:
        require("gguf", "gguf")
        from elmwood.merge.export.gguf import write_gguf  # an extra

        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            checkpoint(record, seed, store, Path(scratch), progress, links=True)
            notes = write_gguf(
                Path(scratch), folder / FILE, name=f"{seed.name}-{record.digest[:8]}", dtype=dtype, licence=seed.licence,
                begins=seed.corpus is not None, progress=progress,
            )  # fmt: skip
    if (folder / "README.md").exists() and isinstance(record, Mixture):  # its own card was written before its files were
        rows = [f"| {name} | `{digest}` |" for name, digest in _digests(folder).items() if name != "README.md"]
        with (folder / "README.md").open("a", encoding="utf-8") as file:
            file.write("\n".join(["", "```python", RUN[form], "```", "", "| file | digest |", "|---|---|", *rows, ""]))
    if not (folder / "README.md").exists():  # what was combined has its own
        (folder / "README.md").write_text(model_card(record, seed, form, _domain(record, store), _digests(folder), notes), encoding="utf-8")


def check_form(record: Model, form: str | None, dtype: str | None) -> str:
    """The format that is asked for, or the default one. Raises BadInput."""
    adapter = ADAPTER in record.files
    form = form or ("peft" if adapter else "transformers")
    if form not in FORMATS:
        raise BadInput(f"no format {form!r}; have {', '.join(FORMATS)}")
    if form in ("peft", "gguf-adapter") and not adapter:
        raise BadInput(f"a {record.kind} with weights of its own is no adapter: export it with --format transformers or gguf")
    if dtype and (form != "gguf" or dtype not in DTYPES):
        raise BadInput(f"--dtype {dtype}: for --format gguf, one of {', '.join(DTYPES)}; other formats keep the values as they are")
    return form


def checkpoint(record: Model, seed: Seed, store: Store, folder: Path, progress: Progress, links: bool = False) -> None:
    """A whole transformers folder: the record's own files, and the seed's where it has none, such as the tokenizer."""
    base = seed_folder(seed, store)
    source = base if isinstance(record, Seed) else store.folder(record.files)
    if isinstance(record, Mixture):
        config = json.loads((base / "config.json").read_bytes())
        try_copies(config, write_copies, store)  # nothing leaves that would not equal what it is made of
        if record.layout == "low-rank":
            densify(record, store, folder, progress)
            source = base
    if folded := ADAPTER in record.files:
        fold(seed_places(seed, store), source, record.digest, folder, progress)
        source = base
    weights = any(folder.glob("*.safetensors")) and not folded  # what is folded has the seed's files, and its index
    own = {} if source == base else record.files
    for name in (*own, *seed.files):
        path, target = source / name if name in own else base / name, folder / name
        if target.exists() or (".safetensors" in name and (weights or (own and name not in own))):
            continue
        if Path(name).name == "tokenizer_config.json" and name in seed.files and says_little(path):
            path = base / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.resolve()) if links else shutil.copyfile(path, target)


# ---- looked at again --------------------------------------------------------------------------------------------


def check_checkpoint(folder: Path, progress: Progress = silent) -> None:
    """What is written opens: transformers finds every tensor in its shape, all values are finite, the index speaks of the files that
    are there, the tokenizer opens and fits the embedding. Raises Damaged, BadSeed.
    """
    from elmwood.lm.load import check_loads  # torch

    paths = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        said: Mapping[str, str] = json.loads(index.read_bytes())["weight_map"]
        have = {name: path.name for path in paths for name in read_header(path).tensors}
        if have != said:
            raise Damaged(f"{index} and the files beside it differ in {len(set(have.items()) ^ set(said.items()))} tensors: export again")
    found = places(paths)
    done, total = 0, sum(place.numbers for place in found.values())
    for name, place in found.items():
        check_finite(name, place)
        done += place.numbers
        progress("check", done, total, "values")
    check_loads(folder)


def check_adapter(folder: Path, seed: Seed, digest: str, store: Store) -> None:
    """Every pair of factors fits a matrix of the seed, and all values are finite. Raises Damaged, BadInput, ForeignExpert."""
    Low(digest, folder, seed_places(seed, store), dora=True)
    for name, place in places([folder / "adapter_model.safetensors"]).items():
        check_finite(name, place)


# ---- said -------------------------------------------------------------------------------------------------------


def _domain(record: Model, store: Store) -> str | None:
    """What the domain of an expert is called."""
    if not isinstance(record, Expert) or record.partition is None or record.domain is None:
        return None
    return store.load(record.partition, Partition).domains[record.domain].name if store.has(record.partition) else str(record.domain)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: f"sha256:{hash_file(path)}" for path in sorted(folder.iterdir()) if path.is_file()}
