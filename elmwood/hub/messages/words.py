"""The simple types of all messages, the closed lists of codes, and what stands in every reply."""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from elmwood.records import Frozen

Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]  # of an account, lease, upload, submission or job
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]  # Ed25519 public key
Sha = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]  # sha256 of bytes
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
Salt = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32,128}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Words = Annotated[str, StringConstraints(max_length=2000, pattern=r"^[^\x00]*$")]  # PostgreSQL keeps no NUL
MemberName = Annotated[
    str, StringConstraints(min_length=1, max_length=40, pattern=r"^[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]+$")
]
Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0, lt=1 << 53)]
TierName = Literal["cpu", "4", "8", "12", "24"]  # GB of a GPU's memory
Phase = Literal["fetching", "training", "uploading"]

# Why a submission is refused: faults of the member's work, and only these.
MemberFault = Literal[
    "not-safetensors", "wrong-tensors", "not-finite", "duplicate", "not-novel", "norm", "no-gain", "no-ensemble-gain", "harms",
    "overfit-public", "not-finite-scores", "other-probe",
]  # fmt: skip
# Why a job ended without a verdict. It is queued again, and after `Gate.tries` such ends waits for a person.
VerifierFault = Literal["out-of-memory", "killed", "time", "disk-full", "unreachable", "damaged", "slices-retired", "error"]
IdleReason = Literal["no-open-domain", "busy", "too-small"]
LeaseState = Literal["running", "paused", "uploading", "done", "released", "expired"]
SubmissionStateName = Literal["queued", "verifying", "accepted", "rejected", "quarantined"]
DomainStateName = Literal["open", "leased", "submitted", "accepted", "quarantined"]
ExpertStatus = Literal["probation", "full", "retired"]


class Signed(Frozen):
    """A value with a signature over its canonical JSON (elmwood.hub.signing)."""

    body: dict[str, Any]
    key: Key
    signature: Signature


class Problem(Frozen):
    """The body of every error, application/problem+json."""

    code: str
    detail: str
    kept: str = ""  # what the hub still holds
    do: str = ""  # what helps
    retryable: bool = False
    fields: dict[str, Any] = {}  # such as "time", "offset"
