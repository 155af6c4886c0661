"""Merge rules and gates of the user's own: 'module:function', resolved where it is typed and nowhere else."""

import importlib
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import full_expert, lora_expert

from elmwood.errors import BadInput, UnknownName
from elmwood.merge.moe.build import Mixing, gate_rows, mix
from elmwood.merge.rules.table import RULES, open_rules
from elmwood.merge.states import check
from elmwood.records import Forest, Gates
from elmwood.store import Store
from elmwood.study import merging, mixing

CODE = '''
import numpy as np
from elmwood.merge.rules.base import Rule

def clipped(delta_N, weight, *, limit=0.05):
    """Each value within a limit."""
    return weight * np.clip(delta_N, -limit, limit)

def _halves(sums, seed_N, total, settings):
    return seed_N + sums[0] / 2

half = Rule("nobody", ("sum",), lambda delta_N, weight, local, settings: (delta_N * weight,), _halves, {}, {})
narrow = lambda delta_N, weight: delta_N[:1]
vague = lambda delta_N, weight, limit: delta_N
number = 3

def flat(inputs):
    return np.full((inputs.width, len(inputs.experts)), inputs.scale * np.arange(1, len(inputs.experts) + 1)).T

def short(inputs):
    return np.ones((1, inputs.width))
'''
OWN = "own_rules_of_a_test"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module on the path, not imported."""
    (tmp_path / f"{OWN}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, OWN, raising=False)
    importlib.invalidate_caches()
    return tmp_path / f"{OWN}.py"


@pytest.fixture(scope="module")
def experts(store, seed):
    return [full_expert(seed, store, n) for n in range(2)] + [lora_expert(seed, store, 2)]


def test_states_of_an_own_rule_add_and_subtract_as_others_do(own, store, seed, experts):
    rule = {"method": f"{OWN}:clipped", "settings": {"limit": 0.03}}
    merged = merging.merge(experts, store, **rule).record
    base = load_file(store.get(seed.files["model.safetensors"]))
    mine = [load_file(store.get(one.files["model.safetensors"])) for one in (*experts[:2], merged)]
    name = "model.norm.weight"
    wanted = base[name] + sum((one[name] - base[name]).clamp(-0.03, 0.03) for one in mine[:2])
    np.testing.assert_allclose(mine[2][name], wanted, atol=1e-7)
    whole = merging.state_make(experts, store, **rule)
    halves = [merging.state_make(some, store, **rule) for some in (experts[:1], experts[1:])]
    assert merging.state_add(halves, store, method=rule["method"]).digest == whole.digest
    assert merging.state_remove(whole, experts[1:], store, method=rule["method"]).digest == halves[0].digest
    assert merging.state_finalize(whole, store, method=rule["method"]).record.files == merged.files
    parts = merging.merge(experts, store, parts=2, **rule).record
    assert parts.files["model.safetensors"] == merged.files["model.safetensors"]


def test_a_record_does_not_run_the_code_it_names(own, store, experts):
    whole = merging.state_make(experts, store, method=f"{OWN}:clipped")
    halves = [merging.state_make(some, store, method=f"{OWN}:clipped") for some in (experts[:1], experts[1:])]
    del sys.modules[OWN]
    for attempt in (
        lambda: merging.state_finalize(whole, store),
        lambda: merging.state_add(halves, store),
        lambda: merging.state_remove(whole, experts[:1], store),
        lambda: check(whole, Store(store)),
        lambda: gate_rows(Forest(seed=whole.seed, partition="0" * 64, experts=()), Gates(kind=f"{OWN}:flat"), [1.0], store),
    ):
        with pytest.raises(UnknownName, match=r"--method|no gates"):
            attempt()
    assert OWN not in sys.modules


def test_another_version_of_the_code_is_another_task(own, store, experts):
    before = merging.merge(experts, store, method=f"{OWN}:clipped").record
    own.write_text(CODE.replace("weight * np.clip", "2 * weight * np.clip"))
    importlib.invalidate_caches()
    del sys.modules[OWN]
    after = merging.merge(experts, store, method=f"{OWN}:clipped").record
    assert before.files["model.safetensors"] != after.files["model.safetensors"]


def test_a_rule_may_end_as_it_likes(own, store, experts):
    half = merging.merge(experts, store, method=f"{OWN}:half").record
    wanted = merging.merge(experts, store, method="task_arithmetic", scale=0.5).record
    assert half.files["model.safetensors"] == wanted.files["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("narrow", "element by element"), ("vague", "default"), ("number", "write a function"), ("absent", "cannot load")],
)
def test_what_is_no_rule_is_refused(own, name, words, store, experts):
    with pytest.raises((BadInput, UnknownName), match=words):
        merging.merge(experts, store, method=f"{OWN}:{name}")


def test_the_table_stays_as_it_is(own):
    rules = open_rules([f"{OWN}:clipped", "ties"])
    assert rules.keys() - RULES.keys() == {f"{OWN}:clipped"}
    assert f"{OWN}:clipped" not in RULES


def test_own_gates_and_an_own_rule_for_what_a_mixture_shares(own, store, seed, experts):
    forest = Forest(seed=seed.digest, partition="0" * 64, experts=tuple(one.digest for one in experts))
    store.add(forest)
    made = mixing.mix(forest, store, gates=f"{OWN}:flat", scale=0.5, method=f"{OWN}:clipped").record
    assert (made.gates.kind, made.method) == (f"{OWN}:flat", f"{OWN}:clipped")
    gates = load_file(store.get(next(blob for name, blob in made.files.items() if name.startswith("model-00001"))))
    assert all(bool((torch.tensor([0.5, 1.0, 1.5, 2.0]) == value.T).all()) for value in gates.values())
    with pytest.raises(UnknownName, match="--method"):
        mixing.mix(made, store, without=experts[0])
    rest = mixing.mix(made, store, without=experts[0], method=made.method).record
    assert len(rest.experts) == 3
    with pytest.raises(BadInput, match="gates of shape"):
        mixing.mix(forest, store, gates=f"{OWN}:short")
    with pytest.raises(UnknownName, match="--method"):
        mix(forest, {}, Mixing(method=f"{OWN}:clipped"), store)
