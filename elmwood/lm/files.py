"""The files of a seed, and its tokenizer. Free of torch, so that commands that only read text start at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from elmwood.errors import BadSeed, Damaged
from elmwood.records import Seed
from elmwood.store import Store, hash_file

# the files of a transformers folder that belong to a seed
KEPT: tuple[str, ...] = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab.*")
KEPT += ("special_tokens_map.json", "merges.txt", "added_tokens.json", "*.model", "*.jinja", "LICENSE*")
KEPT += ("additional_chat_templates/*.jinja",)
# of a hub: weights that transformers does not read, by name
PASSED = ["consolidated*", "adapter_*", "original/*"]


def seed_folder(seed: Seed, store: Store) -> Path:
    """The seed's transformers folder. A hub seed is downloaded into the hub's cache if needed, and checked. Raises Damaged."""
    if seed.hub is None:
        return store.folder(seed.files)
    identifier, _, commit = seed.hub.partition("@")
    try:
        folder = download(identifier, commit, cached=True)
    except BadSeed:
        folder = download(identifier, commit)
    for name, digest in seed.files.items():
        path, wanted = (folder / name).resolve(), digest.removeprefix("sha256:")
        # the hub's cache names large files by their sha256, so only small ones are hashed again
        if not path.exists() or (path.name != wanted and hash_file(path) != wanted):
            raise Damaged(f"{name} of {seed.hub} is missing or has changed since import: delete it from the hub's cache and try again")
    return folder


def tokenizer(seed: Seed, store: Store) -> Tokenizer:
    """The seed's tokenizer, without truncation or padding. Raises BadSeed, Damaged."""
    from elmwood.corpus.tokens import load_tokenizer  # it imports pyarrow

    return load_tokenizer(seed_folder(seed, store))


def download(identifier: str, revision: str, cached: bool = False, files: Sequence[str] = KEPT) -> Path:
    """A model hub's snapshot in the hub's own cache (…/snapshots/<commit>); `cached`: do not go online. Raises BadSeed."""
    from huggingface_hub import snapshot_download  # only for a hub id that the user named
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted: dict[str, Any] = {"allow_patterns": list(files), "ignore_patterns": PASSED, "local_files_only": cached}
        return Path(snapshot_download(identifier, revision=revision or None, **wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadSeed(f"{identifier!r} is not a folder here, and the model hub does not have it ({error}): check the spelling") from error
