"""Seeds and experts: adapters, runs, recipes, patience, trackers."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_training import FULL, LLAMA, LORA, MODELS, SEED_RECIPE, SHAPE, packed_of, tiny
from tokenizers import Tokenizer

from elmwood.corpus.tokens import pack, train_tokenizer
from elmwood.engine import NOTE
from elmwood.errors import BadInput, MissingExtra
from elmwood.lm.adapters.trunk import stack_of
from elmwood.lm.experts import Experts
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model, load_quantised
from elmwood.records import Recipe
from elmwood.study.page import trained_on
from elmwood.train import loop
from elmwood.train.adapter import add_adapter
from elmwood.train.data import batches
from elmwood.train.loss import Abilities, find_abilities, loss
from elmwood.train.seeds.stream import Source
from elmwood.train.task_names import train_key
from elmwood.train.tasks import start_seed, train, train_seed


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])  # without biases, with them, and with matrices that are no nn.Linear
def test_our_forward_and_backward_of_lora_are_pefts(kind):
    theirs = get_peft_model(
        tiny(kind, **MODELS[kind]),
        LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2"),
    )
    ours = add_adapter(tiny(kind, **MODELS[kind]), LORA.model_copy(update={"alpha": 6.0}), "base")
    with torch.no_grad():
        for (name, one), (other, two) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
            assert name == other
            if "lora_B" in name:
                one.add_(torch.randn_like(one) * 0.1)
            two.copy_(one)
    tokens = torch.randint(0, 64, (2, 16))
    logits = [model(input_ids=tokens).logits for model in (theirs, ours)]
    torch.testing.assert_close(logits[0], logits[1])
    for one in logits:
        one.square().mean().backward()
    for (name, one), two in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_a_lora_expert_is_a_peft_folder_that_names_no_path(case):
    store, corpus, seed = case
    expert = train(seed, corpus.train, LORA, store)
    folder = store.folder(expert.files)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(expert.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert config["base_model_name_or_path"] == seed.digest
    assert config["use_rslora"]
    assert config["target_modules"] == sorted(config["target_modules"])
    plain = PeftModel.from_pretrained(load_model(seed, store, device="cpu"), folder)
    assert held_out(plain, store, corpus, seed) < held_out(load_model(seed, store, device="cpu"), store, corpus, seed)


def held_out(model, store, corpus, seed) -> float:
    packed = pack(corpus.holdout, tokenizer(seed, store), seed.separator, store)
    tokens, targets, positions = map(torch.from_numpy, next(batches(packed, Recipe(steps=1, batch=8, length=32))))
    with torch.no_grad():
        return loss(model, Abilities("mask", True), tokens, targets, positions).item()


def test_a_seed_from_nothing_but_text(case):
    store, corpus, seed = case
    assert seed.corpus == corpus.digest
    assert seed.recipe == SEED_RECIPE
    assert [point.step for point in seed.curve] == [1, 2, 3, 4, 5, 6]
    assert seed.curve[-1].loss < seed.curve[0].loss
    assert seed.vocabulary == 300
    assert train_seed(corpus, SHAPE, SEED_RECIPE, store) == seed


def test_seeds_of_one_corpus_and_vocabulary_share_one_training_of_their_tokenizer(case, monkeypatch):
    store, corpus, seed = case
    trained: list[int] = []

    def count(texts, vocabulary: int) -> Tokenizer:
        trained.append(vocabulary)
        return train_tokenizer(texts, vocabulary)

    monkeypatch.setattr(sys.modules["elmwood.train.tasks"], "train_tokenizer", count)
    again = train_seed(corpus, SHAPE, SEED_RECIPE.model_copy(update={"steps": 1, "rng_seed": 1}), store)
    shape = SHAPE.model_copy(update={"layers": 1})
    start = start_seed([Source(corpus)], shape, 0, store)
    assert not trained
    assert again.files["tokenizer.json"] == start.files["tokenizer.json"] == seed.files["tokenizer.json"]
    start_seed([Source(corpus)], shape.model_copy(update={"vocabulary": 310}), 0, store)
    assert trained == [310]


def test_an_expert_learns_and_is_trained_once(case):
    store, corpus, seed = case
    calls: list[tuple] = []
    expert = train(seed, corpus.train, FULL, store, partition="0" * 64, domain=3, progress=lambda *call: calls.append(call))
    assert (expert.seed, expert.partition, expert.domain) == (seed.digest, "0" * 64, 3)
    assert expert.data == tuple(shard.blob for shard in corpus.train)
    assert ("trains on cpu", 0, 0, NOTE) in calls
    assert calls[-1] == ("train on cpu", FULL.tokens, FULL.tokens, "tokens")
    before = load_model(seed, store, device="cpu")
    assert held_out(load_model(seed, store, expert, device="cpu"), store, corpus, seed) < held_out(before, store, corpus, seed)
    calls.clear()
    assert train(seed, corpus.train, FULL, store, partition="0" * 64, domain=3, progress=lambda *call: calls.append(call)) == expert
    assert not calls
    ends = [line for line in store.logged(train_key(seed, corpus.train, FULL, "0" * 64, 3)) if line["event"] == "done"]
    assert len(ends) == 1
    assert trained_on(expert, store) == "cpu"
    assert ends[0]["tokens"] == FULL.tokens
    assert ends[0]["packed"] == "mask"
    assert {path.name for path in (store.root / "work").glob("*/*")} == {"tokenizer.json"}  # for the next seed of this corpus


def test_thread_count_is_the_recipes_and_given_back(case):
    store, corpus, seed = case
    before, seen = torch.get_num_threads(), set()
    train(
        seed, corpus.train, FULL.model_copy(update={"threads": 2, "steps": 2}), store, progress=lambda *_: seen.add(torch.get_num_threads())
    )
    assert 2 in seen
    assert torch.get_num_threads() == before


def test_rows_longer_than_the_model_are_refused(case):
    store, corpus, seed = case
    with pytest.raises(BadInput, match="--length 65: the model has 64 positions"):
        train(seed, corpus.train, FULL.model_copy(update={"length": 65}), store)


def test_a_loss_that_is_no_number_ends_the_run(case):
    store, corpus, seed = case
    with pytest.raises(BadInput, match="learning rate 1e\\+30 is too high"):
        train(seed, corpus.train, FULL.model_copy(update={"learning_rate": 1e30, "clip": 1e30}), store)


RECIPES = {
    "late": LORA.model_copy(update={"late": 0.4}),
    "dora": LORA.model_copy(update={"method": "dora"}),
    "qlora": LORA.model_copy(update={"method": "qlora"}),
    "8 bits": LORA.model_copy(update={"optimiser": "adamw8bit", "rank": 64}),
    "patience": LORA.model_copy(update={"patience": 2, "learning_rate": 0.3}),
    "spread": LORA.model_copy(update={"accumulate": 3, "checkpointing": True}),
}

NEEDS = {"qlora", "8 bits"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_an_expert_that_opens_and_speaks(name, case):
    if name in NEEDS:
        pytest.importorskip("bitsandbytes")
    store, corpus, seed = case
    expert = train(seed, corpus.train, RECIPES[name], store)
    plain = PeftModel.from_pretrained(load_model(seed, store, device="cpu"), store.folder(expert.files)).eval()
    assert held_out(plain, store, corpus, seed) < held_out(load_model(seed, store, device="cpu"), store, corpus, seed)
    tokens = torch.randint(0, 300, (2, 12))
    with torch.no_grad():
        wanted = plain(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(Experts(seed, [expert], store, "cpu").score(0, tokens)[:, 1:], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_late_adapters_stand_in_the_last_layers_only(kind):
    model = add_adapter(tiny(kind, **MODELS[kind]), LORA.model_copy(update={"late": 0.5}), "base")
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".1." in name for name in trained)
    differentiable = []  # whether a backward pass reaches what each layer gives
    for layer in stack_of(model.get_base_model())[1]:
        layer.register_forward_hook(
            lambda module, given, made: differentiable.append((made[0] if isinstance(made, tuple) else made).requires_grad)
        )
    model(input_ids=torch.randint(0, 64, (1, 8))).logits.sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)
    assert differentiable == [False, True]


def test_a_quantised_base_keeps_its_head_and_embeddings(case):
    pytest.importorskip("bitsandbytes")
    store, _, seed = case
    model = load_quantised(seed, store, "cpu")
    kinds = {name: str(weight.dtype) for name, weight in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == "torch.uint8"} == {name for name in kinds if "_proj" in name}
    state = model.get_parameter("model.layers.0.self_attn.q_proj.weight").quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recipe", [FULL, LORA])
def test_a_step_in_passes_is_the_step(recipe, checkpointing):
    packed = packed_of(*[7] * 30)
    packed = packed._replace(tokens=packed.tokens % 64)
    grads = []
    for changes in ({}, {"accumulate": 3, "checkpointing": checkpointing}):
        changed = recipe.model_copy(update={"length": 20, **changes})
        model = tiny("llama", **LLAMA)
        model = model if recipe.method == "full" else add_adapter(model, changed, "base")
        able = find_abilities(model)
        with loop.recompute_activations(model.train(), changed):
            value = loop.add_gradients(model, able, next(batches(packed, changed)), changed)
        grads.append((value, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}))
    (whole, ones), (split, others) = grads
    torch.testing.assert_close(split, whole)
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        torch.testing.assert_close(others[name], one, rtol=1e-4, atol=1e-6, msg=name)


def test_recomputed_activations_change_no_bit(case):
    store, corpus, seed = case
    one, two = (train(seed, corpus.train, FULL.model_copy(update={"checkpointing": kept}), store) for kept in (False, True))
    assert one.files["model.safetensors"] == two.files["model.safetensors"]


@pytest.mark.usefixtures("float32")
def test_patience_ends_a_run_and_keeps_the_best(case, tmp_path):
    store, corpus, seed = case
    recipe = Recipe(method="lora", rank=4, steps=40, batch=4, length=32, learning_rate=0.2, schedule="constant", patience=3)
    expert = train(seed, corpus.train, recipe, store)
    losses = [point.validation for point in expert.curve]
    assert len(losses) < 40
    assert losses.index(min(losses)) == len(losses) - 4
    packed = pack(corpus.train, tokenizer(seed, store), seed.separator, store)
    _, validation = loop._open_text(packed, recipe, loop.ALONE)
    model = load_model(seed, store, expert, device="cpu")
    assert loop.validate(model, Abilities("mask", True), validation) == pytest.approx(min(losses), abs=1e-5)
    end = [line for line in store.logged(train_key(seed, corpus.train, recipe)) if line["event"] == "done"]
    assert end[0]["tokens"] == len(losses) * 4 * 32


def test_tensorboard_is_told_the_curve(case, fresh):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store, corpus, seed = case
    other, *_ = fresh
    expert = train(seed, corpus.train, LORA, other, report_to=["tensorboard"])
    assert expert == train(seed, corpus.train, LORA, store)
    (folder,) = {path.parent for path in (other.root / "logs" / "runs").rglob("*tfevents*") if path.parent.name.startswith("seed-")}
    events = EventAccumulator(str(folder)).Reload()
    assert [(one.step, pytest.approx(one.value)) for one in events.Scalars("loss")] == [(point.step, point.loss) for point in expert.curve]


def test_unknown_and_missing_trackers_are_named(case):
    store, corpus, seed = case
    recipe = LORA.model_copy(update={"steps": 1})
    with pytest.raises(BadInput, match="tensorboard, trackio, wandb, mlflow"):
        train(seed, corpus.train, recipe, store, report_to=["paper"])


def test_what_is_not_installed_is_named_with_its_cure(case, monkeypatch):
    store, corpus, seed = case
    for name in ("bitsandbytes", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"elmwood\[qlora\]"):
        train(seed, corpus.train, RECIPES["qlora"].model_copy(update={"steps": 1}), store)
    with pytest.raises(MissingExtra, match=r"elmwood\[tensorboard\]"):
        train(seed, corpus.train, LORA.model_copy(update={"steps": 1}), store, report_to=["tensorboard"])
