"""A run: its domains, tiers, gate, terms and limits, signed by the maintainer."""

from typing import Annotated

from pydantic import Field, StringConstraints

from elmwood.evaluate.admission import Policy
from elmwood.hub.messages.words import Key, Label, Natural, Seconds, Signed, TierName
from elmwood.records import Blob, Digest, Ensemble, Frozen, Recipe, Shard


class RunDomain(Frozen):
    """A domain to train on. Without shards, a volunteer brings text of their own that routes to it."""

    number: Natural  # in the partition
    name: Label
    terms: tuple[Label, ...] = ()
    shards: tuple[Shard, ...] = ()
    tokens: Natural = 0


class Tier(Frozen):
    """What a class of machines trains. The hub gives each lease its own `rng_seed`."""

    recipe: Recipe
    tensors: dict[Label, tuple[Natural, ...]]  # name -> shape of each tensor of the adapter, exactly these
    config: Blob  # adapter_config.json, which the hub puts beside the tensors
    bytes: Natural  # of an adapter's file, at most
    memory: Natural = 0  # bytes of the device that training needs, as `fit` says; 0: not known


class Terms(Frozen):
    """How long a lease lives. All durations count the hub's uptime."""

    beat_s: Seconds = 120.0  # between beats; three missed ones end the lease
    progress_s: Seconds = 1800.0  # without a further step
    final_s: Seconds = 7 * 86400.0  # from the grant to the submission
    pause_s: Seconds = 86400.0  # paused, in all


class Gate(Frozen):
    """How submissions are verified; fixed before the first one."""

    policy: Policy = Policy()
    budget: float = Field(0.1, gt=0, lt=1)  # expected share of wrong acceptances among all acceptances
    length: Natural | None = None  # tokens of a window; None: what the seed's context gives
    documents: Natural | None = None  # of the holdout, at most
    cap: Natural = 5000  # blocks for each question, at most
    clip: Annotated[float, Field(gt=0, le=10)] = 0.5  # bits per byte
    norm_low: Annotated[float, Field(ge=0)] = 0.4  # of the median norm of accepted deltas; looked at where three are accepted
    norm_high: Annotated[float, Field(gt=0)] = 2.5
    tries: Annotated[int, Field(gt=0, le=20)] = 3  # verifications without a verdict before a person decides
    job_s: Seconds = 7200.0  # a verification takes at most so long
    job_beat_s: Seconds = 60.0
    at_once: Annotated[int, Field(gt=0, le=1000)] = 1  # verifications; a verdict on a forest that has changed meanwhile does not count
    cooldown_s: Annotated[float, Field(ge=0, le=1e9)] = 60.0  # before the domain of a rejected expert opens again
    probation_s: Annotated[float, Field(ge=0, le=1e9)] = 7 * 86400.0


class Limits(Frozen):
    """What the hub takes from one caller."""

    adapter_bytes: Natural = 512 << 20
    chunk_bytes: Natural = 8 << 20  # of an upload's PATCH
    upload_s: Seconds = 86400.0  # before an upload that nobody continues is removed
    leases_per_account: Annotated[int, Field(gt=0, le=1000)] = 4
    devices_per_account: Annotated[int, Field(gt=0, le=1000)] = 32
    accounts_per_hour: Annotated[int, Field(gt=0)] = 60  # from one address
    requests_per_minute: Annotated[int, Field(gt=0)] = 600  # of one key
    leases_per_address: Annotated[int, Field(gt=0)] = 64  # live ones; an IPv6 address counts as its first 64 bits


class Licences(Frozen):
    """Texts that a volunteer agrees to, as blobs of UTF-8 text."""

    data: Blob  # of the training shards
    contribution: Blob  # of the adapters that volunteers give
    disk: Blob  # what stays on the volunteer's disk


class RunManifest(Frozen):
    """A run, signed by the root key. Versions only grow; it is void `expires_s` after `issued`."""

    run: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    version: Annotated[int, Field(gt=0, lt=1 << 53)]
    issued: Natural  # unix seconds
    expires_s: Seconds
    seed: Digest
    partition: Digest
    ensemble: Ensemble  # the settings of the shared ensemble; its forest has no expert yet
    domains: tuple[RunDomain, ...]
    tiers: dict[TierName, Tier]
    gate: Gate = Gate()
    licences: Licences
    limits: Limits = Limits()
    terms: Terms = Terms()
    minimum_client: Label = "0"
    hub_key: Key
    root_key: Key
    secret: str = ""  # "key-" and the sha256 of the secret that orders and slices the held-out blocks


class RunReply(Frozen):
    """GET /v1/run"""

    manifest: Signed  # RunManifest
