"""Publish a run: a manifest signed by the root key, whose version only grows and which expires, so it is neither rolled back nor frozen."""

import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import bindparam, func, select, update

from elmwood.domains.publish import ancestors, files_without_text
from elmwood.errors import BadInput
from elmwood.evaluate.sequential.error_budget import commitment
from elmwood.hub import signing
from elmwood.hub.actions import experts, members
from elmwood.hub.actions.request import Moment
from elmwood.hub.blobs import Blobs
from elmwood.hub.database import Connection
from elmwood.hub.home import Home, Hub
from elmwood.hub.messages import RunManifest, Signed
from elmwood.hub.tables import blob, domain, manifest, record, run
from elmwood.records import Corpus, Partition, Record, Seed, canonical
from elmwood.store import Store

_version = select(func.max(manifest.c.version))
_run = update(run).values(version=bindparam("version_"), atlas=bindparam("atlas_"))
_domains = select(domain.c.number)
_domain = (
    update(domain)
    .where(domain.c.number == bindparam("number_"))
    .values(
        name=bindparam("name_"), terms=bindparam("terms_"), shards=bindparam("shards_"), has_text=bindparam("text_"),
        tokens=bindparam("tokens_"),
    )
)  # fmt: skip


def sign_manifest(draft: RunManifest, home: Home, when: Moment, version: int) -> Signed:
    """The manifest as it is published: with its version, the time, the keys and the sealed secret."""
    made = draft.model_copy(
        update={
            "version": version,
            "issued": int(when.unix),
            "hub_key": signing.public(signing.load_key(home.key_path("hub"))),
            "root_key": signing.public(signing.load_key(home.key_path("root"))),
            "secret": commitment(home.secret),
        }
    )
    return signing.sign(made, signing.load_key(home.key_path("root")))


def publish(draft: RunManifest, hub: Hub, texts: Iterable[bytes] = (), atlas: str | None = None) -> Signed:
    """Publish a run, or its next version: what it names is entered and reachable. `texts`: of the licences. Raises BadInput."""
    store, when = hub.home.store, hub.moment()
    seed, partition = store.load(draft.seed, Seed), store.load(draft.partition, Partition)
    if draft.ensemble.seed_distance is None:
        raise BadInput(
            "the run's ensemble has no seed_distance, so a first expert is used on all text and refused: set one, 0.8 is a good start"
        )
    for text in texts:
        store.put(text)
    open_blobs, secret_blobs = _blobs(draft, seed, partition, store)
    records, secret_records = _records(draft, seed, partition, store)
    sizes = {name: _send(name, hub.blobs, store) for name in sorted(open_blobs | secret_blobs)}
    _check_texts(draft, sizes)

    def write(c: Connection) -> Signed:
        version = (c.value(_version) or 0) + 1
        signed = sign_manifest(draft, hub.home, when, version)
        c.insert(manifest, version=version, signed=signed.model_dump_json())
        for name, size in sizes.items():
            c.insert(blob, ignore=True, sha=name[7:], bytes=size, secret=int(name not in open_blobs))
        for made, secret in [(one, 0) for one in records] + [(one, 1) for one in secret_records]:
            c.insert(record, ignore=True, digest=made.digest, kind=made.kind, body=canonical(made).decode(), secret=secret)
        known = {row["number"] for row in c.all(_domains)}
        for one in draft.domains:
            shards = json.dumps([shard.model_dump() for shard in one.shards])
            fields: dict[str, Any] = {"name": one.name, "terms": json.dumps(one.terms), "shards": shards, "tokens": one.tokens}
            if one.number in known:
                c.run(_domain, number_=one.number, text_=int(bool(one.shards)), **{f"{name}_": value for name, value in fields.items()})
            else:
                c.insert(domain, number=one.number, has_text=int(bool(one.shards)), state="open", token=0, open_at=0.0, **fields)
        if version == 1:
            c.insert(run, id=1, name=draft.run, version=version, atlas=atlas, faults=0)
            for role in ("admin", "verifier"):
                members.trust(c, signing.public(signing.load_key(hub.home.key_path(role))), role, when)
        else:
            c.run(_run, version_=version, atlas_=atlas)
        if experts.newest(c) is None:
            experts.take_snapshot(c, when, hub.office)
        return signed

    return hub.database.write(write)


def _blobs(draft: RunManifest, seed: Seed, partition: Partition, store: Store) -> tuple[set[str], set[str]]:
    """Blobs that everybody may fetch, and those for verifiers alone: the held-out text."""
    everybody = set(seed.files.values()) | set(files_without_text(partition, store).values())
    everybody |= {shard.blob for one in draft.domains for shard in one.shards}
    everybody |= {draft.licences.data, draft.licences.contribution, draft.licences.disk}
    everybody |= {tier.config for tier in draft.tiers.values()}
    held_out = {shard.blob for one in partition.domains for shard in one.holdout}
    if store.has(partition.corpus):
        held_out |= {shard.blob for shard in store.load(partition.corpus, Corpus).holdout}
    return everybody, {name for name in held_out - everybody if store.has(name)}


def _records(draft: RunManifest, seed: Seed, partition: Partition, store: Store) -> tuple[list[Record], list[Record]]:
    """Records that everybody may fetch, and the corpus, whose held-out shards only verifiers get."""
    everybody: list[Record] = [seed, *ancestors(partition, store), draft.ensemble]
    if store.has(draft.ensemble.forest):
        everybody.append(store.read(draft.ensemble.forest))
    return everybody, [store.load(partition.corpus)] if store.has(partition.corpus) else []


def _send(name: str, blobs: Blobs, store: Store) -> int:
    """Bring a blob of the store into the hub's blobs, where they are elsewhere; its size."""
    path = store.get(name)
    blobs.put(name[7:], path)
    return path.stat().st_size


def _check_texts(draft: RunManifest, sizes: dict[str, int]) -> None:
    empty = [one.name for one in draft.domains if one.shards and any(shard.blob not in sizes for shard in one.shards)]
    if empty:
        raise BadInput(
            f"domain {empty[0]!r} names shards that are not in this store: publish it without text, or from the store that has them"
        )
