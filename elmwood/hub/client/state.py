"""What a volunteer's client keeps on disk, so that it goes on after kill -9 at any point: a file that is replaced whole at each step.

Keys of requests that must not count twice are in it before the request is sent, or follow from the lease.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import ValidationError

from elmwood.errors import BadInput, Damaged
from elmwood.hub.messages import Grant, Licences, SubmissionReply
from elmwood.records import Frozen, Point, fingerprint
from elmwood.store import Store
from elmwood.store.disk import locked, write_whole

WorkPhase = Literal["fetching", "training", "committing", "uploading", "submitting"]


class Work(Frozen):
    """A lease, and how far the work on it is."""

    grant: Grant
    phase: WorkPhase = "fetching"
    adapter: str = ""  # sha256 of the file, which is in the store
    tokens: int = 0  # trained on
    curve: tuple[Point, ...] = ()
    probe: tuple[float, ...] = ()
    salt: str = ""
    upload: str = ""


class State(Frozen):
    """All that a client knows of one hub."""

    account: str = ""
    root_key: str = ""  # that signed the first manifest, and must sign all others
    manifest: int = 0  # the highest version seen
    snapshot: int = 0  # the highest version pulled
    snapshot_digest: str = ""  # of that one; each names the one before
    consent: Licences | None = None  # agreed to
    claim: str = ""  # the idempotency key of a claim without an answer
    work: Work | None = None
    lost: int | None = None  # the domain of a lease that ended here: its training goes on if it can be had again
    pending: tuple[str, ...] = ()  # submissions without a verdict
    failures: int = 0  # of training, one after another


class Folder:
    """The folder of a client: its state, its key, the recovery code of its account."""

    def __init__(self, path: Path):
        self.path = path
        self.key, self.recovery, self.paused = path / "key", path / "recovery", path / "paused"

    @property
    def file(self) -> Path:
        return self.path / "state.json"

    def read(self) -> State:
        """Raises Damaged."""
        if not self.file.exists():
            return State()
        try:
            return State.model_validate_json(self.file.read_bytes())
        except (ValidationError, ValueError) as error:
            raise Damaged(
                f"{self.file} cannot be read: delete it, and the client asks the hub for its lease again; keep the key"
            ) from error

    def write(self, state: State) -> State:
        write_whole(self.file, state.model_dump_json(indent=1).encode())
        return state

    def change(self, **fields: Any) -> State:
        """Replace fields of the state."""
        return self.write(State.model_validate(self.read().model_dump() | fields))

    def change_work(self, **fields: Any) -> Work:
        """Replace fields of the work under way."""
        work = self.read().work
        assert work
        changed = Work.model_validate(work.model_dump() | fields)
        self.change(work=changed.model_dump())
        return changed

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For one process at a time: a second one would beat for the same lease. Raises BadInput."""

        def refuse(done: int) -> None:
            raise BadInput(f"another process works in {self.path}: stop it, or give this one a folder of its own with --folder")

        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self.path / "lock", refuse):
            yield


def open_folder(url: str, store: Store, given: Path | None = None) -> Folder:
    """The folder of the client of a hub: the given one, or one in the store."""
    parts = urlsplit(url)
    host = "".join(one if one.isalnum() or one in ".-" else "_" for one in f"{parts.hostname}-{parts.port or 443}{parts.path}")
    return Folder(given or store.root / "join" / host)


def new_code() -> str:
    """A recovery code: 128 bits, in groups that can be typed."""
    digits = secrets.token_hex(16)
    return "-".join(digits[at : at + 4] for at in range(0, 32, 4))


def once(action: str, *about: Any) -> str:
    """The idempotency key of an action that follows from what it is about."""
    return fingerprint("hub", action, *about)[:32]


# ---- what the volunteer chose, and is told -----------------------------------------------------------------------------


class Told(NamedTuple):
    """Something that happened. `phase`: entered, idle, leased, fetching, training, paused, uploading, submitted, verdict, lost, waiting."""

    phase: str
    text: str = ""
    step: int = 0
    steps: int = 0
    grant: Grant | None = None
    reply: SubmissionReply | None = None


class Options(NamedTuple):
    """What the volunteer chose."""

    name: str = "anonymous"
    account: str = ""  # an account of other devices, with its recovery code
    recovery_code: str = ""
    agree: Callable[[dict[str, str]], bool] = lambda texts: False  # the licence texts by name -> whether the volunteer agrees
    text: tuple[str, ...] = ()  # own text
    hours: float | None = None
    once: bool = False  # one lease, and its verdict
    until_full: bool = False  # end where no domain is open, instead of waiting
    dry_run: bool = False
    pause_when_busy: bool = False
    max_temp: float | None = None  # Celsius
    step_pause: float = 0.0  # seconds between two steps: a slower machine
