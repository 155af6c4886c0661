"""A verifier: takes a submission, looks at its file, judges it in a process of its own, and reports the verdict, or its own fault.

Any machine that the maintainer trusts. What goes wrong here never counts against a member: only what judge.py finds does.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged, DoesNotFit, ElmwoodError
from elmwood.hub import messages
from elmwood.hub.client.enter import fetch_manifest
from elmwood.hub.client.gate import WEIGHTS, Refused, check_adapter
from elmwood.hub.client.http import Hub, Problem, retry_after
from elmwood.hub.client.join import fetch_partition, fetch_seed
from elmwood.hub.client.judge import FAULTS, Case, Judged
from elmwood.hub.client.pace import Beats
from elmwood.hub.client.probe import boot_id, probe
from elmwood.hub.client.state import Folder, once, open_folder
from elmwood.hub.client.transfer import fetch_blobs, fetch_record
from elmwood.hub.messages import DeviceFacts, Job, JobBeat, Report, ReportReply, RunManifest, TakeJob, TrialRequest, VerifierFault
from elmwood.hub.signing import load_or_make_key, public
from elmwood.records import Check, Corpus, Ensemble, Expert, Forest, Verdict
from elmwood.store import AnyStore, Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NOISE_TIMES = 3  # the least effect that a verdict is about, over the noise floor
REPETITIONS = 20  # of the noise floor
SHARE = 0.8  # of the time between two beats that a job allows
TICK = 0.2  # seconds between two looks at the process


class Fault(ElmwoodError):
    """The verifier could not come to a verdict."""

    def __init__(self, code: VerifierFault, detail: str):
        super().__init__(detail[:1500])
        self.code = code


class Verified(NamedTuple):
    """A job that ended. `phase`: idle, taken, judged, fault, lost."""

    phase: str
    text: str
    job: Job | None = None
    report: Report | None = None
    reply: ReportReply | None = None


class Limits(NamedTuple):
    """Of the process that judges."""

    memory: int = 8 << 30  # bytes
    seconds: int = 3600  # of CPU time, and of the clock


def verify_work(
    url: str, store: AnyStore = None, *, folder: Path | None = None, key: Path | None = None, limits: Limits | None = None,
    once_only: bool = False, run: "RunCase | None" = None, repetitions: int = REPETITIONS,
    tell: Callable[[Verified], None] = lambda told: None, progress: Progress = silent, sleep: Callable[[float], None] = time.sleep,
) -> int:  # fmt: skip
    """Verify submissions of a hub, until stopped, or, `once_only`, until none is queued; how many got a verdict.

    The hub hands jobs only to keys that its maintainer trusts; `key`: the file of one, by default one of this folder. `run` judges a
    case, by default in a process of its own; `repetitions`: of the noise floor, measured once. Raises BadInput, Problem, Unreachable.
    """
    store = Store(store)
    place = open_folder(url, store, folder)
    with place.alone():
        signer = load_or_make_key(key or place.key)
        hub = Hub(url, signer, sleep=sleep, on_wait=lambda why, seconds: tell(Verified("idle", f"{why}; again in {seconds:.0f} s")))
        verifier = Verifier(hub, signer, store, place, limits or Limits(), tell, progress, run or run_case, repetitions)
        count = 0
        try:
            while True:
                job = verifier.take()
                if isinstance(job, Job):
                    count += verifier.verify(job)
                elif once_only:
                    return count
                else:
                    sleep(job)
        finally:
            hub.close()


def verifier_key(url: str, store: AnyStore = None, folder: Path | None = None) -> str:
    """The public key of the verifier on this machine, which is made where there is none: the maintainer gives it to the hub."""
    return public(load_or_make_key(open_folder(url, Store(store), folder).key))


class Verifier:
    """What jobs share."""

    def __init__(
        self, hub: Hub, key: "Ed25519PrivateKey", store: Store, folder: Folder, limits: Limits, tell: Callable[[Verified], None],
        progress: Progress, run: "RunCase", repetitions: int,
    ):  # fmt: skip
        self.run, self.repetitions = run, repetitions
        self.hub, self.key, self.store, self.folder, self.limits, self.tell, self.progress = hub, key, store, folder, limits, tell, progress
        machine = probe()
        self.facts = DeviceFacts(device=machine.card or machine.device, memory=machine.memory, cores=machine.cores, torch=machine.torch)

    def take(self) -> Job | float:
        """A job, or the seconds after which to ask again."""
        reply = self.hub.post("/v1/jobs", TakeJob(boot_id=boot_id(self.folder.path), device=self.facts), once("job", time.time_ns()))
        if reply.status == 204:
            wait = min(retry_after(reply.headers) or 10.0, 60.0)
            self.tell(Verified("idle", f"nothing to verify; asked again in {wait:.0f} s"))
            return wait
        return Job.model_validate_json(reply.body)

    def verify(self, job: Job) -> int:
        """Verify one submission and report; 1 where it got a verdict."""
        self.tell(Verified("taken", f"submission {job.submission[:8]}, expert {job.expert.digest[:8]}", job))
        with JobBeats(Hub(self.hub.url, self.key, patience=job.beat_s), job) as beats:
            try:
                report = self.judge(job, beats)
            except Fault as fault:
                report = Report(token=job.token, fault=fault.code, detail=str(fault))
            except Damaged as error:
                report = Report(token=job.token, fault="damaged", detail=str(error)[:1500])
            except (DoesNotFit, OSError) as error:
                report = Report(token=job.token, fault="disk-full", detail=type(error).__name__)
            if beats.lost:
                self.tell(Verified("lost", beats.lost, job))
                return 0
        try:
            raw = self.hub.post(f"/v1/jobs/{job.job}/report", report, once("report", job.job, job.token, report.model_dump_json()))
        except Problem as problem:
            if problem.status not in (404, 409, 410):
                raise
            self.tell(Verified("lost", str(problem), job, report))
            return 0
        reply = ReportReply.model_validate_json(raw.body)
        text = f"fault {report.fault}: {report.detail}" if report.fault else f"{reply.state}{f' ({report.code})' if report.code else ''}"
        self.tell(Verified("fault" if report.fault else "judged", text, job, report, reply))
        return int(report.fault is None)

    def judge(self, job: Job, beats: "JobBeats") -> Report:
        """The report on a submission. Raises Fault, Damaged, DoesNotFit."""
        began, manifest = time.monotonic(), fetch_manifest(self.hub, self.folder)
        self.fetch(job, manifest)
        try:
            check_adapter(self.store.get(job.expert.files[WEIGHTS]), manifest.tiers[job.tier].tensors)
        except Refused as refused:
            check = Check(name="the file is an adapter of the recipe", value=0.0, threshold=1.0, side="at least", passed=False)
            verdict = Verdict(expert=job.expert.digest, accepted=False, checks=(check,))
            return Report(token=job.token, verdict=verdict, code=refused.code, detail=str(refused)[:1500])  # type: ignore[arg-type]
        noise = self.folder.path / f"noise-{manifest.version}.json"
        case = Case(
            store=self.store.root.resolve(), expert=job.expert.digest, base=self.base(job, manifest), later=job.later, gate=manifest.gate,
            noise=0 if noise.exists() else self.repetitions, memory=self.limits.memory, seconds=self.limits.seconds,
        )  # fmt: skip
        found = self.run(case, self.folder.path, self.limits, beats)
        if found.code is None and not found.verdict.accepted:
            raw = self.hub.post(f"/v1/jobs/{job.job}/trial", TrialRequest(token=job.token), once("trial", job.job, job.token))
            trial = messages.Trial.model_validate_json(raw.body)
            found = self.run(case.model_copy(update={"trial": trial}), self.folder.path, self.limits, beats)
        if found.noise_floor is not None:
            noise.write_text(json.dumps(found.noise_floor), encoding="utf-8")
        floor = float(json.loads(noise.read_text(encoding="utf-8"))) if noise.exists() else None
        if floor is not None and manifest.gate.policy.min_effect < NOISE_TIMES * floor:
            raise Fault("error", f"the noise floor here is {floor:.2g} bits per byte, too much for a least effect of "
                                 f"{manifest.gate.policy.min_effect:g}: verify on another machine")  # fmt: skip
        evidence = {name: float(value) for name, value in found.evidence if isinstance(value, float | int) and np_finite(value)}
        return Report(
            token=job.token, verdict=found.verdict, code=found.code, gain=max(found.evidence.ensemble_gain or 0.0, 0.0), evidence=evidence,
            noise_floor=floor, advice=found.advice, copied_by=found.copied_by, seconds=round(time.monotonic() - began, 3),
        )  # fmt: skip

    def fetch(self, job: Job, manifest: RunManifest) -> None:
        """All that judging reads: the seed, the partition with its secret text, the experts, and the candidate."""
        hub, store, progress = self.hub, self.store, self.progress
        fetch_seed(job.seed, hub, store, progress)
        partition = fetch_partition(job.partition, hub, store)
        corpus = fetch_record(partition.corpus, hub, store)
        assert isinstance(corpus, Corpus)
        held = [shard.blob for shard in corpus.holdout] + [shard.blob for domain in partition.domains for shard in domain.holdout]
        fetch_blobs(held, hub, store, progress, "fetch held-out text")
        forest = fetch_record(job.forest, hub, store)
        fetch_record(job.without, hub, store) if job.without != job.forest else None
        assert isinstance(forest, Forest)
        for digest in forest.experts:
            expert = fetch_record(digest, hub, store)
            assert isinstance(expert, Expert)
            fetch_blobs(expert.files.values(), hub, store, progress, "fetch experts")
        fetch_blobs(job.expert.files.values(), hub, store, progress, "fetch the submission")
        store.add(job.expert)

    def base(self, job: Job, manifest: RunManifest) -> str:
        """The ensemble that the expert asks to join, without bounds on those on probation. The first one joins a forest of itself."""
        forest = self.store.read(job.forest)
        assert isinstance(forest, Forest)
        if not forest.experts:
            forest = forest.model_copy(update={"experts": (job.expert.digest,)})
            self.store.add(forest)
        settings = self.store.read(job.without) if self.store.has(job.without) else manifest.ensemble
        chosen = settings if isinstance(settings, Ensemble) else manifest.ensemble
        return self.store.add(chosen.model_copy(update={"forest": forest.digest, "bounded": ()}))


def np_finite(value: float) -> bool:
    """Neither NaN nor infinite."""
    return value == value and abs(value) != float("inf")


def run_case(case: Case, folder: Path, limits: Limits, beats: "JobBeats | None" = None) -> Judged:
    """Judge in a process of its own, within its limits. It gets no key, and whatever it does ends with it. Raises Fault."""
    place = folder / "case"
    place.mkdir(parents=True, exist_ok=True)
    files = place / "case.json", place / "found.json"
    for path in (files[1], files[1].with_suffix(".error")):
        path.unlink(missing_ok=True)
    files[0].write_bytes(case.model_dump_json().encode())
    until = time.monotonic() + limits.seconds
    words = [sys.executable, "-m", "elmwood.hub.client.judge", *map(str, files)]
    with (
        (place / "stderr").open("wb") as errors,
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors) as process,
    ):
        try:
            while True:
                try:
                    status = process.wait(TICK)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() > until:
                        raise Fault("time", f"judging took more than {limits.seconds} s") from None
                    if beats and beats.lost:
                        raise Fault("error", "the job was given to another verifier") from None
        finally:
            if process.poll() is None:
                process.kill()
    if status == 0:
        return Judged.model_validate_json(files[1].read_bytes())
    told = files[1].with_suffix(".error")
    detail = told.read_text(encoding="utf-8") if told.exists() else f"the process ended with status {status}"
    raise Fault(
        FAULTS.get(status, "killed" if status < 0 else "error"),
        detail.replace(str(case.store), "the store").replace(os.path.expanduser("~"), "~"),
    )


class JobBeats(Beats):
    """Keeps a job."""

    def __init__(self, hub: Hub, job: Job):
        super().__init__(hub)
        self.job = job

    def _run(self) -> None:
        while not self.lost and not self.end.wait(SHARE * self.job.beat_s):
            try:
                self.hub.request("POST", f"/v1/jobs/{self.job.job}/beat", JobBeat(token=self.job.token).model_dump_json().encode(),
                                 {"Content-Type": "application/json", "Idempotency-Key": once("beat", self.job.job, time.time_ns())},
                                 patience=0.0)  # fmt: skip
            except Problem as problem:
                if problem.status in (403, 404, 409, 410):
                    self.lost = str(problem)
            except (ElmwoodError, BadInput):
                continue


RunCase = Callable[[Case, Path, Limits, "JobBeats | None"], Judged]
