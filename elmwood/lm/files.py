"""The files of a seed, and its tokenizer. Free of torch, so that commands that only read text start at once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from elmwood.errors import BadSeed, Damaged
from elmwood.lm.checkpoint import said, weight_files
from elmwood.records import Seed
from elmwood.store import Store, hash_file

# the files of a transformers folder that belong to a seed
KEPT: tuple[str, ...] = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab.*")
KEPT += ("special_tokens_map.json", "merges.txt", "added_tokens.json", "*.model", "*.jinja", "LICENSE*")
KEPT += ("additional_chat_templates/*.jinja",)
BESIDE = ("generation_config.json", "tokenizer.json")  # read as well, where they are
# of a hub: weights that transformers does not read, by name
PASSED = ("consolidated*", "adapter_*", "original/*")


def seed_folder(seed: Seed, store: Store) -> Path:
    """The seed's transformers folder. That of a hub seed is in the hub's cache: it is checked, and never fetched for a record's sake, which
    may come from a stranger. Raises Damaged."""
    if seed.hub is None:
        return store.folder(seed.files)
    identifier, _, commit = seed.hub.partition("@")
    cure = f"run `elmwood seed import {said(seed.hub)}` again"
    try:
        folder = download(identifier, commit, cached=True)
    except BadSeed as error:
        raise Damaged(f"the files of {said(seed.hub)} are not in the hub's cache, and nothing is fetched unasked: {cure}") from error
    read = [folder / "config.json", *weight_files(folder), *(folder / name for name in BESIDE if (folder / name).is_file())]
    if unlisted := [path.name for path in read if path.name not in seed.files]:
        raise Damaged(f"the record of {said(seed.hub)} has no digest of {unlisted[0]!r}, so that it cannot be checked: {cure}")
    for name, digest in seed.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Damaged(f"a record names the file {name!r}; files stay inside their folder: do not use this record")
        path, wanted = (folder / name).resolve(), digest.removeprefix("sha256:")
        # the hub's cache names large files by their sha256, so only small ones are hashed again
        if not path.is_file() or (path.name != wanted and hash_file(path) != wanted):
            raise Damaged(
                f"{said(name)} of {said(seed.hub)} is missing or has changed since import: delete it from the hub's cache, and {cure}"
            )
    return folder


def says_little(path: Path) -> bool:
    """Whether a tokenizer_config.json says no more than `save_folder` makes up: the seed's own then knows better."""
    return json.loads(path.read_bytes()).keys() <= {"tokenizer_class", "clean_up_tokenization_spaces", "eos_token"}


def tokenizer(seed: Seed, store: Store) -> Tokenizer:
    """The seed's tokenizer, without truncation or padding. Raises BadSeed, Damaged."""
    from elmwood.corpus.tokens import load_tokenizer  # it imports pyarrow

    return load_tokenizer(seed_folder(seed, store))


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers make the same tokens of every text: padding, truncation and what is put around a text are set aside."""
    first, second = (json.loads(words.to_str()) for words in (one, other))
    added = [{(token["id"], token["content"]) for token in words["added_tokens"]} for words in (first, second)]
    return added[0] == added[1] and all(first[part] == second[part] for part in ("model", "normalizer", "pre_tokenizer"))


def download(
    identifier: str, revision: str, cached: bool = False, files: Sequence[str] = KEPT, passed: Sequence[str] = PASSED
) -> Path:  # fmt: skip
    """A model hub's snapshot in the hub's own cache (…/snapshots/<commit>); `cached`: do not go online. Raises BadSeed."""
    from huggingface_hub import snapshot_download  # only for a hub id that the user named
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted: dict[str, Any] = {"allow_patterns": list(files), "ignore_patterns": list(passed), "local_files_only": cached}
        return Path(snapshot_download(identifier, revision=revision or None, **wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadSeed(f"{identifier!r} is not a folder here, and the model hub does not have it ({error}): check the spelling") from error
