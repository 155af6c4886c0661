"""Training: the data, the loss, the loop, exact resume, and what comes out."""

import json
import math
import os
import signal
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from elmwood.corpus.build import build
from elmwood.corpus.tokens import Packed, pack
from elmwood.errors import BadCorpus, BadInput, Damaged, DoesNotFit, MissingExtra
from elmwood.lm.experts import Experts
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model, load_quantised, new_model
from elmwood.records import Corpus, Recipe, Seed, Shape
from elmwood.store import Store
from elmwood.train import checkpoint, loop
from elmwood.train.adapter import add_adapter
from elmwood.train.data import UNSCORED, batches, count_scored, split_batch, split_validation
from elmwood.train.loop import rate
from elmwood.train.loss import Abilities, ChunkedLoss, find_abilities, loss
from elmwood.train.task_names import train_key
from elmwood.train.tasks import train, train_seed

SHAPE = Shape(layers=2, width=32, heads=2, feed_forward=64, vocabulary=300, context=64)
SEED_RECIPE = Recipe(steps=6, batch=4, length=32, learning_rate=3e-3)
FULL = Recipe(steps=12, batch=4, length=32, learning_rate=1e-3)
LORA = Recipe(method="lora", rank=4, steps=12, batch=4, length=32, learning_rate=1e-2)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A store with a corpus of random words and a seed trained on it, read only by convention: tests copy what they change."""
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklm"), rng.integers(2, 8))) for _ in range(400)]
    texts = [" ".join(rng.choice(words, rng.integers(3, 60))) for _ in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = Store(folder / "store")
    corpus = build([str(folder / "text.jsonl")], store)
    store.name("corpus", corpus.digest)
    store.name("seed", train_seed(corpus, SHAPE, SEED_RECIPE, store).digest)
    return folder / "store"


@pytest.fixture
def opened(place) -> tuple[Store, Corpus, Seed]:
    store = Store(place)
    return store, store.load("corpus", Corpus), store.load("seed", Seed)


@pytest.fixture
def fresh(opened, tmp_path) -> tuple[Store, Corpus, Seed]:
    """The same corpus and seed in a store where nothing else was done."""
    store, corpus, seed = opened
    other = Store(tmp_path / "fresh")
    for blob in [*(shard.blob for shard in corpus.train), *seed.files.values()]:
        other.put(store.get(blob))
    other.name("corpus", other.add(corpus))
    other.name("seed", other.add(seed))
    return other, corpus, seed


def packed_of(*sizes: int) -> Packed:
    """Documents whose tokens are all different: the separator 0, then 1, 2, 3 …"""
    starts = np.cumsum([0, *sizes[:-1]])
    tokens = np.arange(1, sum(sizes) + 1, dtype=np.uint16)
    tokens[starts] = 0
    return Packed(tokens, starts.astype(np.int64), 0)


# ---- data -------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), length=st.integers(2, 16), batch=st.integers(1, 5), skip=st.integers(0, 9)
)
def test_the_position_in_the_data_is_the_step(sizes, length, batch, skip):
    packed, recipe = packed_of(*sizes), Recipe(steps=9, batch=batch, length=length, rng_seed=3)
    from_start = list(islice(batches(packed, recipe), skip, skip + 3))
    for one, two in zip(from_start, islice(batches(packed, recipe, skip), 3), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), length=st.integers(2, 16))
def test_an_epoch_scores_every_token_once_but_separators_and_the_rest_of_a_row(sizes, length):
    packed = packed_of(*sizes)
    rows = (sum(sizes) - 1) // length
    if not rows:
        return
    targets = np.concatenate([one.targets_BL.ravel() for one in islice(batches(packed, Recipe(steps=1, batch=1, length=length)), rows)])
    scored = targets[targets != UNSCORED]
    assert 0 not in scored
    assert len(set(scored.tolist())) == len(scored)
    assert sum(sizes) - len(scored) <= len(sizes) + length


def test_positions_restart_and_targets_follow_within_a_document():
    batch = next(batches(packed_of(*[7] * 9), Recipe(steps=1, batch=3, length=20)))
    for tokens, targets, positions in zip(*batch, strict=True):
        for place in range(20):
            if tokens[place] == 0:
                assert positions[place] == 0
            elif place:
                assert positions[place] == positions[place - 1] + 1
            assert targets[place] == UNSCORED or targets[place] == tokens[place] + 1 or tokens[place] == 0


def test_a_domain_smaller_than_a_row_is_repeated():
    batch = next(batches(packed_of(3, 4), Recipe(steps=1, batch=2, length=64)))
    assert batch.tokens_BL.shape == (2, 64)
    assert set(batch.tokens_BL.ravel().tolist()) == {0, 2, 3, 5, 6, 7}


def test_no_tokens_is_an_error():
    with pytest.raises(BadCorpus, match="no tokens"):
        next(batches(Packed(np.empty(0, "<u2"), np.empty(0, "<i8"), 0), FULL))


# ---- schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@given(steps=st.integers(1, 300), warmup=st.floats(0, 1), final=st.floats(0, 1))
def test_schedules_rise_to_the_peak_and_end_where_they_should(schedule, steps, warmup, final):
    recipe = Recipe(steps=steps, warmup=warmup, final=final, schedule=schedule, learning_rate=0.5)
    rates = [rate(recipe, step) for step in range(steps)]
    warm = math.ceil(warmup * steps)
    assert all(0 <= one <= 0.5 + 1e-12 for one in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert all(a >= b - 1e-12 for a, b in zip(rates[warm:], rates[warm + 1 :], strict=False))
    if warm < steps:
        assert rates[-1] == pytest.approx(0.5 if schedule == "constant" else 0.5 * final)


# ---- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@given(positions=st.integers(1, 700), vocabulary=st.integers(2, 5000), rng_seed=st.integers(0, 9))
@settings(max_examples=12, deadline=None)
def test_chunked_loss_is_cross_entropy(frozen, positions, vocabulary, rng_seed):
    torch.manual_seed(rng_seed)
    hidden, head = torch.randn(positions, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=not frozen)
    target = torch.randint(0, vocabulary, (positions,))
    target[torch.rand(positions) < 0.3] = UNSCORED
    target[0] = 0
    wanted = [hidden] if frozen else [hidden, head]
    ours = ChunkedLoss.apply(hidden * 1, head, target)
    theirs = cross_entropy((hidden * 1) @ head.t(), target, ignore_index=UNSCORED)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, two in zip(torch.autograd.grad(ours * 3, wanted), torch.autograd.grad(theirs * 3, wanted), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_loss_of_nothing_scored_is_nothing():
    hidden = torch.randn(4, 8, requires_grad=True)
    value = ChunkedLoss.apply(hidden, torch.randn(5, 8), torch.full((4,), UNSCORED))
    assert value.item() == 0
    assert not torch.autograd.grad(value, hidden)[0].any()


@pytest.mark.parametrize("way", ["mask", "positions"])
def test_both_ways_of_keeping_documents_apart_agree(way):
    model = tiny("llama", **LLAMA)
    tokens, targets, positions = map(torch.from_numpy, next(batches(packed_of(*[7] * 9), Recipe(steps=1, batch=2, length=20))))
    with torch.no_grad():
        ours = loss(model, Abilities(way, True), tokens, targets, positions)
    torch.testing.assert_close(ours, documents_alone(model, tokens, targets, positions), rtol=1e-5, atol=1e-5)


def tiny(kind: str, **extra) -> transformers.PreTrainedModel:
    """A random model of another architecture, dropout off, weights large enough that attention matters."""
    config = transformers.AutoConfig.for_model(kind, **extra)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 64,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
OPT |= {"word_embed_proj_dim": 32, "dropout": 0.0}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
MODELS = {"llama": LLAMA, "qwen3": LLAMA | {"head_dim": 16}, "gemma2": LLAMA | {"head_dim": 16}, "gpt2": GPT2, "opt": OPT, "bloom": BLOOM}

ALLOWED = {
    "llama": Abilities("mask", True),
    "qwen3": Abilities("mask", True),
    "gemma2": Abilities("positions", False),  # windows, capped logits
    "gpt2": Abilities("mask", True),
    "opt": Abilities("mask", True),
    "bloom": Abilities("no", True),  # positions by ALiBi alone
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_what_a_model_allows_is_found_out_and_true(kind):
    model = tiny(kind, **MODELS[kind])
    able = find_abilities(model)
    packed = packed_of(*[11] * 6)
    packed = packed._replace(tokens=packed.tokens % 64)
    batch = next(batches(packed, Recipe(steps=1, batch=2, length=30)))
    tokens, targets, positions = map(torch.from_numpy, batch)
    with torch.no_grad():
        ours = loss(model, able, tokens, targets, positions)
        if able.packed != "no":
            alone = documents_alone(model, tokens, targets, positions)
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(ours, cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED))
    assert able == ALLOWED[kind]


def documents_alone(model, tokens, targets, positions) -> torch.Tensor:
    """The loss of rows whose documents are given one at a time."""
    total, scored = torch.zeros(()), 0
    for row in range(len(tokens)):
        begins = [*torch.nonzero(positions[row] == 0).flatten().tolist(), tokens.shape[1]]
        for first, last in pairwise(begins):
            logits = model(tokens[row : row + 1, first:last]).logits[0]
            total += cross_entropy(logits, targets[row, first:last], ignore_index=UNSCORED, reduction="sum")
            scored += int((targets[row, first:last] != UNSCORED).sum())
    return total / scored


# ---- adapters ---------------------------------------------------------------------------------------------------


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


def test_a_lora_expert_is_a_peft_folder_that_names_no_path(opened):
    store, corpus, seed = opened
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


# ---- runs -------------------------------------------------------------------------------------------------------


def test_a_seed_from_nothing_but_text(opened):
    store, corpus, seed = opened
    assert seed.corpus == corpus.digest
    assert seed.recipe == SEED_RECIPE
    assert [point.step for point in seed.curve] == [1, 2, 3, 4, 5, 6]
    assert seed.curve[-1].loss < seed.curve[0].loss
    assert seed.vocabulary == 300
    assert train_seed(corpus, SHAPE, SEED_RECIPE, store) == seed


def test_an_expert_learns_and_is_trained_once(opened):
    store, corpus, seed = opened
    calls: list[tuple] = []
    expert = train(seed, corpus.train, FULL, store, partition="0" * 64, domain=3, progress=lambda *call: calls.append(call))
    assert (expert.seed, expert.partition, expert.domain) == (seed.digest, "0" * 64, 3)
    assert expert.data == tuple(shard.blob for shard in corpus.train)
    assert calls[-1] == ("train", FULL.tokens, FULL.tokens, "tokens")
    before = load_model(seed, store, device="cpu")
    assert held_out(load_model(seed, store, expert, device="cpu"), store, corpus, seed) < held_out(before, store, corpus, seed)
    calls.clear()
    assert train(seed, corpus.train, FULL, store, partition="0" * 64, domain=3, progress=lambda *call: calls.append(call)) == expert
    assert not calls
    ends = [line for line in store.logged(train_key(seed, corpus.train, FULL, "0" * 64, 3)) if line["event"] == "done"]
    assert len(ends) == 1
    assert ends[0]["tokens"] == FULL.tokens
    assert ends[0]["packed"] == "mask"
    assert not list((store.root / "work").glob("*/*"))


def test_thread_count_is_the_recipes_and_given_back(opened):
    store, corpus, seed = opened
    before, seen = torch.get_num_threads(), set()
    train(
        seed, corpus.train, FULL.model_copy(update={"threads": 2, "steps": 2}), store, progress=lambda *_: seen.add(torch.get_num_threads())
    )
    assert 2 in seen
    assert torch.get_num_threads() == before


def test_rows_longer_than_the_model_are_refused(opened):
    store, corpus, seed = opened
    with pytest.raises(BadInput, match="--length 65: the model has 64 positions"):
        train(seed, corpus.train, FULL.model_copy(update={"length": 65}), store)


def test_a_loss_that_is_no_number_ends_the_run(opened):
    store, corpus, seed = opened
    with pytest.raises(BadInput, match="learning rate 1e\\+30 is too high"):
        train(seed, corpus.train, FULL.model_copy(update={"learning_rate": 1e30, "clip": 1e30}), store)


# ---- cut short, and gone on -------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from elmwood.records import Corpus, Recipe, Seed
from elmwood.store import Store
from elmwood.train import loop, checkpoint
from elmwood.train.tasks import train
loop.EVERY, loop.SHARE = 0.0, 1e9  # save after every step
store, recipe, how = Store(sys.argv[1]), Recipe.model_validate_json(sys.argv[2]), sys.argv[3]
def die(): os.kill(os.getpid(), signal.SIGKILL)
def progress(what, done, total, unit):
    if how == "between" and what == "train" and done >= total / 2:
        die()
if how == "saving":
    whole, calls = checkpoint.save_file, []
    def torn(tensors, path, metadata):
        calls.append(whole(tensors, path, metadata))
        if len(calls) == 7:
            os.truncate(path, 1000)
            die()
    checkpoint.save_file = torn
train(store.load("seed", Seed), store.load("corpus", Corpus).train, recipe, store, progress=progress)
"""


STOPPED = Recipe(method="lora", rank=64, steps=12, batch=4, length=32, learning_rate=0.05, patience=4, optimiser="adamw8bit", accumulate=2)


OTHERS = [(LORA.model_copy(update={"method": method}), "between") for method in ("qlora", "dora")]


@pytest.mark.parametrize(("recipe", "how"), [(FULL, "between"), (LORA, "saving"), (STOPPED, "between"), *OTHERS])
def test_killed_and_resumed_gives_the_same_bytes(opened, fresh, recipe, how):
    if recipe.optimiser == "adamw8bit" or recipe.method == "qlora":
        pytest.importorskip("bitsandbytes")
    store, corpus, seed = opened
    whole = train(seed, corpus.train, recipe, store)
    other, *_ = fresh
    command = [sys.executable, "-c", SCRIPT, str(other.root), recipe.model_dump_json(), how]
    assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in other.root.glob("work/*/state.safetensors")] == ["state.safetensors"]
    steps: list[float] = []
    resumed = train(
        seed, corpus.train, recipe, other, progress=lambda what, done, total, unit: steps.append(done) if what == "train" else None
    )
    assert 0 < len(steps) < recipe.steps
    assert resumed == whole
    assert all(other.get(blob).read_bytes() == store.get(blob).read_bytes() for blob in whole.files.values())


def test_a_seed_stopped_by_the_keyboard_goes_on(opened, fresh, monkeypatch):
    *_, seed = opened
    other, corpus, _ = fresh
    monkeypatch.setattr(loop, "EVERY", 0.0)

    def stop(what, done, total, unit):
        if what == "train" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_seed(corpus, SHAPE, SEED_RECIPE, other, progress=stop)
    assert train_seed(corpus, SHAPE, SEED_RECIPE, other) == seed


def test_dropout_is_a_function_of_the_step(tmp_path):
    packed = packed_of(*[9] * 20)
    packed = packed._replace(tokens=packed.tokens % 64)
    model = tiny("gpt2", **GPT2 | {"resid_pdrop": 0.5})
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    ends = []
    for name in "ab":
        model.load_state_dict(start)
        loop.run(model, packed, Recipe(steps=3, batch=2, length=16), _made(tmp_path / name), lambda **_: None)
        ends.append([weight.clone() for weight in model.parameters()])
        torch.rand(7)
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))
    assert not model.training


def test_training_leaves_the_callers_randomness_alone(tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    loop.run(new_model(SHAPE), packed_of(40, 40), Recipe(steps=1, batch=2, length=16), _made(tmp_path / "w"), lambda **_: None)
    assert torch.equal(torch.rand(3), wanted)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_damaged_state_says_what_to_delete(tmp_path):
    model = new_model(SHAPE)
    weights = dict(model.named_parameters())
    (tmp_path / checkpoint.FILE).write_bytes(b"\x10" * 100)
    with pytest.raises(Damaged, match="delete it"):
        checkpoint.load(tmp_path, weights, loop.adamw(weights, FULL))


def test_no_room_for_the_state_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(DoesNotFit, match="free some"):
        checkpoint.save(tmp_path, checkpoint.Position(), {}, loop.adamw(dict(new_model(SHAPE).named_parameters()), FULL))
    assert not list(tmp_path.iterdir())


# ---- the recipes ------------------------------------------------------------------------------------------------

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
def test_every_recipe_makes_an_expert_that_opens_and_speaks(name, opened):
    if name in NEEDS:
        pytest.importorskip("bitsandbytes")
    store, corpus, seed = opened
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
    model(input_ids=torch.randint(0, 64, (1, 8))).logits.sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)


def test_a_quantised_base_keeps_its_head_and_embeddings(opened):
    pytest.importorskip("bitsandbytes")
    store, _, seed = opened
    model = load_quantised(seed, store, "cpu")
    kinds = {name: str(weight.dtype) for name, weight in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == "torch.uint8"} == {name for name in kinds if "_proj" in name}
    state = model.get_parameter("model.layers.0.self_attn.q_proj.weight").quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)


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


def test_recomputed_activations_change_no_bit(opened):
    store, corpus, seed = opened
    one, two = (train(seed, corpus.train, FULL.model_copy(update={"checkpointing": kept}), store) for kept in (False, True))
    assert one.files["model.safetensors"] == two.files["model.safetensors"]


@given(rows=st.integers(1, 9), count=st.integers(1, 12))
def test_parts_are_the_batch(rows, count):
    batch = next(batches(packed_of(*[7] * 9), Recipe(steps=1, batch=rows, length=5)))
    split = list(split_batch(batch, count))
    assert len(split) == min(rows, count)
    assert all(np.array_equal(np.concatenate(pieces), whole) for pieces, whole in zip(zip(*split, strict=True), batch, strict=True))
    assert sum(map(count_scored, split)) == count_scored(batch)


# ---- patience ---------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=30))
def test_documents_to_validate_on_are_chosen_by_what_they_hold(sizes):
    packed = packed_of(*sizes)
    kept, held = split_validation(packed)
    assert len(kept)
    assert len(held)
    assert sorted([*kept, *held]) == list(range(len(sizes)))
    seen = np.concatenate([batch.tokens_BL.ravel() for batch in islice(batches(packed, FULL, 0, kept), 3)])
    ends = np.append(packed.starts[1:], len(packed.tokens))
    assert not set(seen.tolist()) - {0} & {int(token) for one in held for token in packed.tokens[packed.starts[one] + 1 : ends[one]]}


def test_one_document_cannot_be_validated_on():
    with pytest.raises(BadCorpus, match="at least two"):
        split_validation(packed_of(9))


def test_patience_ends_a_run_and_keeps_the_best(opened, tmp_path):
    store, corpus, seed = opened
    recipe = Recipe(method="lora", rank=4, steps=40, batch=4, length=32, learning_rate=0.2, schedule="constant", patience=3)
    expert = train(seed, corpus.train, recipe, store)
    losses = [point.validation for point in expert.curve]
    assert len(losses) < 40
    assert losses.index(min(losses)) == len(losses) - 4
    packed = pack(corpus.train, tokenizer(seed, store), seed.separator, store)
    _, validation = loop._validation(packed, recipe)
    model = load_model(seed, store, expert, device="cpu")
    assert loop.validate(model, Abilities("mask", True), validation) == pytest.approx(min(losses), abs=1e-5)
    end = [line for line in store.logged(train_key(seed, corpus.train, recipe)) if line["event"] == "done"]
    assert end[0]["tokens"] == len(losses) * 4 * 32


# ---- followed elsewhere -----------------------------------------------------------------------------------------


def test_tensorboard_is_told_the_curve(opened, fresh):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store, corpus, seed = opened
    other, *_ = fresh
    expert = train(seed, corpus.train, LORA, other, report_to=["tensorboard"])
    assert expert == train(seed, corpus.train, LORA, store)
    (folder,) = {path.parent for path in (other.root / "logs" / "runs").rglob("*tfevents*") if path.parent.name.startswith("seed-")}
    events = EventAccumulator(str(folder)).Reload()
    assert [(one.step, pytest.approx(one.value)) for one in events.Scalars("loss")] == [(point.step, point.loss) for point in expert.curve]


def test_unknown_and_missing_trackers_are_named(opened):
    store, corpus, seed = opened
    recipe = LORA.model_copy(update={"steps": 1})
    with pytest.raises(BadInput, match="tensorboard, trackio, wandb, mlflow"):
        train(seed, corpus.train, recipe, store, report_to=["paper"])


def test_what_is_not_installed_is_named_with_its_cure(opened, monkeypatch):
    store, corpus, seed = opened
    for name in ("bitsandbytes", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"elmwood\[qlora\]"):
        train(seed, corpus.train, RECIPES["qlora"].model_copy(update={"steps": 1}), store)
    with pytest.raises(MissingExtra, match=r"elmwood\[tensorboard\]"):
        train(seed, corpus.train, LORA.model_copy(update={"steps": 1}), store, report_to=["tensorboard"])
