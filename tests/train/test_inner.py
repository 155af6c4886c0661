"""A machine's part of a star: what was applied and what is kept are all that was computed (T5), and an interrupted phase ends the same."""

import numpy as np
import pytest
import torch

from elmwood.corpus.tokens import Packed
from elmwood.lm.load import load_model
from elmwood.outer.compress import open_delta
from elmwood.outer.step import OUTER, read_tensors
from elmwood.records import Fate, Recipe, Star
from elmwood.train.data import batches
from elmwood.train.inner.phase import Slice, load_error, open_local, run_phase, settle_phase, unsettled
from elmwood.train.loss import find_abilities, loss

STEPS = 2


@pytest.fixture(scope="module")
def packed():
    rng = np.random.default_rng(0)
    token = rng.integers(1, 320, 4000).astype(np.uint16)
    starts = np.arange(0, 4000, 40)
    token[starts] = 0
    return Packed(token, starts, 0)


def star_of(seed, form):
    recipe = Recipe(steps=100, batch=2, length=16, learning_rate=1e-3)
    return Star(name="s", seed=seed.digest, corpus="1" * 64, recipe=recipe, steps=STEPS, parts=4, form=form, outer=OUTER)


def fate(id, code, scale=1.0):
    told = "rejected" if code else "applied"
    return Fate(proposal=id, worker="ed25519:" + "0" * 64, base=0, tokens=1, fate=told, code=code, scale=scale)


@pytest.mark.parametrize("form", ["int8", "top"])
def test_applied_and_error_are_the_sum_of_all_deltas(form, seed, store, packed, tmp_path, float32):
    """T5, one that was lost and rejections included; the error of what did harm is dropped, and counted."""
    local = open_local(load_model(seed, store, device="cpu"), packed, star_of(seed, form), tmp_path)
    base = store.get(seed.files["model.safetensors"])
    computed, applied, dropped = ({name: np.zeros(weight.numel()) for name, weight in local.weights.items()} for _ in range(3))
    for n, (code, scale) in enumerate([("", 1.0), ("lost", 1.0), ("", 0.5), ("harm", 1.0), ("", 1.0)]):
        id = f"{n:08d}"
        sent = open_delta(run_phase(local, Slice(id, 0, n % 4, STEPS * n), base), local.shapes, form)
        before = load_error(local)
        for name, value_N in read_tensors(base):
            computed[name] += local.weights[name].detach().numpy().reshape(-1) - value_N
            if not code:
                applied[name] += scale * sent.values(name)
            if code == "harm":
                moved_N = local.weights[name].detach().numpy().reshape(-1) - value_N
                dropped[name] += moved_N + before.get(name, 0)
        assert unsettled(local) == [id]
        norm = settle_phase(local, id, None if code == "lost" else fate(id, code, scale))
        assert not unsettled(local)
        assert (norm > 0) == (code == "harm")
        error = load_error(local)
        assert settle_phase(local, id, fate(id, code, scale)) == 0  # told twice
        for name in computed:
            assert np.array_equal(load_error(local)[name], error[name])
            assert np.allclose(applied[name] + error[name] + dropped[name], computed[name], atol=1e-6)
    assert sum(float(np.abs(value).sum()) for value in applied.values()) > 0


@pytest.mark.parametrize("chunked", [True, False])
def test_the_losses_of_rows_are_those_of_each_alone(chunked, seed, store, packed, float32):
    """In one pass, as the judge computes them; the last row holds several documents."""
    model = load_model(seed, store, device="cpu").eval()
    able = find_abilities(model)._replace(chunked=chunked)
    batch = next(batches(packed, Recipe(steps=1, batch=3, length=64)))
    rows = [torch.from_numpy(part) for part in batch]
    with torch.no_grad():
        each = [loss(model, able, *(part[n : n + 1] for part in rows)).item() for n in range(3)]
        assert loss(model, able, *rows, groups=3).tolist() == pytest.approx(each, rel=1e-5)


def test_an_interrupted_phase_ends_the_same(seed, store, packed, tmp_path, float32):
    base, star = store.get(seed.files["model.safetensors"]), star_of(seed, "int8")
    made = []
    for folder in ("whole", "cut"):
        for attempt in range(2 if folder == "cut" else 1):
            local = open_local(load_model(seed, store, device="cpu"), packed, star, tmp_path / folder)

            def stop(step, attempt=attempt, folder=folder):
                if folder == "cut" and not attempt and step == 1:
                    raise KeyboardInterrupt

            try:
                made.append(run_phase(local, Slice("00000000", 0, 1, 0), base, stop).read_bytes())
            except KeyboardInterrupt:
                assert not list((tmp_path / folder).glob("sent-*"))
    assert made[0] == made[1]
