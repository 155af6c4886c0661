"""Tests on a pretended GPU, for a process in which no backward pass ran before: `test_rehearsal` starts it."""

import numpy as np
import pytest
import torch
import transformers
from tiny_models import SHAPE, full_expert, lora_expert, tiny_seed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elmwood.ensemble.decode import Board, Rule
from elmwood.lm.experts import BASE, Experts
from elmwood.lm.files import seed_folder
from elmwood.lm.load import load_quantised
from elmwood.lm.pretrained import open_empty
from elmwood.lm.products import hasten
from elmwood.records import Recipe
from elmwood.store import Store
from elmwood.train import loop
from elmwood.train.adapter import add_adapter
from elmwood.train.card.path import fast_path
from elmwood.train.fit.pretend import place, pretend
from elmwood.train.router import select_trained, watch_routers

LLAMA = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
ENDS = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
RECIPE = Recipe(steps=2, batch=4, length=256, rank=4)


def test_tensors_of_two_devices_do_not_meet_and_autocast_narrows():
    with pretend() as device:
        x, weight = torch.empty(4, 8, device=device), torch.nn.Parameter(torch.empty(3, 8, device=device))
        with torch.autocast(device.type, torch.bfloat16):
            y = torch.nn.functional.linear(x, weight)
            assert y.dtype == torch.bfloat16
            assert torch.nn.functional.layer_norm(y, (3,)).dtype == torch.float32
        y.sum().backward()
        assert weight.grad.device == device
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4, 8)


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_a_step_stays_on_the_device_and_asks_for_no_value(method):
    """A value that is asked for would stop the GPU in every step; fake tensors refuse."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **LLAMA | ENDS))
        if method != "full":
            model = add_adapter(model, RECIPE.model_copy(update={"method": method}), "x")
    with pretend() as device:
        place(model, device)
        weights = {name: one for name, one in model.named_parameters() if one.requires_grad}
        optimizer = loop.adamw(weights, RECIPE)
        batch = loop.Batch(*(np.arange(32)[None] for _ in range(3)))
        with fast_path(model, RECIPE, loop.Abilities("documents", True)) as able:
            value = loop.add_gradients(model, able, batch, RECIPE)
        assert value.device == device
        assert all(one.grad.device == device for one in weights.values())
        loop.update_weights(optimizer, RECIPE, 0)
        assert {part.device.type for state in optimizer.state.values() for part in state.values()} == {device.type}


# ---- beside training ---------------------------------------------------------------------------------------------------

PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "embedding",
    "scaled_dot_product",
    "softmax",
    "logsumexp",
    "sort",
    "_linear_pointwise",
)


class OnCPU(TorchDispatchMode):
    """Names of the operators of models that computed on the CPU."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        result = operator(*arguments, **(named or {}))
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        if any(part in str(operator) for part in PRODUCTS) and any(one.device.type == "cpu" for one in made):
            self.names.add(str(operator))
        return result


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A seed, two adapters and a full expert of it, as files."""
    store = Store(tmp_path_factory.mktemp("store"))
    seed = tiny_seed(store)
    return store, seed, [*(lora_expert(seed, store, number) for number in range(2)), full_expert(seed, store, 2)]


@pytest.fixture
def gpu(files, monkeypatch):
    """These experts on a pretended GPU. Their weights have no values, so what looks at values is answered for them: whether ids are those
    of the vocabulary, whether the head is plain, how many layers a cache has."""
    store, seed, experts = files
    models = [open_empty(seed_folder(seed, store)).eval() for _ in range(2)]

    def load(seed, store, branch, device):
        place(model := models.pop(), device)
        return hasten(model)

    monkeypatch.setattr("elmwood.lm.experts.load_model", load)
    monkeypatch.setattr("elmwood.lm.experts.plain_head", lambda model: model.get_output_embeddings().weight)
    monkeypatch.setattr(Experts, "check", lambda *_: None)
    with pretend() as device, torch.inference_mode(), OnCPU() as here:
        made = Experts(seed, experts, store, device)
        bank = made.body(BASE).bank
        bank.rows = {number: torch.empty(bank.numbers) for number in range(len(bank))}
        made._kept = {"LlamaForCausalLM llama": SHAPE.layers}
        yield made, device
    assert not here.names


def test_scoring_stays_on_the_device(gpu):
    experts, _ = gpu
    for e in range(len(experts)):
        assert experts.score(e, [[1, 2, 3], [4, 5, 6]]).device.type == "cpu"
    mixed = [[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]
    assert experts.score_mixed(np.array(mixed), [[1, 2, 3], [4, 5, 6]], 2).shape == (2, 2)
    assert experts.predict(0, [[1, 2, 3]]).device.type != "cpu"


def test_text_stays_on_the_device(gpu):
    experts, device = gpu
    logp_AV, text = experts.extend(range(4), [1, 2, 3], experts.start())
    assert logp_AV.device == device
    assert all(layer.keys.device == device for cache in text.caches.values() for layer in cache.layers)
    logp_AV, _ = experts.follow(range(4), [4, 5, 6], experts.start())
    assert logp_AV.device == device


@pytest.mark.parametrize("rule", [Rule(0.0, 1.0), Rule(0.8, 0.9)])
def test_a_step_of_decoding_asks_for_no_value(gpu, rule):
    """Its shapes do not depend on what is read, so it can be a CUDA graph: a value that is asked for would end the capture."""
    experts, device = gpu
    _, text = experts.extend(range(4), [1, 2, 3], experts.start())
    board, (body, cache) = Board(3, SHAPE.vocabulary, device), (experts.body(BASE), text.caches[BASE])
    cache.arrange([0, 1, 2], 3)
    for total in (4, 5):
        board.give([0.25, 0.25, 0.5], 0.3, total - 1)
        board.choose(rule)
        board.read(body, cache, 0, cache.owner)
        cache.close(0, 3, total)
    assert {one.device for one in (board.logp_SV, board.told, board.token_1)} == {device}


def test_a_bank_is_filled_on_the_device(gpu):
    experts, device = gpu
    bank = experts.body(BASE).bank
    for select in (lambda: bank.select([0, 1, 2]), lambda: bank.select([1]), lambda: bank.mix([{0: 0.5, 1: 0.5}, {1: 1.0}])):
        select()
        assert {module.a_SRI.device for module in bank.adapted} == {device}


def test_tuning_routers_stays_on_the_device_and_asks_for_no_value():
    # torch's grouped products have fake ones in bf16 only
    fields = LLAMA | ENDS | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("mixtral", **fields))
    with pretend() as device, OnCPU() as here:
        place(model, device)
        select_trained(model, "routers")
        with watch_routers(model, 0.01) as watch:
            batch = loop.Batch(*(np.arange(32)[None] for _ in range(3)))
            value = loop.add_gradients(model, loop.Abilities("mask", True), batch, RECIPE, watch.balance)
        assert value.device == device
        tuned = [one for name, one in model.named_parameters() if name.endswith("gate.weight")]
        assert tuned
        assert all(one.grad.device == device for one in tuned)
    assert not here.names


def test_four_bits_are_loaded_onto_the_device(files, monkeypatch):
    """The weights are packed there, and computed with in bf16."""
    store, seed, _ = files
    asked = {}
    monkeypatch.setattr("elmwood.lm.load.open_weights", lambda folder, **how: asked.update(how) or torch.nn.Linear(1, 1))
    load_quantised(seed, store, "cuda:0")
    assert asked["device"] == {"": torch.device("cuda:0")}
    assert asked["dtype"] == asked["quantisation"].bnb_4bit_compute_dtype == torch.bfloat16
