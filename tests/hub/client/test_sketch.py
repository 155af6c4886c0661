"""A sketch finds copies and blends among many experts, in any basis, and the exact comparison looks at those alone."""

import json

import numpy as np
import pytest
import safetensors.numpy
from tiny_models import lora_expert

from elmwood.weights.experts import Low, seed_places
from elmwood.weights.similarity import products, top_energy
from elmwood.weights.sketch import PICKED, ROUNDS, kept_sketches, likely, pick, sketch

EXPERTS = 60


@pytest.fixture(scope="module")
def bank(store, seed):
    return [lora_expert(seed, store, rng_seed=n) for n in range(EXPERTS)]


def remake(like, store, change):
    """An expert with other factors: `change` maps A [R, I] and B [O, R] of each layer."""
    held = safetensors.numpy.load_file(store.get(like.files["adapter_model.safetensors"]))
    settings = json.loads(store.get(like.files["adapter_config.json"]).read_text())
    made = {}
    for name in held:
        if "lora_A" in name:
            a_RI, b_OR = change(name, held[name], held[name.replace("lora_A", "lora_B")])
            made |= {name: a_RI.astype(np.float32), name.replace("lora_A", "lora_B"): b_OR.astype(np.float32)}
    rank = len(next(value for name, value in made.items() if "lora_A" in name))
    settings |= {"lora_alpha": settings["lora_alpha"] * rank / settings["r"], "r": rank}
    files = {
        "adapter_model.safetensors": store.put(safetensors.numpy.save(made)),
        "adapter_config.json": store.put(json.dumps(settings).encode()),
    }
    expert = like.model_copy(update={"files": files, "recipe": like.recipe.model_copy(update={"rank": rank})})
    store.add(expert)
    return expert


def factors_of(expert, store):
    return safetensors.numpy.load_file(store.get(expert.files["adapter_model.safetensors"]))


def test_a_copy_in_another_basis_has_the_sketch_of_its_original(bank, store, seed):
    rng, tensors = np.random.default_rng(1), seed_places(seed, store)

    def turn(name, a_RI, b_OR):
        mix_RR = rng.standard_normal((len(a_RI), len(a_RI)))
        return np.linalg.inv(mix_RR) @ a_RI, b_OR @ mix_RR

    copy = remake(bank[7], store, turn)
    one, other = (sketch(Low(each.digest, store.folder(each.files), tensors), tensors) for each in (bank[7], copy))
    np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(one).max())
    assert bank[7] in likely(copy, bank, seed, store)


def test_inner_products_of_sketches_are_near_those_of_deltas(bank, store, seed):
    tensors = seed_places(seed, store)
    own_S = sketch(Low(bank[0].digest, store.folder(bank[0].files), tensors), tensors)
    sketch_ES = kept_sketches(bank, seed, tensors, len(own_S), store)
    exact_EE = products(bank, seed, store)
    unit_E = 1 / np.sqrt(np.diag(exact_EE))
    error_EE = (sketch_ES @ sketch_ES.T - exact_EE) * np.outer(unit_E, unit_E)
    assert np.abs(error_EE).mean() < 0.05
    again = kept_sketches(bank[::-1], seed, tensors, len(own_S), store)
    assert np.array_equal(again, sketch_ES[::-1])
    with next((store.root / "sketches").iterdir()).open("ab") as file:
        file.write(b"a row that was cut short")
    more = [*bank, lora_expert(seed, store, rng_seed=99)]
    assert np.array_equal(kept_sketches(more, seed, tensors, len(own_S), store)[:-1], sketch_ES)


def test_blends_of_two_and_of_five_are_found(bank, store, seed):
    for members in ((3, 40), (1, 12, 23, 34, 45)):
        others = [factors_of(bank[m], store) for m in members]

        def blend(name, a_RI, b_OR, others=others):
            b_name = name.replace("lora_A", "lora_B")
            return np.concatenate([one[name] for one in others]), np.concatenate([one[b_name] for one in others], 1) / len(others)

        mixed = remake(bank[members[0]], store, blend)
        found = likely(mixed, bank, seed, store)
        assert {bank[m].digest for m in members} <= {one.digest for one in found}
        assert len(found) <= ROUNDS * PICKED


def test_of_strangers_few_are_picked():
    rng = np.random.default_rng(0)
    sketch_ES = rng.standard_normal((3000, 2048)).astype(np.float32)
    assert len(pick(rng.standard_normal(2048), sketch_ES)) <= 2
    assert pick(np.zeros(2048), sketch_ES) == []
    assert 5 in pick(-2 * sketch_ES[5], sketch_ES)


def test_the_energy_of_one_direction(bank, store, seed):
    flat = top_energy(bank[0], seed, store)
    spiked = remake(bank[0], store, lambda name, a_RI, b_OR: (a_RI, b_OR * np.array([1, 0, 0, 0])))
    assert 0.25 < flat < 0.7
    assert top_energy(spiked, seed, store) == pytest.approx(1)
