"""The first schema, as it was: later changes of elmwood/hub/tables.py have a revision of their own."""

from alembic import op
from sqlalchemy import BigInteger, Column, Double, ForeignKey, PrimaryKeyConstraint, Text, UniqueConstraint

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "account",
        Column("id", Text, primary_key=True, nullable=False),
        Column("name", Text, nullable=True),
        Column("recovery", Text, nullable=True),
        Column("at", BigInteger, nullable=False),
    )
    op.create_table(
        "blob",
        Column("sha", Text, primary_key=True, nullable=False),
        Column("bytes", BigInteger, nullable=False),
        Column("secret", BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "chain",
        Column("id", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("number", BigInteger, nullable=False),
        Column("hash", Text, nullable=False),
    )
    op.create_table(
        "clock",
        Column("id", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("uptime", Double, nullable=False),
    )
    op.create_table(
        "derived",
        Column("digest", Text, primary_key=True, nullable=False),
        Column("kind", Text, nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("tainted", BigInteger, nullable=False),
    )
    op.create_table(
        "domain",
        Column("number", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("name", Text, nullable=False),
        Column("terms", Text, nullable=False),
        Column("shards", Text, nullable=False),
        Column("has_text", BigInteger, nullable=False),
        Column("tokens", BigInteger, nullable=False),
        Column("state", Text, nullable=False),
        Column("token", BigInteger, nullable=False),
        Column("open_at", Double, nullable=False),
        Column("expert", Text, nullable=True),
    )
    op.create_index("domain_open", "domain", ["state", "token", "number"])
    op.create_table(
        "event",
        Column("number", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("kind", Text, nullable=False),
        Column("subject", Text, nullable=False),
        Column("facts", Text, nullable=False),
        Column("at", BigInteger, nullable=False),
        Column("previous", Text, nullable=False),
        Column("hash", Text, nullable=False),
    )
    op.create_index("ix_event_subject", "event", ["subject"])
    op.create_table(
        "manifest",
        Column("version", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("signed", Text, nullable=False),
    )
    op.create_table(
        "nonce",
        Column("key", Text, nullable=False),
        Column("nonce", Text, nullable=False),
        Column("expires", BigInteger, nullable=False),
        PrimaryKeyConstraint("key", "nonce"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "record",
        Column("digest", Text, primary_key=True, nullable=False),
        Column("kind", Text, nullable=False),
        Column("body", Text, nullable=False),
        Column("secret", BigInteger, nullable=False),
    )
    op.create_table(
        "reply",
        Column("key", Text, nullable=False),
        Column("name", Text, nullable=False),
        Column("request", Text, nullable=False),
        Column("status", BigInteger, nullable=False),
        Column("body", Text, nullable=False),
        Column("due", Double, nullable=False),
        PrimaryKeyConstraint("key", "name"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "run",
        Column("id", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("name", Text, nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("atlas", Text, nullable=True),
        Column("faults", BigInteger, nullable=False),
    )
    op.create_table(
        "snapshot",
        Column("version", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("signed", Text, nullable=False),
        Column("forest", Text, nullable=False),
        Column("ensemble", Text, nullable=False),
        Column("measured", Text, nullable=True),
        Column("at", BigInteger, nullable=False),
    )
    op.create_table(
        "consent",
        Column("number", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("account", Text, ForeignKey("account.id"), nullable=False),
        Column("key", Text, nullable=False),
        Column("licences", Text, nullable=False),
        Column("proof", Text, nullable=False),
        Column("withdrawn", BigInteger, nullable=False),
        Column("at", BigInteger, nullable=False),
    )
    op.create_index("ix_consent_account", "consent", ["account"])
    op.create_table(
        "derived_expert",
        Column("derived", Text, ForeignKey("derived.digest"), nullable=False),
        Column("expert", Text, nullable=False),
        PrimaryKeyConstraint("derived", "expert"),
    )
    op.create_index("ix_derived_expert_expert", "derived_expert", ["expert"])
    op.create_table(
        "device",
        Column("key", Text, primary_key=True, nullable=False),
        Column("account", Text, ForeignKey("account.id"), nullable=False),
        Column("role", Text, nullable=False),
        Column("blocked", Text, nullable=True),
        Column("at", BigInteger, nullable=False),
    )
    op.create_index("ix_device_account", "device", ["account"])
    op.create_table(
        "lease",
        Column("id", Text, primary_key=True, nullable=False),
        Column("domain", BigInteger, ForeignKey("domain.number"), nullable=False),
        Column("token", BigInteger, nullable=False),
        Column("key", Text, nullable=False),
        Column("account", Text, nullable=False),
        Column("boot_id", Text, nullable=False),
        Column("tier", Text, nullable=False),
        Column("rng_seed", BigInteger, nullable=False),
        Column("manifest", BigInteger, nullable=False),
        Column("state", Text, nullable=False),
        Column("why", Text, nullable=True),
        Column("due", Double, nullable=False),
        Column("beat_due", Double, nullable=False),
        Column("progress_due", Double, nullable=False),
        Column("final_due", Double, nullable=False),
        Column("pause_left", Double, nullable=False),
        Column("paused_at", Double, nullable=True),
        Column("step", BigInteger, nullable=False),
        Column("phase", Text, nullable=False),
        Column("loss", Double, nullable=True),
        Column("device", Text, nullable=False),
        Column("at", BigInteger, nullable=False),
        UniqueConstraint("domain", "token"),
    )
    op.create_index("lease_account", "lease", ["account", "state"])
    op.create_index("lease_due", "lease", ["state", "due"])
    op.create_index("lease_key", "lease", ["key", "state"])
    op.create_table(
        "commitment",
        Column("number", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("lease", Text, ForeignKey("lease.id"), nullable=False),
        Column("commitment", Text, nullable=False),
        UniqueConstraint("lease", "commitment"),
    )
    op.create_index("ix_commitment_lease", "commitment", ["lease"])
    op.create_table(
        "submission",
        Column("id", Text, primary_key=True, nullable=False),
        Column("lease", Text, ForeignKey("lease.id"), nullable=False),
        Column("domain", BigInteger, ForeignKey("domain.number"), nullable=False),
        Column("token", BigInteger, nullable=False),
        Column("account", Text, ForeignKey("account.id"), nullable=False),
        Column("key", Text, nullable=False),
        Column("order", BigInteger, nullable=False),
        Column("adapter", Text, nullable=False),
        Column("expert", Text, nullable=False),
        Column("tier", Text, nullable=False),
        Column("facts", Text, nullable=False),
        Column("state", Text, nullable=False),
        Column("code", Text, nullable=True),
        Column("verdict", Text, nullable=True),
        Column("report", Text, nullable=True),
        Column("job_token", BigInteger, nullable=False),
        Column("tries", BigInteger, nullable=False),
        Column("at", BigInteger, nullable=False),
        UniqueConstraint("lease", "token"),
    )
    op.create_index("ix_submission_expert", "submission", ["expert"])
    op.create_index("submission_account", "submission", ["account", "domain"])
    op.create_index("submission_queue", "submission", ["state", "order"])
    op.create_table(
        "upload",
        Column("id", Text, primary_key=True, nullable=False),
        Column("lease", Text, ForeignKey("lease.id"), nullable=False),
        Column("token", BigInteger, nullable=False),
        Column("key", Text, nullable=False),
        Column("bytes", BigInteger, nullable=False),
        Column("offset", BigInteger, nullable=False),
        Column("parts", Text, nullable=False),
        Column("state", Text, nullable=False),
        Column("sha", Text, nullable=True),
        Column("due", Double, nullable=False),
    )
    op.create_index("ix_upload_lease", "upload", ["lease"])
    op.create_index("upload_due", "upload", ["state", "due"])
    op.create_table(
        "appeal",
        Column("id", Text, primary_key=True, nullable=False),
        Column("submission", Text, ForeignKey("submission.id"), nullable=False),
        Column("account", Text, ForeignKey("account.id"), nullable=False),
        Column("text", Text, nullable=False),
        Column("at", BigInteger, nullable=False),
    )
    op.create_table(
        "credit",
        Column("number", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("account", Text, ForeignKey("account.id"), nullable=False),
        Column("amount", Double, nullable=False),
        Column("kind", Text, nullable=False),
        Column("submission", Text, ForeignKey("submission.id"), nullable=False),
        Column("verdict", Text, nullable=False),
        UniqueConstraint("submission", "kind"),
    )
    op.create_index("ix_credit_account", "credit", ["account"])
    op.create_table(
        "expert",
        Column("digest", Text, primary_key=True, nullable=False),
        Column("submission", Text, ForeignKey("submission.id"), nullable=False),
        Column("domain", BigInteger, ForeignKey("domain.number"), nullable=False),
        Column("account", Text, ForeignKey("account.id"), nullable=False),
        Column("status", Text, nullable=False),
        Column("since", BigInteger, nullable=False),
        Column("until", BigInteger, nullable=True),
        Column("reason", Text, nullable=True),
        Column("full_at", Double, nullable=False),
        Column("gain", Double, nullable=False),
        Column("at", BigInteger, nullable=False),
    )
    op.create_index("ix_expert_account", "expert", ["account"])
    op.create_index("ix_expert_domain", "expert", ["domain"])
    op.create_table(
        "job",
        Column("id", Text, primary_key=True, nullable=False),
        Column("submission", Text, ForeignKey("submission.id"), nullable=False),
        Column("token", BigInteger, nullable=False),
        Column("key", Text, nullable=False),
        Column("boot_id", Text, nullable=False),
        Column("state", Text, nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("done", Double, nullable=False),
        Column("fault", Text, nullable=True),
        Column("detail", Text, nullable=True),
        Column("due", Double, nullable=False),
        Column("final_due", Double, nullable=False),
        Column("at", BigInteger, nullable=False),
        UniqueConstraint("submission", "token"),
    )
    op.create_index("job_due", "job", ["state", "due"])
    op.create_table(
        "trial",
        Column("number", BigInteger, primary_key=True, autoincrement=False, nullable=False),
        Column("submission", Text, ForeignKey("submission.id"), nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("level", Double, nullable=False),
        Column("sealed", Text, nullable=False),
        Column("key", Text, nullable=True),
        Column("accepted", BigInteger, nullable=True),
        UniqueConstraint("submission", "version"),
    )
