"""A snapshot of a hub, brought into the user's store: what is missing, every byte checked, names set. And on to a model hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged
from elmwood.hub.client.enter import fetch_manifest
from elmwood.hub.client.gate import CONFIG, WEIGHTS, check_adapter
from elmwood.hub.client.http import PATIENCE, Hub, Problem, Unreachable
from elmwood.hub.client.join import fetch_partition, fetch_seed
from elmwood.hub.client.state import Folder, State, open_folder
from elmwood.hub.client.transfer import fetch_blobs, fetch_record
from elmwood.hub.messages import RunManifest, Signed, Snapshot
from elmwood.hub.signing import Forged, digest, open_signed
from elmwood.records import Ensemble, Expert, Forest, Merged, Mixture, Record
from elmwood.store import AnyStore, Named, Store
from elmwood.study.exporting import export


class NoExpert(BadInput):
    """A run whose forest has no expert yet."""

    def __init__(self, manifest: RunManifest):
        super().__init__(f"run {manifest.run!r} has no expert yet: there is nothing to pull; the first one makes the first ensemble")
        self.manifest = manifest


class Pulled(NamedTuple):
    """A snapshot that is in the store."""

    snapshot: Snapshot
    ensemble: Ensemble
    name: str  # of the names set: NAME/ensemble, NAME/forest, NAME/seed, NAME/partition, NAME/expert/<domain>
    fetched: int  # files that were missing
    until: float  # unix seconds: the manifest is not valid after

    @property
    def record(self) -> Ensemble:
        return self.ensemble


def pull(
    url: str, store: AnyStore = None, *, name: str | None = None, version: int | None = None, folder: Path | None = None,
    patience: float = PATIENCE, progress: Progress = silent,
) -> Pulled:  # fmt: skip
    """Bring a hub's newest snapshot, or an older version of it, into the store. Names of experts that it no longer has are removed.
    `patience`: seconds that a hub which does not answer is asked again.

    Raises BadInput, Forged, Damaged, Unreachable, Problem.
    """
    store = Store(store)
    place, hub = open_folder(url, store, folder), Hub(url, patience=patience)
    try:
        with place.alone():
            manifest = fetch_manifest(hub, place)
            snapshot = fetch_snapshot(hub, manifest, place, version)
            called = name or manifest.run
            store.check_name(f"{called}/ensemble")
            if not snapshot.experts:
                raise NoExpert(manifest)
            count = _fetch(snapshot, manifest, hub, store, progress)
            if version is None:
                place.change(snapshot=snapshot.version, snapshot_digest=digest(snapshot))
    finally:
        hub.close()
    ensemble = store.load(snapshot.ensemble, Ensemble)
    _set_names(snapshot, ensemble, manifest, called, store)
    return Pulled(snapshot, ensemble, called, count, manifest.issued + manifest.expires_s)


def fetch_snapshot(hub: Hub, manifest: RunManifest, place: Folder, version: int | None = None) -> Snapshot:
    """A snapshot, signed by the key that the manifest names, and, where it is the newest, one that follows from the last one seen. Raises
    BadInput, Forged."""
    signed = Signed.model_validate_json(hub.get("/v1/snapshot" + ("" if version is None else f"?version={version}")).body)
    snapshot = open_signed(signed, Snapshot, manifest.hub_key)
    state = place.read()
    if snapshot.run != manifest.run or (version is not None and snapshot.version != version):
        raise BadInput(f"the hub shows version {snapshot.version} of run {snapshot.run!r}, which was not asked for: nothing was changed")
    if version is None and snapshot.version < state.snapshot:
        raise BadInput(
            f"the hub shows snapshot {snapshot.version}, and {state.snapshot} was here before: it was rolled back; nothing was changed"
        )
    if version is None and state.snapshot_digest:
        _check_chain(snapshot, state, hub)
    return snapshot


def _check_chain(snapshot: Snapshot, state: State, hub: Hub) -> None:
    """Each snapshot names the digest of the one before it, back to the last one seen. Raises Forged."""
    named: str | None = digest(snapshot)
    while True:
        if snapshot.version <= state.snapshot:
            if (snapshot.version, named) == (state.snapshot, state.snapshot_digest):
                return
            break
        named, before = snapshot.parent, snapshot.version - 1
        if before == state.snapshot:
            if named == state.snapshot_digest:
                return
            break
        snapshot = Snapshot.model_validate(Signed.model_validate_json(hub.get(f"/v1/snapshot?version={before}").body).body)
        if digest(snapshot) != named:
            break
    raise Forged(
        f"the hub's snapshots do not go back to snapshot {state.snapshot} that was here before: its history was rewritten; "
        "nothing was changed; ask who runs the hub"
    )


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
    for one, record in names.items():
        store.name(one, record)


# ---- again and again --------------------------------------------------------------------------------------------------


class Following:
    """The newest snapshot of a hub, in the store, for who asks again and again: no more than a question where nothing is new.

    Its folder is its own, so that a volunteer may work for the same hub in the same store.
    """

    def __init__(self, url: str, store: AnyStore = None, *, name: str | None = None, root_key: str | None = None):
        """`root_key`: the public key that must have signed the manifest; by default that of the first one seen. Raises BadInput."""
        self.url, self.store, self.name = url, Store(store), name
        self.folder = Folder(self.store.root / "serve" / open_folder(url, self.store).path.name)
        self.model = self.tag = self.served = ""  # the ensemble's name and digest, once they are known
        self.until = 0.0  # unix seconds: the manifest is not valid after
        if root_key:
            if self.folder.read().root_key not in ("", root_key):
                raise BadInput(
                    f"{self.folder.file} knows another root key of this hub: delete it if the hub was made anew, or ask who runs it"
                )
            self.folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.change(root_key=root_key)

    def newest(self, progress: Progress = silent, patience: float = 0.0) -> str:
        """The digest of the newest snapshot's ensemble, or, where it has no expert, of the seed; it is in the store, under the ensemble's
        name. Raises BadInput, Forged, Damaged, Unreachable, Problem."""
        hub = Hub(self.url, patience=patience)
        try:
            reply = hub.get("/v1/snapshot", **{"If-None-Match": self.tag} if self.tag else {})
            if reply.status == 304 and hub.clock() + hub.skew <= self.until:
                return self.served
            try:
                found = pull(self.url, self.store, name=self.name, folder=self.folder.path, patience=patience, progress=progress)
                name, self.served, self.until = found.name, found.ensemble.digest, found.until
            except NoExpert as error:
                name, manifest = self.name or error.manifest.run, error.manifest
                self.served, self.until = fetch_seed(manifest.seed, hub, self.store, progress).digest, manifest.issued + manifest.expires_s
                self.store.name(f"{name}/ensemble", self.served)
        finally:
            hub.close()
        self.model, self.tag = f"{name}/ensemble", reply.headers.get("etag", "")
        (self.folder.path / "model").write_text(f"{self.model}\n", encoding="utf-8")
        return self.served

    def begin(self, progress: Progress = silent, tell: Callable[[str], None] = lambda said: None) -> str:
        """The newest ensemble; where the hub does not answer, which is told, the last one that was here. Raises as `newest` does."""
        try:
            return self.newest(progress)
        except (Unreachable, Problem) as error:
            last = self.folder.path / "model"
            if not last.exists() or (isinstance(error, Problem) and not error.retryable):
                raise
            tell(f"{error}; the last snapshot that came is served meanwhile")
            self.model = last.read_text(encoding="utf-8").strip()
            return self.store.resolve(self.model)


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
    for member in found.experts:
        expert = store.load(member, Expert)
        records.append((f"{prefix}-expert-{expert.domain}-{member[:8]}", expert))
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
