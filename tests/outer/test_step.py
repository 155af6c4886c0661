"""The outer step: the same bytes in any order of arrival (T3), by the formula written a second time."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elmwood.errors import BadInput
from elmwood.outer import gates
from elmwood.outer.compress import open_delta
from elmwood.outer.gates import Facts, Gains
from elmwood.outer.step import OUTER, STEP, Part, Written, average, follow, mean_apart, step, weight_of

SHAPES = {"embed": (20, 8), "layer.weight": (8, 8), "norm": (8,)}


@pytest.fixture
def weights(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "model.safetensors"
    save_file({name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}, path)
    return path


def deltas(count, rng_seed=1):
    rng = np.random.default_rng(rng_seed)
    return [{name: rng.standard_normal(np.prod(shape)).astype(np.float32) * 1e-2 for name, shape in SHAPES.items()} for _ in range(count)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("how", ["mean", "median"])
def test_any_order_of_arrival_gives_the_same_bytes(how, apart, weights, tmp_path):
    parts = [
        Part(delta.__getitem__, weight, scale) for delta, weight, scale in zip(deltas(4), (3.0, 1.0, 0.5, 0.7), (1, 1, 0.3, 1), strict=True)
    ]
    outer = OUTER.model_copy(update={"apart": apart})
    (tmp_path / "made").mkdir()
    error = tmp_path / "error"
    save_file({name: value.reshape(SHAPES[name]) for name, value in deltas(1, 9)[0].items()}, error)
    orders = itertools.permutations(parts)
    made = {tuple(file.sha for file in step(weights, None, error, order, outer, how, tmp_path / "made")) for order in orders}
    assert len(made) == 1


def test_two_steps_are_nesterov_momentum(weights, tmp_path):
    """theta and velocity after two steps, by the formula of DiLoCo in float64."""
    theta = {name: value.astype(np.float64).reshape(-1) for name, value in load_file(weights).items()}
    speed = {name: np.zeros_like(value) for name, value in theta.items()}
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    first, second = ([Part(delta.__getitem__, 1.0) for delta in deltas(3, seed)] for seed in (5, 6))
    made = step(weights, None, None, first, OUTER, "mean", tmp_path / "one")
    made = step(*(file.path for file in made[:3]), second, OUTER, "mean", tmp_path / "two")
    left = load_file(made.error.path)
    for seed in (5, 6):
        for name in theta:
            mean = np.mean([delta[name].astype(np.float64) for delta in deltas(3, seed)], axis=0)
            speed[name] = OUTER.momentum * speed[name] + mean
            theta[name] = theta[name] + OUTER.rate * (mean + OUTER.momentum * speed[name])
    for name, value in load_file(made.weights.path).items():
        assert value.shape == SHAPES[name]
        assert np.allclose((value + left[name]).reshape(-1), theta[name], atol=1e-6)
        assert np.allclose(value.reshape(-1), theta[name], atol=1e-3 * np.abs(theta[name]).max())


def test_who_has_an_earlier_version_computes_the_bytes_of_a_later_one(weights, tmp_path):
    """From the steps between them, of about a byte a value."""
    held, made = (weights, None, None), list[Written]()
    for n in range(3):
        (tmp_path / str(n)).mkdir()
        made.append(step(*held, [Part(deltas(1, n)[0].__getitem__, 1.0)], OUTER, "mean", tmp_path / str(n)))
        held = tuple(file.path for file in made[-1][:3])
    sent = [open_delta(one.step.path, SHAPES, STEP) for one in made]
    assert follow(weights, sent, tmp_path / "again").sha == made[2].weights.sha
    assert (tmp_path / "again").read_bytes() == made[2].weights.path.read_bytes()
    assert follow(made[0].weights.path, sent[1:], tmp_path / "again").sha == made[2].weights.sha
    assert follow(made[0].weights.path, sent[2:], tmp_path / "again").sha != made[2].weights.sha


def test_what_codes_leave_out_is_not_lost(weights, tmp_path):
    """After many steps the weights are where they would be without codes, to half a code of the last one."""
    parts = [Part(deltas(1, 3)[0].__getitem__, 1.0)]
    held, theta, speed = (weights, None, None), load_file(weights)["norm"].astype(float), np.zeros(8)
    for n in range(20):
        (tmp_path / str(n)).mkdir()
        written = step(*held, parts, OUTER, "mean", tmp_path / str(n))
        held = tuple(file.path for file in written[:3])
        mean = deltas(1, 3)[0]["norm"].astype(float)
        speed = OUTER.momentum * speed + mean
        theta += OUTER.rate * (mean + OUTER.momentum * speed)
    code = np.abs(open_delta(written.step.path, SHAPES, STEP).values("norm")).max() / 127
    assert np.abs(load_file(written.weights.path)["norm"] - theta).max() < 0.51 * code
    assert np.abs(load_file(written.error.path)["norm"]).max() < 0.51 * code


def test_norms_and_directions_apart():
    one, other = np.array([3.0, 0], np.float32), np.array([0, 1.0], np.float32)
    assert mean_apart([one, other], [1, 1], [1, 1]) == pytest.approx(np.array([2, 2]) / np.sqrt(2))
    assert np.array_equal(mean_apart([one, -one], [1, 1], [1, 1]), [0, 0])
    outer = OUTER.model_copy(update={"apart": True})
    parts = [Part(lambda name: one, 1.0), Part(lambda name: other, 1.0)]
    assert average("embed.weight", (1, 2), parts, outer, "mean") == pytest.approx([1.5, 0.5])  # embeddings plainly
    assert average("layer.weight", (1, 2), parts, outer, "mean") == pytest.approx([2**0.5, 2**0.5])


def test_a_late_delta_weighs_less_and_a_later_one_nothing():
    assert weight_of(100, 0, OUTER) == 100
    assert weight_of(100, 2, OUTER) == pytest.approx(50)
    with pytest.raises(BadInput, match="3 versions behind"):
        weight_of(100, 3, OUTER)


def test_a_median_does_not_follow_one_of_three(weights, tmp_path):
    honest, other, hostile = deltas(3)
    hostile = {name: value * 1e3 for name, value in hostile.items()}
    mean_N = average("norm", (8,), [Part(one.__getitem__, 1.0) for one in (honest, other, hostile)], OUTER, "median")
    low_N, high_N = np.minimum(honest["norm"], other["norm"]), np.maximum(honest["norm"], other["norm"])
    assert ((low_N <= mean_N) & (mean_N <= high_N)).all()
    with pytest.raises(BadInput, match="needs 3"):
        step(weights, None, None, [Part(honest.__getitem__, 1.0)], OUTER, "median", tmp_path)


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_norms_outside_of_the_band_are_refused_and_large_ones_cut():
    facts = [Facts(*row) for row in (("a", 1.0), ("b", 1.2), ("c", 0.9), ("d", 50.0), ("e", 0.0), ("f", None), ("g", 2.0))]
    codes, scales = gates.judge_norms(facts, None)
    assert codes == {"d": "norm", "e": "norm", "f": "not-finite"}
    assert scales == {"a": 1.0, "b": 1.0, "c": 1.0, "g": pytest.approx(0.6)}
    assert gates.judge_norms([Facts("a", 0.0)], None)[0] == {"a": "norm"}


def test_of_two_equal_deltas_the_earlier_is_the_original():
    """By sketches, whose cosines are those of the deltas; also of deltas that were applied, and of the step that everybody knows of."""
    rng = np.random.default_rng(0)
    shapes = {"a": (90, 100), "b": (7,)}

    def sketch(delta):
        return gates.sketch(shapes, delta.__getitem__)

    one, two = ({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(2))
    near = {name: one[name] + 0.05 * two[name] for name in shapes}
    other = {name: one[name] + 0.5 * two[name] for name in shapes}
    given = {
        "a": sketch(one),
        "b": sketch(two),
        "c": sketch(near),
        "d": sketch(other),
        "e": sketch({name: 0 * two[name] for name in shapes}),
    }
    assert gates.find_copies(given) == {"c"}
    assert gates.find_copies({"b": given["b"], "c": given["c"]}, [2 * given["a"], given["e"]]) == {"c"}
    assert gates.find_copies({"b": given["b"], "c": given["c"]}, earlier=[given["a"]]) == set()
    assert gates.find_copies({"b": given["b"], "c": given["c"]}, earlier=[2 * given["b"]]) == {"b"}
    assert given["a"] @ given["d"] / np.linalg.norm(given["a"]) / np.linalg.norm(given["d"]) == pytest.approx(1 / 1.25**0.5, abs=0.05)


def test_gains_must_be_on_own_text_and_no_harm_beyond_doubt_on_secret_text():
    good, bad, doubtful = np.array([0.01, 0.02, -0.001]), np.array([-0.01, -0.02, -0.012]), np.array([-0.01, 0.008, -0.002])
    assert gates.judge_gains(Gains(good, good)) == gates.judge_gains(Gains(good, doubtful)) == ""
    assert {gates.judge_gains(Gains(*pair)) for pair in ((good, bad), (bad, good), (doubtful, good), (0 * good, good))} == {"harm"}
    assert gates.judge_gains(Gains(np.array([np.nan]), good)) == gates.judge_gains(Gains(good, np.array([np.nan]))) == "harm"
    assert gates.most_guilty({"a": Gains(good, good), "b": Gains(good, bad)}) == ["b", "a"]


def test_worse_is_three_standard_errors():
    before = np.arange(20.0)
    noise = np.tile([0.1, -0.1], 10)
    assert not gates.is_worse(before, before + noise + 0.01)
    assert gates.is_worse(before, before + noise + 0.1)
    assert not gates.is_worse(before, before - 1)
    assert gates.is_worse(before, before + np.nan)
