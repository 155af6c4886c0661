"""The volunteer's loop: lease a domain, train, commit to the result, send it, and hear the verdict.

All that must survive is in the folder (state.py) and the store; a run that was killed goes on where it stopped. What happens is told to
the caller, who prints it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from elmwood import __version__
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, ElmwoodError
from elmwood.hub.client.enter import enter
from elmwood.hub.client.gate import WEIGHTS, check_adapter
from elmwood.hub.client.http import Hub, Problem, retry_after
from elmwood.hub.client.own_text import OwnText, route_text
from elmwood.hub.client.pace import Beater, LeaseLost, Pace, Stopped
from elmwood.hub.client.probe import Machine, boot_id, probe, tiers_that_fit, what_would
from elmwood.hub.client.state import Folder, Options, State, Told, Work, once, open_folder
from elmwood.hub.client.transfer import begin_upload, fetch_blobs, fetch_record, fetch_with, send
from elmwood.hub.messages import (
    Claim,
    Commitment,
    DeviceFacts,
    Grant,
    Held,
    RunManifest,
    SubmissionReply,
    SubmissionRequest,
    TierName,
)
from elmwood.hub.signing import commit, load_or_make_key, public
from elmwood.records import Expert, Partition, Record, Seed, Shard
from elmwood.store import AnyStore, Store
from elmwood.train.task_names import train_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALONE = Options()
LEAST_TEXT = 20_000  # bytes of own text, below which no domain is trained
MOST_FAILURES = 3  # of training, one after another, before the client stops claiming
ASK_EVERY = (5.0, 60.0)  # seconds between two questions for a verdict, at first and at most
IDLE = {
    "no-open-domain": "no domain is open: all are leased, being verified, or have their expert",
    "busy": "the hub has no time for a new lease now",
    "too-small": "the hub has no domain that this machine can train",
}


class Fetched(NamedTuple):
    """What a lease trains from."""

    seed: Seed
    partition: Partition
    shards: tuple[Shard, ...]
    store: Store


Train = Callable[[Grant, Fetched, Path, Callable[[int], None]], Path]


def join(
    url: str, store: AnyStore = None, *, options: Options = ALONE, folder: Path | None = None,
    tell: Callable[[Told], None] = lambda told: None, progress: Progress = silent, sleep: Callable[[float], None] = time.sleep,
    train: Train | None = None,
) -> list[SubmissionReply]:  # fmt: skip
    """Volunteer for a hub; the submissions that got a verdict. Raises BadInput, Unreachable, Problem, Damaged.

    `train` makes the file of an adapter for a grant; it calls its last argument with each step. By default the store's own training.
    """
    store, place = Store(store), open_folder(url, Store(store), folder)
    with place.alone():
        key = load_or_make_key(place.key)
        hub = Hub(url, key, sleep=sleep, on_wait=lambda why, seconds: tell(Told("waiting", f"{why}; again in {seconds:.0f} s")))
        volunteer = Volunteer(hub, key, store, place, options, tell, progress, sleep, train or train_grant)
        try:
            return volunteer.run()
        finally:
            hub.close()


class Volunteer:
    """One run of the loop."""

    def __init__(
        self, hub: Hub, key: "Ed25519PrivateKey", store: Store, folder: Folder, options: Options, tell: Callable[[Told], None],
        progress: Progress, sleep: Callable[[float], None], train: Train,
    ):  # fmt: skip
        self.hub, self.key, self.store, self.folder, self.options = hub, key, store, folder, options
        self.tell, self.progress, self.sleep, self.train = tell, progress, sleep, train
        self.until = None if options.hours is None else time.monotonic() + 3600 * options.hours
        self.machine: Machine = probe()
        self.decided: list[SubmissionReply] = []
        self.text: OwnText | None = None

    def run(self) -> list[SubmissionReply]:
        manifest = enter(self.hub, self.key, self.folder, self.options, self.store, self.tell)
        tiers = tiers_that_fit(manifest.tiers, self.machine)
        if not tiers:
            self.tell(Told("idle", f"{what_would(manifest.tiers, self.machine)}; nothing was leased"))
            return []
        if self.options.dry_run:
            self.tell(Told("fits", self.say_fit(manifest, tiers[0])))
            return []
        if self.options.text:
            partition = fetch_partition(manifest.partition, self.hub, self.store)
            self.text = route_text(self.options.text, partition, self.store, least=LEAST_TEXT, progress=self.progress)
        try:
            while self.next_lease(manifest, tiers):
                pass
        except Stopped as reason:
            self.tell(Told("paused", str(reason)))
        return self.decided

    def next_lease(self, manifest: RunManifest, tiers: Sequence[str]) -> bool:
        """Go on with the lease that is held, or get one; whether to go on after it."""
        state = self.folder.read()
        self.ask_verdicts()
        if self.until is not None and time.monotonic() > self.until and not state.work:
            return False
        grant = state.work.grant if state.work else self.claim(tiers, state)
        if grant is None:
            return not (self.options.until_full or self.options.once) or bool(self.folder.read().pending)
        try:
            self.work(grant, manifest)
        except LeaseLost as reason:
            self.folder.change(work=None, lost=grant.domain)
            self.tell(Told("lost", f"{reason}; what was trained is kept, and goes on if the domain can be leased again", grant=grant))
            return True
        if self.options.once:
            while self.folder.read().pending:
                self.ask_verdicts(wait=True)
            return False
        return True

    # ---- a lease

    def claim(self, tiers: Sequence[str], state: State) -> Grant | None:
        """Ask for a lease. Where there is none, say why and wait as long as the hub asks."""
        if state.failures >= MOST_FAILURES:
            raise BadInput(
                f"training failed {state.failures} times in a row here: nothing more is leased; delete {self.folder.file} to try again"
            )
        facts = DeviceFacts(
            device=self.machine.card or self.machine.device, memory=self.machine.card_memory or self.machine.memory,
            cores=self.machine.cores, torch=self.machine.torch,
        )  # fmt: skip
        wanted = tuple(self.text.domains) if self.text else ()
        if state.lost is not None and not state.claim and (not wanted or state.lost in wanted):
            wanted = (state.lost,)
        claim = state.claim or once("claim", public(self.key), time.time_ns())
        self.folder.change(claim=claim)
        body = Claim(tier=_tier(tiers[0]), boot_id=boot_id(self.folder.path), device=facts, domains=wanted, own_text=self.text is not None)
        reply = self.hub.post("/v1/leases", body, claim)
        if reply.status == 204:
            self.folder.change(claim="", lost=None)
            if state.lost is not None:
                return None  # it is taken: ask for any
            why = reply.headers.get("elmwood-reason", "no-open-domain")
            wait = retry_after(reply.headers) or ASK_EVERY[1]
            ends = self.options.until_full or self.options.once
            more = f": {what_would(tiers, self.machine)}" if why == "too-small" else ""
            self.tell(
                Told(
                    "idle",
                    f"{IDLE.get(why, why)}{more}" + ("" if ends and not self.folder.read().pending else f"; asked again in {wait:.0f} s"),
                )
            )
            if not ends or self.folder.read().pending:
                self.sleep(min(wait, ASK_EVERY[1]))
            return None
        grant = Grant.model_validate_json(reply.body)
        self.folder.change(claim="", lost=None, work=Work(grant=grant).model_dump())
        self.tell(Told("leased", f"domain {grant.domain}, {grant.name}", steps=grant.recipe.steps, grant=grant))
        return grant

    def work(self, grant: Grant, manifest: RunManifest) -> None:
        """From the grant to the submission, from wherever an earlier run stopped. Raises LeaseLost, Stopped."""
        check_recipe(grant, manifest)
        with self.beating(grant) as pace:
            work = self.folder.read().work
            assert work
            if work.phase in ("fetching", "training"):
                self.make(grant, manifest, pace)
            self.hand_in(grant, pace)

    @contextmanager
    def beating(self, grant: Grant) -> Iterator[Pace]:
        beater = Beater(Hub(self.hub.url, self.key, patience=grant.beat_s), grant)
        pace = Pace(beater, grant, self.folder, self.options, self.machine.device, self.until, self.tell, self.sleep)
        with beater:
            yield pace

    def make(self, grant: Grant, manifest: RunManifest, pace: "Pace") -> None:
        """Fetch, train, and check what came of it by the hub's own gate."""
        self.tell(Told("fetching", grant=grant))
        seed = fetch_seed(grant.seed, self.hub, self.store, self.progress)
        partition = fetch_record(grant.partition, self.hub, self.store)
        assert isinstance(partition, Partition)
        shards = grant.shards
        if not shards:
            if self.text is None or grant.domain not in self.text.shards:
                self.give_back(grant)
                raise BadInput(f"domain {grant.domain} comes without text: bring your own, with --text PATH")
            shards = self.text.shards[grant.domain]
        fetch_blobs((shard.blob for shard in grant.shards), self.hub, self.store, self.progress, "fetch text")
        self.folder.change_work(phase="training")
        pace.begin("training")
        try:
            path = self.train(grant, Fetched(seed, partition, shards, self.store), self.folder.path, pace.step)
            check_adapter(path, manifest.tiers[grant.tier].tensors)
        except (LeaseLost, Stopped):
            raise
        except ElmwoodError:
            self.folder.change(failures=self.folder.read().failures + 1)
            self.give_back(grant)
            raise
        blob = self.store.put(path)
        self.folder.change(failures=0)
        made = self.store.find_done(train_key(seed, shards, grant.recipe, partition.digest, grant.domain))
        expert = self.store.load(made, Expert) if made else None
        curve, said = (expert.curve, expert.probe) if expert else ((), ())
        self.folder.change_work(
            phase="committing", adapter=blob.removeprefix("sha256:"), tokens=grant.recipe.tokens, curve=curve, probe=said
        )  # fmt: skip

    def hand_in(self, grant: Grant, pace: "Pace") -> None:
        """Commit, upload, submit: each once, however often this is run."""
        work = self.folder.read().work
        assert work
        path, token = self.store.get(f"sha256:{work.adapter}"), grant.token
        pace.begin("uploading")
        if not work.salt:
            work = self.folder.change_work(salt=once("salt", public(self.key), time.time_ns()))
        with lost_where_gone():
            if work.phase == "committing":
                sealed = commit(work.adapter, public(self.key), work.salt)
                self.hub.post(
                    "/v1/commitments",
                    Commitment(lease=grant.lease, token=token, commitment=sealed),
                    once("commit", grant.lease, token, sealed),
                )
                work = self.folder.change_work(phase="uploading")
            if work.phase == "uploading":
                self.tell(Told("uploading", f"{path.stat().st_size:,} bytes", grant=grant))
                if not work.upload:
                    begun = begin_upload(path, grant.lease, token, self.hub, once("upload", grant.lease, token, work.adapter))
                    work = self.folder.change_work(upload=begun)
                send(path, work.upload, self.hub, self.progress)
                work = self.folder.change_work(phase="submitting")
            facts = DeviceFacts(device=self.machine.device, cores=self.machine.cores)
            request = SubmissionRequest(
                lease=grant.lease, token=token, upload=work.upload, adapter=work.adapter, bytes=path.stat().st_size, salt=work.salt,
                tokens=work.tokens, curve=work.curve, probe=work.probe, client=__version__, hardware=facts,
            )  # fmt: skip
            reply = self.hub.post("/v1/submissions", request, once("submit", grant.lease, token))
        told = SubmissionReply.model_validate_json(reply.body)
        state = self.folder.read()
        self.folder.change(work=None, pending=(*state.pending, told.submission))
        self.tell(Told("submitted", f"submission {told.submission[:8]}, {told.ahead} before it", grant=grant, reply=told))

    def give_back(self, grant: Grant) -> None:
        """Release a lease that cannot be worked on."""
        self.folder.change(work=None)
        self.hub.post(f"/v1/leases/{grant.lease}/release", Held(token=grant.token), once("release", grant.lease, grant.token))

    # ---- verdicts

    def ask_verdicts(self, wait: bool = False) -> None:
        """Hear of submissions; those with a verdict are told, and no longer pending."""
        for submission in self.folder.read().pending:
            reply = SubmissionReply.model_validate_json(self.hub.get(f"/v1/submissions/{submission}").body)
            if reply.state in ("accepted", "rejected", "quarantined"):
                self.folder.change(pending=tuple(one for one in self.folder.read().pending if one != submission))
                self.decided.append(reply)
                self.tell(Told("verdict", say_verdict(reply), reply=reply))
        if wait and self.folder.read().pending:
            self.sleep(ASK_EVERY[0])

    def say_fit(self, manifest: RunManifest, tier: str) -> str:
        """What training would take here, in words."""
        from elmwood.study.fitting import fit

        recipe = manifest.tiers[_tier(tier)].recipe
        seed = fetch_seed(manifest.seed, self.hub, self.store, self.progress)
        fitting = fit(
            seed, method=recipe.method, batch=recipe.batch, length=recipe.length, rank=recipe.rank, late=recipe.late,
            accumulate=recipe.accumulate, checkpointing=recipe.checkpointing, optimiser=recipe.optimiser, store=self.store,
        )  # fmt: skip
        speeds = fitting.speeds
        hours = (
            f"; about {recipe.tokens / speeds[1] / 3600:.2g} to {recipe.tokens / speeds[0] / 3600:.2g} hours for a domain" if speeds else ""
        )
        return f"tier {tier}: {fitting.answer.verdict}{hours}. Nothing was leased"


def train_grant(grant: Grant, fetched: Fetched, folder: Path, on_step: Callable[[int], None]) -> Path:
    """Train as the grant says, from the last checkpoint if there is one; the file of the adapter."""
    from elmwood.train.tasks import train

    recipe, per_step = grant.recipe, grant.recipe.batch * grant.recipe.length

    def told(what: str, done: float, total: float, unit: str) -> None:
        if what.startswith("train on "):
            on_step(int(done) // per_step)

    expert = train(
        fetched.seed, fetched.shards, recipe, fetched.store, partition=fetched.partition.digest, domain=grant.domain, progress=told
    )
    return fetched.store.get(expert.files[WEIGHTS])


def check_recipe(grant: Grant, manifest: RunManifest) -> None:
    """A grant asks for what the signed manifest says, and nothing else. Raises BadInput."""
    tier = manifest.tiers.get(grant.tier)
    same = tier and grant.recipe.model_copy(update={"rng_seed": tier.recipe.rng_seed}) == tier.recipe
    if not same or (grant.seed, grant.partition) != (manifest.seed, manifest.partition):
        raise BadInput(
            "the hub grants another recipe, seed or partition than its signed manifest has: nothing is trained; tell who runs it"
        )


def fetch_seed(digest: str, hub: Hub, store: Store, progress: Progress = silent) -> Seed:
    """The seed's record and files."""
    seed = fetch_record(digest, hub, store)
    if not isinstance(seed, Seed):
        raise BadInput(f"{digest[:8]} is a {seed.kind}, and the run's manifest calls it the seed: tell who runs the hub")
    fetch_blobs(seed.files.values(), hub, store, progress, "fetch the seed")
    return seed


def fetch_partition(digest: str, hub: Hub, store: Store) -> Partition:
    """A partition as far as routing needs it: embedder and centroids, also of the partitions that it revises."""

    def wanted(record: Record) -> list[str]:
        assert isinstance(record, Partition)
        return [*record.embedder.files.values(), record.centroids, *([record.parent] if record.parent else [])]

    partition = fetch_with(digest, hub, store, wanted)
    assert isinstance(partition, Partition)
    return partition


@contextmanager
def lost_where_gone() -> Iterator[None]:
    """The hub's words for a lease that is over end the work on it. Raises LeaseLost."""
    try:
        yield
    except Problem as problem:
        if problem.status in (409, 410, 404):
            raise LeaseLost(str(problem)) from problem
        raise


def say_verdict(reply: SubmissionReply) -> str:
    """A verdict in words: each check with its value and threshold, and what would pass."""
    lines = [f"submission {reply.submission[:8]} of domain {reply.domain}: {reply.state}" + (f" ({reply.code})" if reply.code else "")]
    for check in reply.checks:
        value = "kept back" if check.value is None else f"{check.value:+.4g}"
        limit = "" if check.threshold is None else f", {check.side} {check.threshold:g}"
        lines.append(f"{'passed' if check.passed else 'FAILED'}  {value}{limit}  {check.name}")
    if reply.code:
        lines.append(CURES.get(reply.code, ""))
    return "\n".join(filter(None, [*lines, *(f"note: {one}" for one in reply.advice)]))


CURES = {
    "duplicate": "an earlier expert is nearly the same; the first committed one counts. Lease another domain and train from the seed",
    "not-novel": "it is a blend of experts that are there; train from the seed on the domain's own text",
    "norm": "its length is far from that of the others: train with the recipe of the lease, without scaling the result",
    "no-gain": "it is hardly better than the seed on held-out text of its domain: train all steps of the recipe, on text of the domain",
    "no-ensemble-gain": "the ensemble is not better with it: the domain may be learned already; lease another one",
    "harms": "another domain's text became worse with it: train on text of the domain alone",
    "overfit-public": "it gains far more on published held-out text than on secret text: leave published held-out text out of training",
    "not-finite": "it holds NaN or infinity: training diverged; train again",
    "not-finite-scores": "the model with it gives NaN: training diverged; train again",
    "other-probe": "it does not say what the client said of it: its file is not what was trained; upload what the client trained",
    "wrong-tensors": "its tensors are not those of the recipe: upload what the client trained",
    "not-safetensors": "the file is damaged, or of another format: upload what the client trained",
}


def _tier(name: str) -> TierName:
    return name  # type: ignore[return-value]  # a key of the manifest's tiers
