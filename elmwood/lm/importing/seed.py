"""Seeds from models made elsewhere: a transformers folder, a GGUF file, a model hub."""

import tempfile
from pathlib import Path
from typing import Any

from elmwood.errors import BadSeed, copied_to
from elmwood.lm.checkpoint import weight_files
from elmwood.lm.files import KEPT, download
from elmwood.lm.importing.checkpoint import Checkpoint, normalise, told
from elmwood.lm.importing.config import UNLIMITED, context_of, read_config
from elmwood.lm.importing.gguf_file import convert
from elmwood.lm.importing.words import check_spelling, check_tokenizer, choose_separator, read_tokenizer
from elmwood.records import Files, Seed
from elmwood.store import Store, hash_file
from elmwood.store.disk import temporary_folder


def import_seed(
    source: str, store: Store, *, name: str | None = None, separator: int | str | None = None, licence: str | None = None
) -> Seed:
    """A seed from a transformers folder, a .gguf file, or a model hub's `id` or `id@revision`.

    A checkpoint whose tensors have the names and shapes of the loaded model is kept byte for byte; any other is written anew, and the
    record's `changes` say what was changed. A hub seed that is kept stays in the hub's own cache, pinned to its commit and to the
    digests of its files; everything else is copied into the store. `separator` is the token (or its id) before each document: by
    default "<|endoftext|>" where the vocabulary has it, else the tokenizer's bos, else its eos. Raises BadSeed, Damaged, MissingExtra.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        with tempfile.TemporaryDirectory() as scratch, copied_to(scratch, path):
            changes = convert(path, Path(scratch))
            return _import_folder(Path(scratch), store, name or path.stem, separator, licence=licence, changes=changes)
    if path.is_dir():
        return _import_folder(path, store, name or path.resolve().name, separator, licence=licence)
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BadSeed(f"{source} is neither a folder with a config.json nor a .gguf file: give one of these, or a hub id")
    identifier, _, revision = source.partition("@")
    folder = download(identifier, revision)
    return _import_folder(folder, store, name or identifier.split("/")[-1], separator, f"{identifier}@{folder.name}", licence)


def _import_folder(
    folder: Path, store: Store, name: str, wanted: int | str | None, hub: str | None = None, licence: str | None = None,
    changes: tuple[str, ...] = (),
) -> Seed:  # fmt: skip
    """`changes`: what was changed before. Raises BadSeed, Damaged."""
    config = read_config(folder)
    tokenizer, starts = read_tokenizer(folder)
    separator = choose_separator(wanted, tokenizer, starts, folder)
    check_tokenizer(tokenizer, config, separator, folder)
    check_spelling(tokenizer, folder)
    with temporary_folder(store.root / "work") as scratch:
        found = normalise(folder, config, scratch)
        kept = companions(folder, found)
        # what is in the hub's cache can stay there if it is all that the seed needs and nothing else is read with it
        stays = hub is not None and not found.changes and "tokenizer.json" in kept and {*folder.glob("*.safetensors")} <= {*found.files}
        if stays:
            files = {name: f"sha256:{hash_file(path)}" for name, path in kept.items()}
        else:
            files = {name: store.take(path) if scratch in path.parents else store.put(path) for name, path in kept.items()}
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = store.put(tokenizer.to_str().encode())
    if left := sorted(path.name for path in {*folder.glob("*.safetensors")} - {*weight_files(folder)}):
        changes += (f"left out, as transformers does not read them as the model's weights: {told(left)}",)
    where = {"hub": hub} if stays else {"source": hub}
    changes += found.changes
    return add_seed(store, files, found.config, found.parameters, name=name, separator=separator, licence=licence, changes=changes, **where)


def companions(folder: Path, found: Checkpoint) -> dict[str, Path]:
    """The files of a seed by name: its weights, and what belongs to them in the folder."""
    paths = {path for pattern in KEPT for path in folder.glob(pattern) if path.is_file()}
    beside = {path for path in paths if ".safetensors" not in path.name}
    return {path.relative_to(folder).as_posix(): path for path in sorted(beside)} | {path.name: path for path in found.files}


def add_seed(store: Store, files: Files, config: Any, parameters: int, *, changes: tuple[str, ...] = (), **fields: Any) -> Seed:
    """The record of a checkpoint folder, from its config."""
    context = context_of(config)
    if context is None:
        context = UNLIMITED
        changes += (f"the config names no number of positions: the context is {UNLIMITED} tokens",)
    seed = Seed(
        architecture=config.architectures[0], parameters=parameters, vocabulary=config.get_text_config().vocab_size, context=context,
        files=files, changes=changes, **fields,
    )  # fmt: skip
    store.add(seed)
    return seed
