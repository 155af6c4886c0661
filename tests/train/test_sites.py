"""Sites of a DiLoCo run as real processes on the loopback: two die, one is started again; those that are left agree to the byte."""

import json
from pathlib import Path

import pytest
import torch

from benches.links.loss import run_sites
from elmwood.errors import BadInput
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model
from elmwood.records import Diloco, Recipe, Seed
from elmwood.store import Store
from elmwood.study.seeds import plan_diloco
from elmwood.train.card import precision
from elmwood.train.data import split_batch
from elmwood.train.loop import adamw, add_gradients, update_weights
from elmwood.train.loss import Abilities
from elmwood.train.seeds.stream import Source, Stream
from elmwood.train.sites.healing import Held, Transport
from elmwood.train.sites.site import divide
from elmwood.train.sites.task import find_address

SCRIPT = """
import json, os, shutil, signal, sys, warnings
warnings.filterwarnings("ignore", "The 'warn' method", DeprecationWarning)  # torchft's
root, plans = sys.argv[1:]
from elmwood.train.sites import lasting
from elmwood.train.sites.task import train_at_site
from torchft.coordination import LighthouseServer
from torchft.manager import Manager
from elmwood.records import Diloco, fingerprint
from elmwood.store import Store
from elmwood.train.card import precision
precision.uses_bf16 = lambda device: False

def fork(work):
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        print(json.dumps({"failed": repr(error)}), flush=True)
    os._exit(0)

def lighthouse(sites, port=0):
    ends = os.pipe()
    def work():
        most = sites // 2 + 1
        server = LighthouseServer(f"127.0.0.1:{port}", most, join_timeout_ms=60000, quorum_tick_ms=20, heartbeat_timeout_ms=5000)
        os.write(ends[1], server.address().rpartition(":")[2].encode() + b"\\n")
        signal.pause()
    child = fork(work)
    return child, f"http://127.0.0.1:{os.read(ends[0], 9).decode().strip()}"

def start(plan, name, number, address, dies=None, dark=None):
    def work():
        def tell(_=None):
            os.write(dark["told"][1], b"1")
        def on_step(round, step):
            if dark and (round, step) == (1, 1):
                tell()
                os.read(dark["go"][0], 1)
            if (round, step) == dies:
                os.kill(os.getpid(), signal.SIGKILL)
        if dark:
            lasting.sleep = tell  # there is no lighthouse
        if dies == "in the sum":
            whole = Manager.allreduce
            def allreduce(self, tensor, **options):
                if self.current_step() == 2 and len(tensor) > 100:
                    os.kill(os.getpid(), signal.SIGKILL)
                return whole(self, tensor, **options)
            Manager.allreduce = allreduce
        made = train_at_site(plan, number, address, Store(root), name=name, wait_s=120, on_step=on_step)
        print(json.dumps({"name": name, "site": number, "seed": made.digest}), flush=True)
    return fork(work)

def run(plan, name, dies={}, again=None, anew=False, dark=None):
    light, address = lighthouse(plan.sites)
    children = {number: start(plan, name, number, address, dies.get(number), dark) for number in range(plan.sites)}
    if dark:
        for _ in children:  # until all are in the steps of the second round
            os.read(dark["told"][0], 1)
        os.kill(light, signal.SIGKILL)
        os.waitpid(light, 0)
        os.write(dark["go"][1], b"1" * plan.sites)
        os.read(dark["told"][0], 1)  # until one of them found none
        light, same = lighthouse(plan.sites, address.rpartition(":")[2])
        assert same == address
    if again is not None:
        os.waitpid(children[again], 0)
        if anew:  # its disk too
            shutil.rmtree(Store(root).work(fingerprint("diloco", plan, name, again)))
        children[again] = start(plan, name, again, address)
    ends = [os.waitpid(child, 0)[1] for child in children.values()]
    print(json.dumps({"name": name, "ends": ends}), flush=True)
    os.kill(light, signal.SIGKILL)
    os.waitpid(light, 0)

two, five, streamed, three = (Diloco.model_validate_json(one) for one in json.loads(plans))
run(two, "two")
run(two, "again", {1: (1, 2)}, again=1)
run(two, "anew", {1: (1, 2)}, again=1, anew=True)
run(five, "five", {4: (1, 2), 3: "in the sum"})
run(streamed, "streamed")
run(three, "dark", {2: (1, 2)}, dark={"told": os.pipe(), "go": os.pipe()})
"""
RECIPE = Recipe(steps=12, batch=4, length=32, learning_rate=3e-3, schedule="wsd")


@pytest.fixture(scope="module")
def runs(place, forked, tmp_path_factory):
    """A store in which sites trained, the plans, and what the sites said by the name of the run."""
    store, seed = Store(place), Store(place).load("seed", Seed)
    two = Diloco(seed=seed.digest, corpus=seed.corpus, recipe=RECIPE, sites=2, steps=4)
    five = two.model_copy(update={"sites": 5, "recipe": RECIPE.model_copy(update={"batch": 10, "steps": 16})})
    streamed = two.model_copy(update={"fragments": 2, "delay": 1, "keep": 0.5})
    three = two.model_copy(update={"sites": 3, "recipe": RECIPE.model_copy(update={"batch": 6})})
    plans = json.dumps([one.model_dump_json() for one in (two, five, streamed, three)])
    done = forked(SCRIPT, str(store.root), plans, cwd=tmp_path_factory.mktemp("sites"))
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [one for one in said if "failed" in one], said
    ends = {one["name"]: one["ends"] for one in said if "ends" in one}
    made = {name: [one["seed"] for one in said if one["name"] == name and "seed" in one] for name in ends}
    return store, {"two": two, "five": five, "streamed": streamed, "dark": three}, made, ends


def weights(digest: str, store: Store) -> dict[str, torch.Tensor]:
    return dict(load_model(store.load(digest, Seed), store, device="cpu").named_parameters())


def test_sites_make_one_record_that_names_the_plan(runs):
    store, plans, made, ends = runs
    assert ends["two"] == [0, 0]
    (digest,) = set(made["two"])
    seed = store.load(digest, Seed)
    assert (seed.plan, seed.recipe, seed.corpus) == (plans["two"].digest, RECIPE, plans["two"].corpus)
    assert store.load(seed.plan, Diloco).seed == plans["two"].seed
    assert [point.tokens for point in seed.curve] == [512, 1024, 1536]
    assert seed.curve[-1].loss < seed.curve[0].loss


def test_it_is_diloco(runs, monkeypatch):
    """The same rounds written a second time: torch's SGD with Nesterov momentum on the mean of what two sites changed."""
    store, plans, made, _ = runs
    plan, seed = plans["two"], store.load(plans["two"].seed, Seed)
    monkeypatch.setattr(precision, "uses_bf16", lambda device: False)
    outer = load_model(seed, store, device="cpu", dtype=torch.float32)
    sites = [load_model(seed, store, device="cpu", dtype=torch.float32).train() for _ in range(2)]
    moments = [adamw(dict(site.named_parameters()), RECIPE) for site in sites]
    step = torch.optim.SGD(outer.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    own = RECIPE.model_copy(update={"batch": 2})
    rows = Stream([Source(store.load(plan.corpus))], tokenizer(seed, store), seed.separator, RECIPE, store)(0)
    for number in range(RECIPE.steps):
        for site, moment, batch in zip(sites, moments, split_batch(next(rows), 2), strict=True):
            add_gradients(site, Abilities(False, False), batch, own)
            update_weights(moment, RECIPE, number)
        if (number + 1) % 4:
            continue
        for weight, *others in zip(outer.parameters(), *(site.parameters() for site in sites), strict=True):
            weight.grad = weight.detach() - sum(others).detach() / 2
        step.step()
        for site in sites:
            site.load_state_dict(outer.state_dict())
    found = weights(made["two"][0], store)
    for name, weight in outer.named_parameters():
        torch.testing.assert_close(found[name], weight.detach(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["again", "anew"])
def test_a_killed_site_comes_back_at_the_round_of_the_other(runs, name):
    """From its own checkpoint; or, where that is lost too, from the state of the other, which goes on waiting for the quorum of two."""
    store, plans, made, ends = runs
    assert ends[name] == [0, 0]
    assert len(made[name]) == 2
    (digest,) = set(made[name])
    each, seed = plans["two"].tokens, store.load(digest, Seed)
    assert [point.tokens // each for point in seed.curve] == [2, 3, 5]  # in the second round it lost its steps, and added nothing
    assert all(weight.isfinite().all() for weight in weights(digest, store).values())


def test_the_rest_go_on_where_one_dies_in_its_steps_and_one_in_the_sum(runs):
    store, plans, made, ends = runs
    assert ends["five"] == [0, 0, 0, 9, 9]
    assert len(made["five"]) == 3
    (digest,) = set(made["five"])
    seed, each = store.load(digest, Seed), plans["five"].tokens
    assert all(weight.isfinite().all() for weight in weights(digest, store).values())
    assert [point.tokens // each for point in seed.curve] == [5, 9, 12, 15]  # sites in each round: 5, 4, 3 (at its second try), 3
    assert seed.curve[-1].loss < seed.curve[0].loss


def test_sites_go_on_when_the_lighthouse_is_killed_and_started_again(runs):
    """At the same address, and it counts its quorums anew; a site dies meanwhile."""
    store, plans, made, ends = runs
    assert ends["dark"] == [0, 0, 9]
    assert len(made["dark"]) == 2
    (digest,) = set(made["dark"])
    each = plans["dark"].tokens
    assert [point.tokens // each for point in store.load(digest, Seed).curve] == [3, 5, 7]


def test_streaming_ends_with_the_weights_of_all(runs):
    store, plans, made, ends = runs
    assert ends["streamed"] == [0, 0]
    assert len(made["streamed"]) == 2
    (digest,) = set(made["streamed"])
    assert plans["streamed"].rounds == 6
    assert store.load(digest, Seed).curve[-1].loss < store.load(digest, Seed).curve[0].loss


def test_streaming_is_what_the_bench_computes_in_one_process(runs, monkeypatch):
    store, plans, made, _ = runs
    plan, seed = plans["streamed"], store.load(plans["streamed"].seed, Seed)
    monkeypatch.setattr(precision, "uses_bf16", lambda device: False)
    models = [load_model(seed, store, device="cpu", dtype=torch.float32) for _ in range(plan.sites)]
    rows = Stream([Source(store.load(plan.corpus))], tokenizer(seed, store), seed.separator, plan.recipe, store)(0)
    done: list[int] = []
    whole = run_sites(models, plan, rows, lambda steps, _: done.append(steps))
    assert done == [2, 4, 6, 8, 10, 12]
    for name, weight in weights(made["streamed"][0], store).items():
        torch.testing.assert_close(whole[name], weight.detach(), atol=1e-6, rtol=0)


def test_fragments_have_every_weight_once(case):
    store, _, seed = case
    model = load_model(seed, store, device="cpu")
    names = [name for name, _ in model.named_parameters()]
    parts = divide(model, 2)
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert {name.split(".")[2] for name in parts[1] if ".layers." in name} == {"1"}
    with pytest.raises(BadInput, match="--fragments 3: the seed has 2 layers"):
        divide(model, 3)


def test_a_state_travels_without_pickle(tmp_path: Path):
    from datetime import timedelta

    transport, held = Transport("127.0.0.1", tmp_path), Held({"whole.a": torch.arange(3.0)}, {"round": 4})
    try:
        transport.send_checkpoint([1], 4, {"user": {"site": held}, "torchft": {"step": 4}}, timedelta(seconds=5))
        got = transport.recv_checkpoint(0, transport.metadata(), 4, timedelta(seconds=5))
    finally:
        transport.shutdown()
    assert got["torchft"] == {"step": 4}
    assert got["user"]["site"].plain == {"round": 4}
    assert torch.equal(got["user"]["site"].tensors["whole.a"], held.tensors["whole.a"])


@pytest.mark.parametrize(
    ("lighthouse", "why"),
    [("10.0.0.1:29510", "write http://HOST:PORT"), ("http://8.8.8.8:29510", "public address|no way there")],
)
def test_a_public_or_odd_address_is_refused(lighthouse, why):
    with pytest.raises(BadInput, match=why):
        find_address(lighthouse)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"steps": 5, "fragments": 2}, "--steps 5 is no multiple of --fragments 2: choose 6"),
        ({"steps": 4, "fragments": 2, "delay": 2}, "--delay 2: fragments are exchanged 2 steps apart"),
        ({"tokens": 100}, "less than a round of 4"),
        ({"keep": 1.0}, "--keep"),
    ],
)
def test_plans_that_cannot_be_are_refused(case, options, why):
    store, _, seed = case
    plain = {"sites": 2, "corpus": None, "tokens": 4096, "steps": 4, "batch": 2, "length": 32, "learning_rate": None, "threads": 1}
    plain |= {"fragments": 1, "delay": 0, "keep": 0.0, "rate": 0.7, "momentum": 0.9}
    assert plan_diloco(seed, store, **plain).rounds == 8
    with pytest.raises(BadInput, match=why):
        plan_diloco(seed, store, **plain | options)
