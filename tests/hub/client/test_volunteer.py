"""The volunteer's loop and the verifier against a real hub: from the manifest to the snapshot, and what may go wrong between."""

import os
import signal
from contextlib import closing

import pytest
from live_hub import draft, live_hub
from small_run import RECIPE

from elmwood.errors import BadInput
from elmwood.hub.client.http import Hub, Problem, Unreachable
from elmwood.hub.client.join import Options, join
from elmwood.hub.client.judge import judge
from elmwood.hub.client.pull import pull
from elmwood.hub.client.state import open_folder
from elmwood.hub.client.verify import Fault, verify_work
from elmwood.hub.messages import NewAccount, RunManifest
from elmwood.hub.signing import AHEAD, Forged, load_key, load_or_make_key, open_manifest, open_signed, sign
from elmwood.records import Ensemble, Expert, Forest
from elmwood.store import Store
from elmwood.study.ancestry import generate, open_model

AGREED = Options(agree=lambda texts: set(texts) == {"data", "contribution", "disk"}, once=True)


@pytest.fixture(scope="module")
def live(run):
    with live_hub(draft(run, RECIPE), run.store) as opened:
        yield opened


def in_process(case, *_):
    """Judge here: tests have small blocks."""
    return judge(case)


def verify(live, folder, run=in_process):
    told = []
    count = verify_work(
        live.url, Store(folder / "verifier"), key=live.verifier_key, once_only=True, run=run, tell=told.append, repetitions=2
    )
    return count, told


def volunteer(live, folder, options=AGREED, **fields):
    """One lease, whose submission is verified while the volunteer waits for the verdict."""
    told = []
    fields = {"sleep": lambda seconds: verify(live, folder)} | fields
    return join(live.url, Store(folder / "volunteer"), options=options, tell=told.append, **fields), told


def rows(live, table):
    from sqlalchemy import text

    return live.hub.read(lambda c: c.all(text(f"select * from {table}")))


def test_from_the_lease_to_a_model_that_speaks(live, run, tmp_path):
    found, told = volunteer(live, tmp_path)
    phases = list(dict.fromkeys(one.phase for one in told))
    assert phases == ["entered", "leased", "fetching", "training", "uploading", "submitted", "verdict"]
    assert [one.state for one in found] == ["accepted"], told[-1].text
    assert "passed" in told[-1].text
    assert max(one.step for one in told) == RECIPE.steps
    assert '"step":25' in str([dict(row) for row in rows(live, "submission")]).replace(" ", "")  # the curve came with it
    mine = Store(tmp_path / "user")
    pulled = pull(live.url, mine)
    assert [one.expert for one in pulled.snapshot.experts] == [found[0].expert]
    assert isinstance(mine.load("tiny/ensemble"), Ensemble)
    assert mine.load("tiny/forest", Forest).experts == (found[0].expert,)
    assert mine.load(f"tiny/expert/{found[0].domain}", Expert).digest == found[0].expert
    assert len(generate(open_model("tiny/ensemble", store=mine), "the sea", max_tokens=4).text) > 0
    assert pull(live.url, mine).fetched == 0
    held_out = [shard.blob for domain in run.partition.domains for shard in domain.holdout]
    for store in (mine, Store(tmp_path / "volunteer")):
        assert not any(store.has(blob) for blob in held_out)  # secret text came to nobody but the verifier


class Killed(BaseException):
    pass


# what has just happened when the process is killed: a reply of the hub that it never writes down, or a step of its own
POINTS = ("POST /v1/accounts", "POST /v1/consents", "POST /v1/leases", "GET /v1/records", "step 12", "step 25", "POST /v1/commitments",
          "POST /v1/uploads", "PATCH /v1/uploads", "POST /v1/submissions")  # fmt: skip


def killed_at(point, live, folder):
    """A volunteer in a process of its own, killed by kill -9 at a point; its exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        inner = Hub.request

        def request(self, method, target, *given, **named):
            reply = inner(self, method, target, *given, **named)
            if f"{method} {target}".startswith(point) and "/beat" not in target:
                os.kill(os.getpid(), signal.SIGKILL)
            return reply

        def tell(told):
            if point == f"step {told.step}":
                os.kill(os.getpid(), signal.SIGKILL)

        Hub.request = request
        join(live.url, Store(folder), options=AGREED, tell=tell, sleep=lambda seconds: os._exit(3))
    finally:
        os._exit(4)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_at_each_point_it_goes_on_and_nothing_happens_twice(live, tmp_path):
    before = {table: len(rows(live, table)) for table in ("account", "lease", "submission", "upload")}
    for point in POINTS:
        status = killed_at(point, live, tmp_path / "volunteer")
        assert os.WIFSIGNALED(status), (point, status)
        assert os.WTERMSIG(status) == signal.SIGKILL
    found, told = volunteer(live, tmp_path)
    assert [one.state for one in found] == ["accepted"], told[-1].text
    assert {table: len(rows(live, table)) - count for table, count in before.items()} == dict.fromkeys(before, 1)


def test_a_fault_of_the_verifier_changes_nothing_of_the_member_and_the_third_goes_to_a_person(live, tmp_path):
    told = []
    with pytest.raises(Killed):
        join(live.url, Store(tmp_path / "volunteer"), options=AGREED, tell=told.append, sleep=raise_killed)
    (number,) = (one.reply.submission for one in told if one.phase == "submitted")
    before = rows(live, "account"), rows(live, "device"), rows(live, "credit")

    def fail(case, *_):
        raise Fault("out-of-memory", "no memory left")

    count, told = verify(live, tmp_path, fail)
    assert count == 0
    assert [one.report.fault for one in told if one.phase == "fault"] == ["out-of-memory"] * 3
    assert (rows(live, "account"), rows(live, "device"), rows(live, "credit")) == before
    (row,) = (row for row in rows(live, "submission") if row["id"] == number)
    assert (row["state"], row["code"]) == ("quarantined", None)
    found = join(live.url, Store(tmp_path / "volunteer"), options=AGREED._replace(until_full=True), sleep=raise_killed)
    assert [one.state for one in found] == ["quarantined"]


def raise_killed(seconds):
    raise Killed


# ---- idle states and refusals -----------------------------------------------------------------------------------------


def test_where_no_domain_is_open_it_says_so(live, tmp_path):
    found, told = volunteer(live, tmp_path, AGREED._replace(until_full=True))
    assert found == []
    assert [one.phase for one in told] == ["entered", "idle"]
    assert "no domain is open" in told[-1].text


def test_nothing_is_leased_without_consent(live, tmp_path):
    with pytest.raises(BadInput, match="licences were not agreed"):
        volunteer(live, tmp_path, AGREED._replace(agree=lambda texts: False))


def test_a_dry_run_says_what_fits_and_leases_nothing(live, tmp_path):
    leases = len(rows(live, "lease"))
    _, told = volunteer(live, tmp_path, AGREED._replace(dry_run=True))
    assert told[-1].phase == "fits"
    assert "Nothing was leased" in told[-1].text
    assert len(rows(live, "lease")) == leases
    assert not open_folder(live.url, Store(tmp_path / "volunteer")).read().account


def test_a_hub_that_is_not_there(tmp_path):
    with closing(Hub("http://127.0.0.1:9", patience=0)) as hub, pytest.raises(Unreachable, match="cannot be reached"):
        hub.get("/v1/run")
    for url in ("http://example.org", "ftp://localhost", "https://user@host", "https://"):
        with pytest.raises(BadInput, match=r"address of a hub|plain HTTP"):
            Hub(url)


def test_a_machine_that_is_too_small_hears_what_would_fit(run, tmp_path):
    manifest = draft(run, RECIPE)
    with live_hub(manifest.model_copy(update={"tiers": {"24": manifest.tiers["cpu"]}}), run.store, "large") as large:
        found, told = volunteer(large, tmp_path)
    assert found == []
    assert "24 GB" in told[-1].text


def test_two_processes_do_not_share_a_folder(live, tmp_path):
    place = open_folder(live.url, Store(tmp_path / "volunteer"))
    with place.alone(), pytest.raises(BadInput, match="another process"):
        volunteer(live, tmp_path)


# ---- the manifest -----------------------------------------------------------------------------------------------------


def test_only_the_manifest_of_the_same_root_that_is_newer_and_not_expired_is_used(live):
    signed = live.signed
    made = open_signed(signed, RunManifest)
    now = made.issued
    assert open_manifest(signed, now, made.root_key, made.version) == open_manifest(signed, now) == made
    with pytest.raises(Forged, match="only"):
        open_manifest(sign(made, load_key(live.hub.home.key_path("hub"))), now, made.root_key)
    with pytest.raises(Forged, match="root key"):
        open_manifest(sign(made, load_key(live.hub.home.key_path("hub"))), now)
    with pytest.raises(Forged, match="rolled back"):
        open_manifest(signed, now, made.root_key, made.version + 1)
    with pytest.raises(Forged, match="expired"):
        open_manifest(signed, now + made.expires_s + 1)
    assert open_manifest(signed, now - AHEAD) == made  # a clock that is slow by as much
    with pytest.raises(Forged, match="future"):
        open_manifest(signed, now - AHEAD - 1)
    with pytest.raises(Forged, match="signature"):
        open_manifest(signed.model_copy(update={"body": signed.body | {"version": 7}}), now, made.root_key)


def test_a_client_that_is_too_old_says_so_and_leaves_nothing_behind(run, tmp_path):
    """39: nor does the hub take anything of it."""
    with live_hub(draft(run, RECIPE, minimum_client="99.0"), run.store, "newer") as newer:
        with pytest.raises(BadInput, match="pip install -U"):
            volunteer(newer, tmp_path)
        state = open_folder(newer.url, Store(tmp_path / "volunteer")).read()
        assert (state.account, state.root_key, state.manifest) == ("", "", 0)
        with closing(Hub(newer.url, load_or_make_key(tmp_path / "key"))) as hub, pytest.raises(Problem, match="pip install") as caught:
            hub.post("/v1/accounts", NewAccount(name="a", recovery="0" * 64), "a")
        assert (caught.value.status, caught.value.code) == (426, "old-client")
        assert {row["name"] for row in rows(newer, "account")} == {"maintainer"}
