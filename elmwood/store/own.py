"""What this store knows to be its own work, and what it took over as the claim of another."""

from elmwood.records import Digest, Record, fingerprint
from elmwood.store import Store, read_ref


def keep_own(record: Record, store: Store) -> None:
    """Store a record, and that it was made here."""
    store.finish(fingerprint("own", record.digest), record)


def made_here(store: Store) -> set[Digest]:
    """Digests of all records that finished tasks of this store made. Contests and comparisons of older versions are not among them: the
    command that made one, run again, enters it."""
    return {read_ref(path) for path in (store.root / "refs" / "done").glob("*")}


def keep_claim(record: Record, store: Store) -> None:
    """Enter that a record came from another store, and nobody checked it here."""
    store.finish(fingerprint("claim", record.digest), record)


def is_claim(digest: Digest, store: Store) -> bool:
    """Whether `keep_claim` entered it, and nothing here has made the same since."""
    return store.find_done(fingerprint("claim", digest)) is not None and store.find_done(fingerprint("own", digest)) is None
