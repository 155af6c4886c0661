"""Mixtures of experts: the laws of what is written, and that other tools open it."""

import json
from contextlib import nullcontext
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import WORDS, config_seed, full_expert, lora_expert, tiny_seed
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Olmo2Config, Qwen3Config

from elmwood.corpus.build import build
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, BadSeed
from elmwood.merge.moe import layout
from elmwood.merge.moe.build import Mixing, find_directions, mix, order_of
from elmwood.merge.moe.gates import GateInputs, arrow_gates, arrow_rows, check_rows, direction, hidden_rows, random_rows
from elmwood.merge.moe.remove import remove, rename_tensor
from elmwood.merge.states import seed_places
from elmwood.records import Expert, Forest, Gates, Mixture, Recipe, Seed
from elmwood.report.plots import loads_plot
from elmwood.store import Store
from elmwood.train import loop
from elmwood.train.fit.mixture import fit_mixture
from elmwood.train.router import measure_loads, open_mixture, select_trained, tune, tune_key

SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
SEEDS = {
    "llama": LlamaConfig(**SMALL, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 777.0}),
    "mistral": MistralConfig(**SMALL, sliding_window=16),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**SMALL, eos_token_id=0),
}
OWN = {"architectures", "model_type", "layer_types", "max_window_layers", "mlp_bias", "pretraining_tp", "sliding_window", "_name_or_path"}
TOKENS_BT = torch.randint(320, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def grown(store):
    """A seed with full experts, and with adapters."""
    seed = tiny_seed(store)
    full = forest_of(seed, [full_expert(seed, store, n, domain=n) for n in range(3)], store)
    return seed, full, forest_of(seed, [lora_expert(seed, store, n, domain=n) for n in range(3)], store)


def forest_of(seed: Seed, experts: list[Expert], store: Store) -> Forest:
    forest = Forest(seed=seed.digest, partition="0" * 64, experts=tuple(expert.digest for expert in experts))
    store.add(forest)
    return forest


def mixed(forest: Forest, store: Store, rng_seed: int = 0, **fields) -> Mixture:
    gates = Gates(**{"seed_bias": 0.0, "rng_seed": rng_seed, **fields.pop("gates", {})})
    places = seed_places(store.load(forest.seed, Seed), store)
    rows = random_rows(places, order_of(forest, gates.seed_bias is not None, store), rng_seed, 50.0)
    return mix(forest, rows, Mixing(gates=gates, **fields), store)


def tensors_of(record: Mixture, store: Store) -> dict[str, bytes]:
    found = {}
    for path in sorted(store.folder(record.files).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("kind", SEEDS)
def test_copies_of_the_seed_equal_the_seed(kind, store):
    seed = config_seed(SEEDS[kind], store)
    copies = []
    for number in range(2):
        copies.append(Expert(seed=seed.digest, data=(), recipe=Recipe(steps=1), files=seed.files, contributor=f"copy {number}"))
        store.add(copies[-1])
    forest = forest_of(seed, copies, store)
    wanted = open_model(seed, store, "cpu").score(TOKENS_BT)
    for top_k in (1, 2, 3):
        record = mixed(forest, store, rng_seed=top_k, gates={"top_k": top_k})
        assert (open_model(record, store, "cpu").score(TOKENS_BT) - wanted).abs().max() < 1e-5
    config = AutoConfig.from_pretrained(store.folder(record.files)).to_dict()
    for field, value in AutoConfig.from_pretrained(store.folder(seed.files)).to_dict().items():
        if field not in OWN:
            assert config[field] == value, field


def test_names_on_disk_are_those_other_loaders_expect(grown, store):
    record = mixed(grown[1], store)
    names = set(tensors_of(record, store))
    assert {f"model.layers.1.block_sparse_moe.experts.{e}.w{n}.weight" for e in range(4) for n in (1, 2, 3)} < names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    folder = store.folder(record.files)
    assert set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) == names
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


def test_an_exporter_that_would_be_wrong_refuses(grown, store, monkeypatch):
    seed = config_seed(SEEDS["olmo2"], store)
    experts = [full_expert(seed, store, n) for n in range(2)]
    family = layout.FAMILIES["olmo2"]
    monkeypatch.setitem(layout.FAMILIES, "olmo2", family._replace(fixed={"norm_topk_prob": False}))
    with pytest.raises(BadSeed, match="differs from it by"):
        mixed(forest_of(seed, experts, store), store)


def test_low_rank_and_folded_agree(grown, store):
    for method in ("average", "seed"):
        for seed_bias in (None, 0.0):
            two = [
                open_model(mixed(grown[2], store, layout=layout, method=method, gates={"seed_bias": seed_bias}), store, "cpu")
                for layout in ("checkpoint", "low-rank")
            ]
            one, other = (lm.score(TOKENS_BT) for lm in two)
            assert (one - other).abs().max() < 1e-4
    _, cache = two[1].extend([0, 5, 7], two[1].start())
    logp_V, _ = two[1].extend([9], cache)
    assert abs(float(logp_V[3]) - float(two[0].score(torch.tensor([[0, 5, 7, 9, 3]]))[0, -1])) < 1e-4


def test_what_nobody_changed_is_the_seeds(grown, store):
    seed = grown[0]
    narrow = [lora_expert(seed, store, n, settings={"target_modules": ["gate_proj", "up_proj", "down_proj"]}) for n in range(2)]
    record = mixed(forest_of(seed, narrow, store), store)
    assert record.method == "seed"
    assert not record.contributions
    mine = tensors_of(record, store)
    with safe_open(store.get(seed.files["model.safetensors"]), "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert ".mlp." in name or mine[name] == file.get_tensor(name).numpy().tobytes()


@pytest.mark.parametrize("kind", ["full", "lora", "low-rank", "shared from the seed"])
def test_an_expert_taken_out_is_a_mixture_without_it(kind, grown, store):
    """Every other tensor keeps its bytes; what was averaged is averaged again without it."""
    forest, layout = grown[1] if kind in ("full", "shared from the seed") else grown[2], "low-rank" if kind == "low-rank" else "checkpoint"
    method = "seed" if kind == "shared from the seed" else "average"
    whole = mixed(forest, store, layout=layout, method=method)
    gone = whole.experts[1]
    rest = forest_of(grown[0], [store.load(digest, Expert) for digest in forest.experts if digest != gone], store)
    after, wanted = remove(whole, gone, store), mixed(rest, store, layout=layout, method=method)
    assert {name: blob for name, blob in after.files.items() if name != "README.md"} == {
        name: blob for name, blob in wanted.files.items() if name != "README.md"
    }
    assert (after.experts, after.forest, after.removed) == (wanted.experts, wanted.forest, (gone,))
    assert ("averaged again without it" if method == "average" else "Nothing else had anything of it") in readme(after, store)


def test_what_stays_of_an_expert_taken_out_of_a_tuned_mixture_is_said(grown, store, text):
    tuned = tune(
        mixed(grown[1], store), text, RECIPE.model_copy(update={"tuned": "everything", "learning_rate": 1e-3}), store, device="cpu"
    )
    gone = tuned.experts.index(grown[1].experts[0])
    after = remove(tuned, grown[1].experts[0], store)
    mine, its = tensors_of(tuned, store), tensors_of(after, store)
    assert {new for name in mine if (new := rename_tensor(name, gone))} == its.keys()
    for name, value in mine.items():
        new = rename_tensor(name, gone)
        if name.endswith("gate.weight"):
            assert its[name] == np.delete(np.frombuffer(value, np.float32).reshape(len(tuned.experts), -1), gone, 0).tobytes()
        elif new:
            assert its[new] == value
    assert "25.0% of that, and tuning has changed the sum since" in readme(after, store)
    assert torch.isfinite(open_model(after, store, "cpu").score(TOKENS_BT)).all()


def test_what_can_not_be_taken_out_is_refused(grown, store):
    record = mixed(grown[1], store, gates={"top_k": 4})
    with pytest.raises(BadInput, match="not in this mixture"):
        remove(record, "0" * 64, store)
    with pytest.raises(BadInput, match="for top-4"):
        remove(record, record.experts[0], store)


def readme(record: Mixture, store: Store) -> str:
    return store.get(record.files["README.md"]).read_text()


def test_nonsense_is_refused(grown, store):
    with pytest.raises(BadInput, match="top-9"):
        mixed(grown[1], store, gates={"top_k": 9})
    with pytest.raises(BadInput, match="full checkpoint"):
        mixed(grown[1], store, layout="low-rank")
    with pytest.raises(BadSeed, match="no standard mixture"):
        layout.mixed_config({"model_type": "opt"}, 2, 1)


# ---- tuning


@pytest.fixture(scope="module")
def text(store):
    path = store.root / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{WORDS} {n} " * 3}) + "\n" for n in range(40)))
    return build([str(path)], store).train


RECIPE = Recipe(method="router", steps=6, batch=2, length=32, learning_rate=0.05, tuned="routers", balance=0.01, weight_decay=0.0)


@pytest.mark.parametrize("layout", ["checkpoint", "low-rank"])
def test_tuned_routers_change_only_routers(grown, store, text, layout):
    before = mixed(grown[2], store, layout=layout)
    after = tune(before, text, RECIPE, store, device="cpu")
    mine, its = tensors_of(before, store), tensors_of(after, store)
    assert {name for name in mine if mine[name] != its[name]} == {name for name in mine if name.endswith("gate.weight")}
    assert after.parent == before.digest
    assert torch.isfinite(open_model(after, store, "cpu").score(TOKENS_BT)).all()


def test_everything_tuned_is_opened_again_as_it_was(grown, store, text):
    before = mixed(grown[1], store)
    after = tune(before, text, RECIPE.model_copy(update={"tuned": "everything", "learning_rate": 1e-3}), store, device="cpu")
    mine, its = tensors_of(before, store), tensors_of(after, store)
    assert mine.keys() == its.keys()
    assert all(mine[name] != its[name] for name in mine)
    assert after.curve[-1].loss < after.curve[0].loss


def test_router_training_that_was_cut_short_ends_in_the_same_bytes(grown, store, text, tmp_path, monkeypatch):
    before = mixed(grown[1], store)
    recipe = RECIPE.model_copy(update={"rng_seed": 3})
    monkeypatch.setattr(loop, "EVERY", 0.0)

    def stop(what, done, total, unit):
        if what.startswith("train") and done >= 3 * recipe.batch * recipe.length:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(before, text, recipe, store, device="cpu", progress=stop)
    resumed = tune(before, text, recipe, store, device="cpu")
    (store.root / "refs" / "done" / tune_key(before, text, recipe)).unlink()
    assert tune(before, text, recipe, store, device="cpu").files == resumed.files


def test_gates_of_hidden_states_know_the_domains():
    chance = np.random.default_rng(0)
    mean_DH = chance.standard_normal((3, 16)) + 2
    rows_EH = hidden_rows(mean_DH, np.eye(16) * 0.1, [0, 1, 2, None], 1.0, 0.0)
    found = np.concatenate([(mean + 0.3 * chance.standard_normal((50, 16))) @ rows_EH[:3].T for mean in mean_DH]).argmax(1)
    assert (found == np.repeat([0, 1, 2], 50)).mean() > 0.95


@given(seed=st.integers(0, 1000), rank=st.integers(1, 4))
def test_arrow_points_where_adapters_change_most(seed, rank):
    """The first right singular vector of the products one above another, found without making them."""
    chance = np.random.default_rng(seed)
    pairs = [(chance.standard_normal((rank, 8)), chance.standard_normal((12, rank)), scale) for scale in (1.0, 0.5)]
    found = direction(pairs)
    stacked = np.concatenate([scale * b_OR @ a_RH for a_RH, b_OR, scale in pairs])
    assert np.linalg.norm(stacked @ found) == pytest.approx(np.linalg.norm(stacked, 2))
    mean_DH = chance.standard_normal((2, 8)) + 1
    rows_EH = arrow_rows([found, -found, None], mean_DH, np.eye(8), [0, 0, None], 2.0, 0.0)
    assert np.allclose(rows_EH[0], rows_EH[1])  # a singular vector has no sign: the text gives it one
    assert rows_EH[0] @ (mean_DH[0] - mean_DH.mean(0)) >= 0
    assert not rows_EH[2].any()


def test_arrow_reads_adapters_alone(grown, store):
    found = find_directions(grown[2], (*grown[2].experts, grown[0].digest), store)
    assert all(column[-1] is None and np.isclose(np.linalg.norm(column[0]), 1) for column in found.values())
    assert direction([(np.ones((2, 8)), np.zeros((12, 2)), 1.0)]) is None
    with pytest.raises(BadInput, match="--gates hidden"):
        find_directions(grown[1], grown[1].experts, store)


A_ROW = [1.0, 2.0]
ROWS = {  # rows of gates, top-k, whom the refusal names
    "NaN or Inf for expert bbbb": ([A_ROW, [np.inf, 0.0], [0.0, 1.0]], 2),
    "NaN or Inf for expert cccc": ([A_ROW, [1.0, 0.0], [1e39, 1.0]], 3),  # a router has 32 bits
    "zero for experts aaaaaaaa, bbbbbbbb": ([[0.0, 0.0], [1e-60, 0.0], A_ROW], 2),
    "cccc can never be picked in model.layers.0: 1 ": ([[3.0, 1.0], A_ROW, A_ROW], 1),
    "cccc can never be picked in model.layers.0: 2 ": ([A_ROW, A_ROW, A_ROW], 2),
    "": ([A_ROW, A_ROW, A_ROW, [0.0, 0.0]], 3),  # the seed's own row is its bias
    " ": ([[0.0, 0.0], [0.0, 0.0]], 2),
}


@pytest.mark.parametrize("complaint", ROWS)
def test_gates_by_which_an_expert_is_never_picked_are_refused_by_its_name(complaint):
    rows, top_k = ROWS[complaint]
    experts = ["aaaaaaaa", "bbbbbbbb", "cccccccc", "seed"][: len(rows)]
    with pytest.raises(BadInput, match=complaint) if complaint.strip() else nullcontext():
        check_rows({"model.layers.0": np.array(rows)}, experts, "seed", top_k)


def test_arrow_gates_of_an_expert_that_adapts_nothing_they_read_are_refused():
    chance = np.random.default_rng(0)
    mean_DH, way_H = chance.standard_normal((2, 4)) + 1, chance.standard_normal(4)

    def inputs(*directions):
        return GateInputs(
            "model.layers.1", 4, ("aaaaaaaa", "bbbbbbbb", "seed"), 1.0, 0.0, 0, lambda: [0, 1, None], lambda: (mean_DH, np.eye(4)),
            lambda: directions,
        )  # fmt: skip

    assert arrow_gates(inputs(way_H, -way_H, None))[:2].any(1).all()
    with pytest.raises(BadInput, match=r"model.layers.1, .* for expert bbbbbbbb, .* --gates hidden"):
        arrow_gates(inputs(way_H, None, None))
    np.testing.assert_array_equal(arrow_gates(inputs(None, None, None)), hidden_rows(mean_DH, np.eye(4), [0, 1, None], 1.0, 0.0))
    with pytest.raises(BadInput, match="the same everywhere"):
        hidden_rows(mean_DH, np.zeros((4, 4)), [0, 1, None], 1.0, 0.0)


def test_loads_are_shares_of_the_weight(grown, store, text):
    record = mixed(grown[1], store, gates={"top_k": 4})
    found = measure_loads(record, [text, text], store, 4, device="cpu")
    assert list(found) == ["model.layers.0", "model.layers.1"]
    share_LDE = np.array(list(found.values()))
    assert share_LDE.shape == (2, 2, 4)
    assert np.allclose(share_LDE.sum(2), 1)
    drawn = loads_plot(share_LDE, ["0", "1"], ["a & b", "c"], ["0", "1", "2", "seed"], 0.99)
    cells = ElementTree.fromstring(drawn).findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(cells) == 1 + 3 * 2 * 4 + sum(
        int((part < 0.99 / 4).sum()) for part in (share_LDE.mean(1), *share_LDE)
    )  # the ground, a cell for each share, a frame for the dead
    with pytest.raises(BadInput, match="domain 1 has no text"):
        measure_loads(record, [text, ()], store, 4, device="cpu")


@pytest.mark.parametrize("layout", ["checkpoint", "low-rank"])
def test_fit_counts_what_is_tuned(layout, grown, store):
    record = mixed(grown[2], store, layout=layout)
    model = open_mixture(record, store, "cpu")
    select_trained(model, "routers")
    found = fit_mixture(record, RECIPE, store, memory=10**12, device="cpu")
    assert found.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert found.total == sum(found.components.values())
    assert found.fits
    assert found.batch > RECIPE.batch
    if layout == "checkpoint":
        assert found.parameters == model.num_parameters()
        whole = fit_mixture(record, RECIPE.model_copy(update={"tuned": "everything"}), store, memory=10**12, device="cpu")
        assert whole.trained == found.parameters
        assert whole.total > found.total
    assert "does not fit" in fit_mixture(record, RECIPE, store, memory=10, device="cpu").verdict
    with pytest.raises(BadInput, match="--method router"):
        fit_mixture(record, Recipe(steps=1), store)
