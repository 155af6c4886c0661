"""Volunteers and verifiers that speak HTTP to a hub's app, signed, with a plain client."""

import base64
import hashlib
import json
import secrets
import time

from elmwood.hub import signing
from elmwood.records import Check, Expert, Verdict

BOOT = "b007" * 8


class Person:
    """A key and a client (httpx or Starlette's TestClient)."""

    def __init__(self, client, key=None):
        self.client, self.key = client, key or signing.new_key()
        self.salt = "5a" * 16

    @property
    def public(self) -> str:
        return signing.public(self.key)

    def ask(self, method: str, target: str, body=None, *, name: str = "", status: int | None = None, headers=None, late: float = 0):
        """A signed request; with `status`, that it is answered so."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = signing.sign_request(method, target, data, time.time() + late, self.key) | {"Elmwood-Client": "99"}
        if not isinstance(body, bytes):
            sent["Content-Type"] = "application/json"
        if name:
            sent["Idempotency-Key"] = name
        found = self.client.request(method, target, content=data, headers=sent | (headers or {}))
        if status is not None:
            assert found.status_code == status, (found.status_code, found.text)
        return found

    def post(self, target: str, body=None, **more):
        return self.ask("POST", target, body, **more)

    # ---- a volunteer

    def enter(self, name: str = "somebody"):
        """Register, and agree to the licences."""
        code = secrets.token_hex(16)
        made = self.post("/v1/accounts", {"name": name, "recovery": signing.secret_hash(code)}, status=201).json()
        manifest = self.client.get("/v1/run").json()["manifest"]["body"]
        self.post("/v1/consents", {"licences": manifest["licences"], "manifest": manifest["version"]}, status=200)
        self.account, self.code = made["account"], code
        return self

    def claim(self, status: int = 201, boot: str = BOOT, **more):
        return self.post("/v1/leases", {"tier": "cpu", "boot_id": boot} | more, status=status)

    def beat(self, grant, step: int = 1, status: int | None = 200, **more):
        return self.post(f"/v1/leases/{grant['lease']}/beat", {"token": grant["token"], "step": step} | more, status=status)

    def begin(self, grant, size: int) -> str:
        """Begin an upload; its id."""
        about = {"lease": grant["lease"], "token": str(grant["token"])}
        coded = ",".join(f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in about.items())
        place = self.ask("POST", "/v1/uploads", b"", headers={"Upload-Length": str(size), "Upload-Metadata": coded}, status=201)
        return place.headers["Location"].rpartition("/")[2]

    def upload(self, grant, data: bytes, piece: int = 1 << 20) -> str:
        """Send a file; the upload's id."""
        target = f"/v1/uploads/{self.begin(grant, len(data))}"
        for at in range(0, len(data), piece):
            self.part(target, at, data[at : at + piece], status=204)
        return target.rpartition("/")[2]

    def part(self, target: str, at: int, part: bytes, status: int | None = None, checksum: str | None = None):
        said = checksum or base64.b64encode(hashlib.sha256(part).digest()).decode()
        headers = {"Upload-Offset": str(at), "Upload-Checksum": f"sha256 {said}", "Content-Type": "application/offset+octet-stream"}
        return self.ask("PATCH", target, part, headers=headers, status=status)

    def submission(self, grant, data: bytes, upload: str) -> dict:
        sha = hashlib.sha256(data).hexdigest()
        about = {"lease": grant["lease"], "token": grant["token"]}
        return about | {"upload": upload, "adapter": sha, "bytes": len(data), "salt": self.salt}

    def promise(self, grant, data: bytes, status: int | None = 201):
        sha = hashlib.sha256(data).hexdigest()
        sealed = signing.commit(sha, self.public, self.salt)
        return self.post("/v1/commitments", {"lease": grant["lease"], "token": grant["token"], "commitment": sealed}, status=status)

    def give(self, grant, data: bytes, status: int | None = 202):
        """Commit, upload and submit."""
        self.promise(grant, data)
        return self.post("/v1/submissions", self.submission(grant, data, self.upload(grant, data)), status=status)

    # ---- a verifier

    def take(self, status: int = 201, boot: str = BOOT):
        return self.post("/v1/jobs", {"boot_id": boot}, status=status)

    def report(self, job, accepted: bool = True, status: int | None = 200, **more):
        """A verdict; the numbers are those of nobody's trial."""
        about = {"name": "ensemble better with it than without, bits per byte at least", "threshold": 0.0, "side": "at least"}
        checks = (Check(value=0.0123, passed=True, **about),)
        verdict = Verdict(expert=Expert.model_validate(job["expert"]).digest, accepted=accepted, checks=checks)
        body = {"token": job["token"], "verdict": json.loads(verdict.model_dump_json()), "gain": 0.01 if accepted else 0.0}
        body |= {} if accepted else {"code": "no-gain"}
        return self.post(f"/v1/jobs/{job['job']}/report", body | more, status=status)

    def judge(self, job, accepted: bool = True, status: int | None = None, **more):
        """Begin the trial of a job and report."""
        self.post(f"/v1/jobs/{job['job']}/trial", {"token": job["token"]})
        return self.report(job, accepted, status, **more)

    def verify(self, accepted: bool = True, status: int | None = 200, **more):
        """Take a job and report."""
        return self.judge(self.take().json(), accepted, status, **more)
