"""A snapshot of a hub, brought into the user's store: what is missing, every byte checked, names set. And on to a model hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged
from elmwood.hub.client.enter import fetch_manifest
from elmwood.hub.client.gate import CONFIG, WEIGHTS, check_adapter
from elmwood.hub.client.http import Hub
from elmwood.hub.client.join import fetch_partition, fetch_seed
from elmwood.hub.client.state import Folder, open_folder
from elmwood.hub.client.transfer import fetch_blobs, fetch_record
from elmwood.hub.messages import RunManifest, Signed, Snapshot
from elmwood.hub.signing import open_signed
from elmwood.records import Ensemble, Expert, Forest, Merged, Mixture, Record
from elmwood.store import AnyStore, Named, Store
from elmwood.study.exporting import export


class Pulled(NamedTuple):
    """A snapshot that is in the store."""

    snapshot: Snapshot
    ensemble: Ensemble
    name: str  # of the names set: NAME/ensemble, NAME/forest, NAME/seed, NAME/partition, NAME/expert/<domain>
    fetched: int  # files that were missing

    @property
    def record(self) -> Ensemble:
        return self.ensemble


def pull(
    url: str, store: AnyStore = None, *, name: str | None = None, version: int | None = None, folder: Path | None = None,
    progress: Progress = silent,
) -> Pulled:  # fmt: skip
    """Bring a hub's newest snapshot, or an older version of it, into the store. Names of experts that it no longer has are removed.

    Raises BadInput, Forged, Damaged, Unreachable, Problem.
    """
    store = Store(store)
    place, hub = open_folder(url, store, folder), Hub(url)
    try:
        with place.alone():
            manifest = fetch_manifest(hub, place)
            snapshot = fetch_snapshot(hub, manifest, place, version)
            called = name or manifest.run
            store.check_name(f"{called}/ensemble")
            if not snapshot.experts:
                raise BadInput(f"run {manifest.run!r} has no expert yet: there is nothing to pull; the first one makes the first ensemble")
            count = _fetch(snapshot, manifest, hub, store, progress)
            if version is None:
                place.change(snapshot=snapshot.version)
    finally:
        hub.close()
    ensemble = store.load(snapshot.ensemble, Ensemble)
    _set_names(snapshot, ensemble, manifest, called, store)
    return Pulled(snapshot, ensemble, called, count)


def fetch_snapshot(hub: Hub, manifest: RunManifest, place: Folder, version: int | None = None) -> Snapshot:
    """A snapshot, signed by the key that the manifest names, and not older than the last one seen. Raises BadInput, Forged."""
    signed = Signed.model_validate_json(hub.get("/v1/snapshot" + ("" if version is None else f"?version={version}")).body)
    snapshot = open_signed(signed, Snapshot, manifest.hub_key)
    seen = place.read().snapshot
    if snapshot.run != manifest.run or (version is not None and snapshot.version != version):
        raise BadInput(f"the hub shows version {snapshot.version} of run {snapshot.run!r}, which was not asked for: nothing was changed")
    if version is None and snapshot.version < seen:
        raise BadInput(f"the hub shows snapshot {snapshot.version}, and {seen} was here before: it was rolled back; nothing was changed")
    return snapshot


def _fetch(snapshot: Snapshot, manifest: RunManifest, hub: Hub, store: Store, progress: Progress) -> int:
    """Records and files of a snapshot, each checked; how many files were missing."""
    forest, ensemble = fetch_record(snapshot.forest, hub, store), fetch_record(snapshot.ensemble, hub, store)
    listed = tuple(sorted(one.expert for one in snapshot.experts))
    if not (isinstance(forest, Forest) and isinstance(ensemble, Ensemble)) or (ensemble.forest, forest.experts) != (forest.digest, listed):
        raise Damaged(f"snapshot {snapshot.version} names a forest and an ensemble that do not fit it: tell who runs the hub")
    if (forest.seed, forest.partition) != (manifest.seed, manifest.partition):
        raise Damaged(f"snapshot {snapshot.version} is of another seed or partition than the manifest: tell who runs the hub")
    experts = [fetch_record(digest, hub, store) for digest in forest.experts]
    configs = {tier.config for tier in manifest.tiers.values()}
    for one in experts:
        if not isinstance(one, Expert) or set(one.files) != {CONFIG, WEIGHTS} or one.files[CONFIG] not in configs:
            raise Damaged(f"expert {one.digest[:8]} is no adapter of this run's recipes: tell who runs the hub; nothing was named")
    blobs = [blob for one in experts if isinstance(one, Expert) for blob in one.files.values()]
    missing = sum(not store.whole(blob) for blob in blobs)
    seed = fetch_seed(manifest.seed, hub, store, progress)
    fetch_partition(manifest.partition, hub, store)
    fetch_blobs(blobs, hub, store, progress, "fetch experts")
    for one in experts:
        assert isinstance(one, Expert)
        (tier,) = (tier for tier in manifest.tiers.values() if tier.config == one.files[CONFIG])
        check_adapter(store.get(one.files[WEIGHTS]), tier.tensors)
    assert seed.digest == forest.seed
    return missing


def _set_names(snapshot: Snapshot, ensemble: Ensemble, manifest: RunManifest, name: str, store: Store) -> None:
    """Name what came, and take back the names of experts that are gone."""
    names = {f"{name}/expert/{one.domain}": one.expert for one in snapshot.experts}
    for old in [one for one in store.names() if one.startswith(f"{name}/expert/") and one not in names]:
        store.unname(old)
    names |= {f"{name}/ensemble": ensemble.digest, f"{name}/forest": ensemble.forest}
    names |= {f"{name}/seed": manifest.seed, f"{name}/partition": manifest.partition}
    for one, digest in names.items():
        store.name(one, digest)


# ---- to a model hub ---------------------------------------------------------------------------------------------------


class Mirrored(NamedTuple):
    """A repository that was written."""

    repository: str
    record: str  # digest


def mirror(
    forest: Named, account: str, store: AnyStore = None, *, prefix: str = "elmwood", merged: Named | None = None, private: bool = True,
    api: Any = None, progress: Progress = silent, tell: Callable[[Mirrored], None] = lambda made: None,
) -> list[Mirrored]:  # fmt: skip
    """Upload each expert of a forest, and a merged or mixed model, to a Hugging Face account: a repository for each, a PEFT or transformers
    folder with its card. `api`: an HfApi; by default one with the token that the user logged in with. Raises BadInput.
    """
    store = Store(store)
    found = store.load(forest)
    if isinstance(found, Ensemble):
        found = store.load(found.forest)
    if not isinstance(found, Forest):
        raise BadInput(f"{found.digest[:8]} is a {found.kind}: a mirror is of a forest or an ensemble")
    records: list[tuple[str, Record]] = []
    for digest in found.experts:
        expert = store.load(digest, Expert)
        records.append((f"{prefix}-expert-{expert.domain}-{digest[:8]}", expert))
    if merged is not None:
        model = store.load(merged)
        if not isinstance(model, Merged | Mixture):
            raise BadInput(f"{model.digest[:8]} is a {model.kind}: name a merge or a mixture, or leave it out")
        records.append((f"{prefix}-{model.kind}-{model.digest[:8]}", model))
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    made = []
    for done, (called, record) in enumerate(records):
        progress("mirror", done, len(records), "repositories")
        repository = f"{account}/{called}"
        folder = export(record, store.root / "work" / "mirror" / called, store=store)
        api.create_repo(repo_id=repository, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), repo_type="model", commit_message=f"elmwood {record.digest[:8]}")
        made.append(Mirrored(repository, record.digest))
        tell(made[-1])
    return made
