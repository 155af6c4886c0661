"""The tables of a hub: one schema for SQLite and PostgreSQL.

Columns are whole numbers, floats and text only (values of more than one part are JSON), so both drivers give the same values. Times in
`*_due` and `open_at` are the hub's uptime in seconds; `at` is unix seconds, shown to people and decided by nothing.
"""

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, MetaData, Table, Text, UniqueConstraint

metadata = MetaData()


def _text(name: str, *more, null: bool = False, **options) -> Column:
    return Column(name, Text, *more, nullable=null, **options)


def _int(name: str, *more, null: bool = False, **options) -> Column:
    return Column(name, BigInteger, *more, nullable=null, **options)


def _float(name: str, null: bool = False, **options) -> Column:
    return Column(name, Double, nullable=null, **options)


# ---- one row each ---------------------------------------------------------------------------------------------------

run = Table(
    "run", metadata,
    _int("id", primary_key=True, autoincrement=False),  # 1
    _text("name"),
    _int("version"),  # of the manifest that applies
    _text("atlas", null=True),  # JSON: areas and places of the domain map, for the pages
    _int("faults", default=0),  # verifications that ended without a verdict
)  # fmt: skip
clock = Table("clock", metadata, _int("id", primary_key=True, autoincrement=False), _float("uptime"))
chain = Table(  # the end of the log; a batch of writes on PostgreSQL begins by locking it
    "chain", metadata, _int("id", primary_key=True, autoincrement=False), _int("number"), _text("hash")
)  # fmt: skip
manifest = Table("manifest", metadata, _int("version", primary_key=True, autoincrement=False), _text("signed"))  # JSON of messages.Signed

# ---- people and their machines --------------------------------------------------------------------------------------

account = Table(
    "account", metadata,
    _text("id", primary_key=True),
    _text("name", null=True),  # null: erased
    _text("recovery", null=True),  # sha256 of the recovery code
    _int("at"),
)  # fmt: skip
device = Table(
    "device", metadata,
    _text("key", primary_key=True),
    _text("account", ForeignKey("account.id"), index=True),
    _text("role"),  # member, verifier, admin
    _text("blocked", null=True),  # why
    _int("at"),
)  # fmt: skip
consent = Table(
    "consent", metadata,
    _int("number", primary_key=True, autoincrement=False),
    _text("account", ForeignKey("account.id"), index=True),
    _text("key"),
    _text("licences"),  # canonical JSON of messages.Licences
    _text("proof"),  # JSON: method, target, body, time, nonce and signature of the request
    _int("withdrawn", default=0),
    _int("at"),
)  # fmt: skip
appeal = Table(
    "appeal", metadata,
    _text("id", primary_key=True),
    _text("submission", ForeignKey("submission.id")),
    _text("account", ForeignKey("account.id")),
    _text("text"),
    _int("at"),
)  # fmt: skip

# ---- work -----------------------------------------------------------------------------------------------------------

domain = Table(
    "domain", metadata,
    _int("number", primary_key=True, autoincrement=False),
    _text("name"),
    _text("terms"),  # JSON list
    _text("shards"),  # JSON list of records.Shard
    _int("has_text"),  # 0: volunteers bring their own
    _int("tokens"),
    _text("state"),  # open, leased, submitted, accepted, quarantined
    _int("token"),  # of the last grant; +1 for each
    _float("open_at"),  # not granted before
    _text("expert", null=True),  # the accepted one
    Index("domain_open", "state", "token", "number"),
)  # fmt: skip
lease = Table(
    "lease", metadata,
    _text("id", primary_key=True),
    _int("domain", ForeignKey("domain.number")),
    _int("token"),
    _text("key"),
    _text("account"),
    _text("boot_id"),
    _text("tier"),
    _int("rng_seed"),
    _int("manifest"),
    _text("state"),  # running, paused, uploading, done, released, expired
    _text("why", null=True),  # the deadline that passed: beat, progress, final
    _float("due"),  # the first deadline that counts; hub uptime, as are the others
    _float("beat_due"),
    _float("progress_due"),
    _float("final_due"),
    _float("pause_left"),
    _float("paused_at", null=True),
    _int("step"),
    _text("phase"),
    _float("loss", null=True),
    _text("device"),  # JSON of messages.DeviceFacts
    _text("address", null=True),  # keyed hash of where the claim came from
    _int("at"),
    UniqueConstraint("domain", "token"),
    Index("lease_due", "state", "due"),
    Index("lease_key", "key", "state"),
    Index("lease_account", "account", "state"),
    Index("lease_address", "address", "state"),
)  # fmt: skip
commitment = Table(
    "commitment", metadata,
    _int("number", primary_key=True, autoincrement=False),  # of two equal adapters the smaller wins
    _text("lease", ForeignKey("lease.id"), index=True),
    _text("commitment"),
    UniqueConstraint("lease", "commitment"),
)  # fmt: skip
upload = Table(
    "upload", metadata,
    _text("id", primary_key=True),
    _text("lease", ForeignKey("lease.id"), index=True),
    _int("token"),
    _text("key"),
    _int("bytes"),
    _int("offset"),
    _text("parts"),  # JSON list of bytes of each part, in order
    _text("state"),  # open, whole, gone
    _text("sha", null=True),  # of the whole file
    _float("due"),
    Index("upload_due", "state", "due"),
)  # fmt: skip
submission = Table(
    "submission", metadata,
    _text("id", primary_key=True),
    _text("lease", ForeignKey("lease.id")),
    _int("domain", ForeignKey("domain.number")),
    _int("token"),
    _text("account", ForeignKey("account.id")),
    _text("key"),
    _int("order"),  # number of its commitment
    _text("adapter"),  # sha256 of the uploaded file
    _text("expert", index=True),  # digest of the record that the hub made
    _text("tier"),
    _text("facts"),  # JSON: tokens, curve, hardware, client, as the volunteer says
    _text("state"),  # queued, verifying, accepted, rejected, quarantined
    _text("code", null=True),
    _text("verdict", null=True),
    _text("report", null=True),  # JSON: gain, evidence, noise_floor, advice, seconds
    _int("job_token"),  # of the last verification
    _int("tries"),  # verifications without a verdict
    _int("at"),
    UniqueConstraint("lease", "token"),
    Index("submission_queue", "state", "order"),
    Index("submission_account", "account", "domain"),
)  # fmt: skip
job = Table(
    "job", metadata,
    _text("id", primary_key=True),
    _text("submission", ForeignKey("submission.id")),
    _int("token"),
    _text("key"),
    _text("boot_id"),
    _text("state"),  # running, reported, failed, expired
    _int("version"),  # of the snapshot it verifies against
    _float("done"),
    _text("fault", null=True),
    _text("detail", null=True),
    _float("due"),
    _float("final_due"),
    _int("at"),
    UniqueConstraint("submission", "token"),
    Index("job_due", "state", "due"),
)  # fmt: skip
trial = Table(  # the error budget: one entry for each submission that reached the held-out text
    "trial", metadata,
    _int("number", primary_key=True, autoincrement=False),  # from 0
    _text("submission", ForeignKey("submission.id")),
    _int("version"),  # of the snapshot
    _float("level"),
    _text("sealed"),  # commitment to the key
    _text("key", null=True),  # published once decided
    _int("accepted", null=True),
    UniqueConstraint("submission", "version"),
)  # fmt: skip

# ---- what came of it ------------------------------------------------------------------------------------------------

expert = Table(
    "expert", metadata,
    _text("digest", primary_key=True),
    _text("submission", ForeignKey("submission.id")),
    _int("domain", ForeignKey("domain.number"), index=True),
    _text("account", ForeignKey("account.id"), index=True),
    _text("status"),  # probation, full, retired
    _int("since"),  # version of the snapshot it came with
    _int("until", null=True),  # version of the first snapshot without it
    _text("reason", null=True),  # of its retirement
    _float("full_at"),  # hub uptime at which probation ends
    _float("gain"),
    _int("at"),
)  # fmt: skip
snapshot = Table(
    "snapshot", metadata,
    _int("version", primary_key=True, autoincrement=False),
    _text("signed"),  # JSON of messages.Signed
    _text("forest"),
    _text("ensemble"),
    _text("measured", null=True),  # JSON of messages.Measurement
    _int("at"),
)  # fmt: skip
derived = Table(  # merges, states and mixtures made of experts
    "derived", metadata,
    _text("digest", primary_key=True),
    _text("kind"),
    _int("version"),  # of the snapshot it was made from
    _int("tainted", default=0),  # 1: an expert in it was retired; to be rebuilt
)  # fmt: skip
derived_expert = Table(
    "derived_expert", metadata,
    _text("derived", ForeignKey("derived.digest"), primary_key=True),
    _text("expert", primary_key=True, index=True),
)  # fmt: skip
credit = Table(
    "credit", metadata,
    _int("number", primary_key=True, autoincrement=False),
    _text("account", ForeignKey("account.id"), index=True),
    _float("amount"),  # bits per byte
    _text("kind"),  # gain, compensation
    _text("submission", ForeignKey("submission.id")),
    _text("verdict"),
    UniqueConstraint("submission", "kind"),
)  # fmt: skip
event = Table(
    "event", metadata,
    _int("number", primary_key=True, autoincrement=False),
    _text("kind"),
    _text("subject", index=True),
    _text("facts"),  # JSON
    _int("at"),
    _text("previous"),
    _text("hash"),
)  # fmt: skip
blob = Table(
    "blob", metadata,
    _text("sha", primary_key=True),
    _int("bytes"),
    _int("secret"),  # 1: for verifiers only
    sqlite_with_rowid=False,
)  # fmt: skip
record = Table(
    "record", metadata,
    _text("digest", primary_key=True),
    _text("kind"),
    _text("body"),  # canonical JSON
    _int("secret"),
)  # fmt: skip

# ---- requests -------------------------------------------------------------------------------------------------------

reply = Table(  # the first reply to an Idempotency-Key
    "reply", metadata,
    _text("key", primary_key=True),  # of the device
    _text("name", primary_key=True),  # the Idempotency-Key
    _text("request"),  # sha256 of method, target and body
    _int("status"),
    _text("body"),
    _float("due"),
    sqlite_with_rowid=False,
)  # fmt: skip
nonce = Table(
    "nonce", metadata,
    _text("key", primary_key=True),
    _text("nonce", primary_key=True),
    _int("expires"),  # unix seconds, as signatures are
    sqlite_with_rowid=False,
)  # fmt: skip
