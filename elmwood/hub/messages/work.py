"""What members and their machines say: accounts, leases, submissions."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from elmwood.hub.messages.run import Licences
from elmwood.hub.messages.words import (
    Finite,
    Id,
    Key,
    Label,
    LeaseState,
    MemberFault,
    MemberName,
    Natural,
    Phase,
    Salt,
    Seconds,
    Sha,
    SubmissionStateName,
    TierName,
)
from elmwood.records import Digest, Frozen, Point, Recipe, Shard


class NewAccount(Frozen):
    """POST /v1/accounts, signed by the first device's key, which is registered with it."""

    name: MemberName
    recovery: Sha  # sha256 of the recovery code's UTF-8 bytes


class NewDevice(Frozen):
    """POST /v1/devices, signed by the new device's key."""

    account: Id
    recovery_code: Annotated[str, StringConstraints(min_length=16, max_length=200)]


class AccountReply(Frozen):
    account: Id
    key: Key
    role: Literal["member", "verifier", "admin"] = "member"


class Consent(Frozen):
    """POST /v1/consents. The signature of the request is kept with it."""

    licences: Licences
    manifest: Natural  # version


class Done(Frozen):
    """The reply where there is nothing else to say."""

    done: Literal[True] = True


# ---- leases -------------------------------------------------------------------------------------------------------


class DeviceFacts(Frozen):
    """What the volunteer's client says of the machine. Nothing is decided by it."""

    device: Label = "cpu"
    memory: Natural = 0  # bytes
    cores: Natural = 0
    system: Label = "unknown"
    torch: Label = "unknown"
    tokens_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class Claim(Frozen):
    """POST /v1/leases. A key that holds a live lease gets that one again, unless another machine beats for it."""

    tier: TierName
    boot_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{8,64}$")]  # changes when the machine starts anew
    device: DeviceFacts = DeviceFacts()
    domains: Annotated[tuple[Natural, ...], Field(max_length=10_000)] = ()  # only these; (): any
    own_text: bool = False  # the volunteer brings text, so domains without shards are open to them too


class Grant(Frozen):
    """A lease of a domain, for one epoch of it: `token` grows by one with each grant of the domain."""

    lease: Id
    domain: Natural
    name: Label
    token: Annotated[int, Field(gt=0)]
    recipe: Recipe  # of the tier, with the `rng_seed` of this lease
    tier: TierName
    seed: Digest
    partition: Digest
    shards: tuple[Shard, ...]
    beat_s: Seconds
    progress_s: Seconds
    final_s: Seconds  # what is left
    pause_s: Annotated[float, Field(ge=0)]  # what is left
    manifest: Natural  # version
    resumed: bool = False  # this key held it already

    @property
    def init_seed(self) -> int:
        return self.recipe.rng_seed


class Beat(Frozen):
    """POST /v1/leases/{id}/beat"""

    token: Annotated[int, Field(gt=0)]
    step: Natural
    phase: Phase = "training"
    loss: Finite | None = None  # nats per token; shown, never judged


class Held(Frozen):
    """POST /v1/leases/{id}/pause, /resume and /release"""

    token: Annotated[int, Field(gt=0)]


class BeatReply(Frozen):
    alive: bool
    state: LeaseState
    beat_s: float  # until the next beat
    progress_s: float  # left until a further step is needed
    final_s: float  # left until the submission is needed
    pause_s: float  # left to pause
    advice: Literal["go", "slow-down", "upgrade"] = "go"


class Commitment(Frozen):
    """POST /v1/commitments: sha256 of the adapter's sha256 (hex), the device's key (hex) and the salt (hex), as one string of ASCII."""

    lease: Id
    token: Annotated[int, Field(gt=0)]
    commitment: Sha


class CommitmentReply(Frozen):
    order: Natural  # of all commitments; of two equal adapters the smaller order wins


class UploadReply(Frozen):
    """POST /v1/uploads; the header Location says the same."""

    upload: Id


class SubmissionRequest(Frozen):
    """POST /v1/submissions: reveals what was committed to."""

    lease: Id
    token: Annotated[int, Field(gt=0)]
    upload: Id
    adapter: Sha
    bytes: Natural
    salt: Salt
    tokens: Natural = 0  # trained on, as the client says
    curve: Annotated[tuple[Point, ...], Field(max_length=2000)] = ()
    probe: Annotated[tuple[Finite, ...], Field(max_length=64)] = ()  # what the expert says after a fixed text, nats
    hardware: DeviceFacts = DeviceFacts()
    client: Label = "0"

    @model_validator(mode="after")
    def _finite(self) -> "SubmissionRequest":
        if not all(abs(point.loss) < 1e9 and abs(point.validation or 0) < 1e9 for point in self.curve):
            raise ValueError("the curve has a loss that is no finite number")
        return self


class CheckReply(Frozen):
    """One check of a verdict; exact values only where they tell nothing of secret text."""

    name: str
    value: float | None
    threshold: float | None
    side: str
    passed: bool


class SubmissionReply(Frozen):
    """POST /v1/submissions and GET /v1/submissions/{id}"""

    submission: Id
    state: SubmissionStateName
    domain: Natural
    expert: Digest
    order: Natural  # of its commitment
    ahead: Natural = 0  # submissions that are verified before it
    code: MemberFault | None = None  # why it was rejected
    verdict: Digest | None = None
    checks: tuple[CheckReply, ...] = ()
    advice: tuple[str, ...] = ()  # what the verifier remarked; decides nothing
    credit: float = 0.0
