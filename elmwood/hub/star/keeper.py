"""The state of a star in a database, SQLite or PostgreSQL, and the one process that may change it.

Each coordinator takes the lead with an epoch of its own, one higher than the last, for some seconds at a time. Every write looks at the
epoch in its own transaction: a process that stood still while another took over changes nothing when it wakes.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import BigInteger, Column, Double, MetaData, Table, Text, bindparam, select, update

from elmwood.errors import BadInput, UnknownName
from elmwood.hub.database import Connection, Database
from elmwood.hub.migrations import begin_chain, changing
from elmwood.hub.tables import chain
from elmwood.outer.round import State
from elmwood.records import Digest, Fate, Version

T = TypeVar("T")
HOLD = 20.0  # seconds that a lead lasts without a sign of life

metadata = MetaData()
leader = Table(
    "star_leader", metadata,
    Column("star", Text, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
    Column("expires", Double, nullable=False),  # unix seconds
)  # fmt: skip
state = Table("star_state", metadata, Column("star", Text, primary_key=True), Column("body", Text, nullable=False))  # JSON of State
version = Table(
    "star_version", metadata,
    Column("star", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", Text, nullable=False),
)  # fmt: skip
receipt = Table(
    "star_receipt", metadata,
    Column("star", Text, primary_key=True),
    Column("proposal", Text, primary_key=True),
    Column("body", Text, nullable=False),  # JSON of Fate
)  # fmt: skip

_leader = select(leader).where(leader.c.star == bindparam("name"))
_lead = update(leader).where(leader.c.star == bindparam("name")).values(
    epoch=bindparam("epoch_"), holder=bindparam("holder_"), expires=bindparam("expires_")
)  # fmt: skip
_state = select(state.c.body).where(state.c.star == bindparam("name"))
_keep = update(state).where(state.c.star == bindparam("name")).values(body=bindparam("body_"))
_versions = select(version.c.digest).where(version.c.star == bindparam("name")).order_by(version.c.number)
_version = select(version.c.digest).where(version.c.star == bindparam("name"), version.c.number == bindparam("n"))
_receipt = select(receipt.c.body).where(receipt.c.star == bindparam("name"), receipt.c.proposal == bindparam("id"))


class Deposed(BadInput):
    """This process does not lead, or no longer does. Nothing was written."""


class Keeper:
    """The state of the star `name` in a database. `clock`: unix seconds, for the lead alone; `holder`: who this process says it is."""

    def __init__(self, url: str, name: str, holder: str = "", clock: Callable[[], float] = time.time, hold: float = HOLD):
        self.name, self.holder, self.clock, self.hold = name, holder, clock, hold
        self.epoch = 0
        self.database = Database(url)
        _upgrade(url)

    def close(self) -> None:
        """Give the lead back, and close."""
        if self.epoch:
            self.database.write(self._resign)
        self.database.close()

    # ---- the lead

    def lead(self) -> int:
        """Take the lead; the epoch. Raises Deposed while another process has it."""

        def take(c: Connection) -> int:
            row, now = c.one(_leader, name=self.name), self.clock()
            if row and row["expires"] > now and row["holder"] != self.holder:
                left = row["expires"] - now
                raise Deposed(f"another process ({row['holder']}) leads star {self.name!r} for {left:.0f} s yet: stop it, or wait")
            epoch = (row["epoch"] if row else 0) + 1
            if row:
                c.run(_lead, name=self.name, epoch_=epoch, holder_=self.holder, expires_=now + self.hold)
            else:
                c.insert(leader, star=self.name, epoch=epoch, holder=self.holder, expires=now + self.hold)
            return epoch

        self.epoch = self.database.write(take)
        return self.epoch

    def renew(self) -> None:
        """A sign of life. Raises Deposed."""
        self.database.write(self._renew)

    def _renew(self, c: Connection) -> None:
        self._fence(c)
        c.run(_lead, name=self.name, epoch_=self.epoch, holder_=self.holder, expires_=self.clock() + self.hold)

    def _resign(self, c: Connection) -> None:
        row = c.one(_leader, name=self.name)
        if row and row["epoch"] == self.epoch:
            c.run(_lead, name=self.name, epoch_=self.epoch, holder_="", expires_=0.0)

    def _fence(self, c: Connection) -> None:
        row = c.one(_leader, name=self.name)
        if not self.epoch or row is None or row["epoch"] != self.epoch:
            raise Deposed(f"this process led star {self.name!r} in epoch {self.epoch}, now is {row['epoch'] if row else 0}: start it again")
        if row["expires"] < self.clock():
            raise Deposed(f"this process gave no sign of life for {self.hold:.0f} s, and leads star {self.name!r} no more: start it again")

    # ---- the state

    def begin(self, first: State, start: Version) -> None:
        """The state of a new star; nothing changes where it has one. Raises Deposed."""

        def write(c: Connection) -> None:
            self._fence(c)
            if c.value(_state, name=self.name) is None:
                c.insert(state, star=self.name, body=first.model_dump_json())
                c.insert(version, star=self.name, number=0, digest=start.digest)

        self.database.write(write)

    def read(self) -> State:
        """Raises UnknownName."""
        return self.database.read(self._read)

    def _read(self, c: Connection) -> State:
        body = c.value(_state, name=self.name)
        if body is None:
            raise UnknownName(f"there is no star {self.name!r} in this database: `elmwood star serve` begins one")
        return State.model_validate_json(body)

    def write(self, fn: Callable[[State], tuple[State, T]], version_of: Callable[[T], Version | None] = lambda made: None) -> T:
        """Replace the state by what `fn` makes of it, in one transaction of the leader. `version_of`: the version that `fn` made, which
        joins the chain in it. Rejections at the door and the fates of that version become receipts. Raises Deposed, and what `fn` raises.
        """

        def change(c: Connection) -> T:
            self._fence(c)
            before = self._read(c)
            after, made = fn(before)
            joined = version_of(made)
            if joined:
                c.insert(version, star=self.name, number=joined.number, digest=joined.digest)
            told = [*(joined.fates if joined else ()), *after.doors[0 if joined else len(before.doors) :]]
            for fate in told:
                c.insert(receipt, ignore=True, star=self.name, proposal=fate.proposal, body=fate.model_dump_json())
            if after is not before:
                c.run(_keep, name=self.name, body_=after.model_dump_json())
            return made

        return self.database.write(change)

    def receipt(self, id: str) -> Fate | None:
        """What became of a proposal; None while it waits."""
        body = self.database.read(lambda c: c.value(_receipt, name=self.name, id=id))
        return None if body is None else Fate.model_validate_json(body)

    def digest(self, number: int) -> Digest | None:
        """Of a version."""
        return self.database.read(lambda c: c.value(_version, name=self.name, n=number))

    def chain(self) -> list[Digest]:
        """All versions, from the first."""
        return self.database.read(lambda c: [row["digest"] for row in c.all(_versions, name=self.name)])


def _upgrade(url: str) -> None:
    """Make the tables where they are missing, beside those of a hub or alone."""
    with changing(url, 7368002) as connection:
        metadata.create_all(connection)
        chain.create(connection, checkfirst=True)  # whose row every batch of writes locks on PostgreSQL
        begin_chain(connection)
