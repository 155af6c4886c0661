"""Where the files of a seed are, and its tokenizer; free of torch, so that what only reads text or scores starts at once."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from elmwood.errors import BadSeed, Damaged
from elmwood.records import Seed
from elmwood.store import Store, hash_file

# the files of a transformers folder that belong to a seed
KEPT: tuple[str, ...] = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab.*")
KEPT += ("special_tokens_map.json", "merges.txt", "added_tokens.json", "*.model", "*.jinja", "LICENSE*")


def seed_folder(seed: Seed, store: Store) -> Path:
    """The seed's transformers folder. A hub seed is fetched into the hub's cache where it is absent, and checked. Raises Damaged."""
    if seed.hub is None:
        return store.folder(seed.files)
    identifier, _, commit = seed.hub.partition("@")
    try:
        folder = download(identifier, commit, cached=True)
    except BadSeed:
        folder = download(identifier, commit)
    for name, digest in seed.files.items():
        path, wanted = (folder / name).resolve(), digest.removeprefix("sha256:")
        # the hub's cache names large files by their sha256, so only the small ones are read again
        if not path.exists() or (path.name != wanted and hash_file(path) != wanted):
            raise Damaged(f"{name} of {seed.hub} is missing or not what it was at import: delete it from the hub's cache and try again")
    return folder


def tokenizer(seed: Seed, store: Store) -> Tokenizer:
    """The seed's tokenizer, without truncation or padding. Raises BadSeed, Damaged."""
    from elmwood.corpus.tokens import load_tokenizer  # it comes with what reads a corpus, pyarrow included

    return load_tokenizer(seed_folder(seed, store))


def download(identifier: str, revision: str, cached: bool = False, files: Sequence[str] = KEPT) -> Path:
    """A model hub's snapshot in the hub's own cache (…/snapshots/<commit>); `cached` asks nobody else. Raises BadSeed."""
    from huggingface_hub import snapshot_download  # here alone, and only for a hub id the user named
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(identifier, revision=revision or None, allow_patterns=list(files), local_files_only=cached))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadSeed(f"{identifier!r} is not a folder here, and the model hub did not give it ({error}): check the spelling") from error
