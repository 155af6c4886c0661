"""A lease knows the address that claimed it, as a keyed hash, so that leases of one address are counted."""

from alembic import op
from sqlalchemy import Column, Text

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("lease", Column("address", Text, nullable=True))
    op.create_index("lease_address", "lease", ["address", "state"])
