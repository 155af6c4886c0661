"""Seeds of published shapes and of any config: what is planned, what is refused, and what branches from a kept one."""

import json

import pytest

from elmwood.errors import BadInput, BadSeed
from elmwood.lm.pretrained import empty_model, make_config
from elmwood.records import Corpus, Portion, Seed
from elmwood.store import Store
from elmwood.study import fitting, seeds
from elmwood.study.page import summary
from elmwood.study.text import cluster
from elmwood.study.training import train
from elmwood.train.seeds.shapes import SHAPES, read_shape, with_vocabulary

PUBLISHED = {
    "SmolLM2-135M": 134_515_008, "SmolLM2-360M": 361_821_120, "Llama-3.2-1B": 1_235_814_400, "Qwen2.5-0.5B": 494_032_768,
    "Pythia-70M": 70_426_624, "Pythia-160M": 162_322_944, "Pythia-410M": 405_334_016, "GPT-2": 124_439_808, "OPT-125M": 125_239_296,
    "OPT-1.3B": 1_315_758_080,
}  # fmt: skip
TINY = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "vocab_size": 400}  # fmt: skip


def test_shapes_have_the_parameters_that_were_published():
    assert {name: empty_model(make_config(settings)).num_parameters() for name, settings in SHAPES.items()} == PUBLISHED


def test_a_vocabulary_replaces_that_of_the_config_at_every_depth():
    inner = with_vocabulary({"model_type": "x", "text_config": {"vocab_size": 9, "eos_token_id": 7}}, 300)
    assert inner["text_config"] == {"vocab_size": 300, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert "vocab_size" not in inner


def test_a_plan_follows_the_size():
    small, recipe = seeds.plan_seed(tokens="1M")
    assert (small.vocabulary, recipe.length, recipe.learning_rate, recipe.threads) == (2048, 256, 3e-3, 1)
    settings, recipe = seeds.plan_seed(like="llama-3.2-1b", vocabulary=32_768, tokens="1M", schedule="wsd", batch=4)
    assert (settings["vocab_size"], recipe.length, recipe.learning_rate, recipe.threads) == (32_768, 1024, 3e-4, 4)
    assert recipe.stable == pytest.approx(0.05 * recipe.steps + 0.95 * 0.8 * recipe.steps, abs=2)


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"like": "SmolLM9"}, BadInput, "choose among SmolLM2-135M"),
    ({"like": "GPT-2", "config": "x"}, BadInput, "leave one of them out"),
    ({"config": "nowhere.json"}, BadInput, "no such file"),
])  # fmt: skip
def test_shapes_that_are_none_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        seeds.plan_seed(tokens="1k", **options)


@pytest.mark.parametrize(("settings", "words"), [
    ({"model_type": "bert"}, "a seed is a causal LM"),
    ({"model_type": "t5"}, "a seed is a causal LM"),
    ({"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "code--Strange"}}, "code that comes with a checkpoint is never run"),
])  # fmt: skip
def test_configs_that_are_no_causal_lm_or_need_code_are_refused(tmp_path, settings, words):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_shape(tmp_path) == read_shape(tmp_path / "config.json")
    with pytest.raises(BadSeed, match=words):
        seeds.plan_seed(config=tmp_path, tokens="1k")


@pytest.mark.parametrize("mix", [["a"], ["a=x"], ["a=0"], ["a=-1"], ["a=1"], ["a=0.6", "b=0.5"], ["=0.5"], {"a": float("nan")}])
def test_shares_that_leave_nothing_or_are_none_are_refused(mix):
    with pytest.raises(BadInput, match="--mix"):
        seeds.read_mix(mix)


def test_experts_branch_from_a_checkpoint_before_the_decay(tmp_path):
    """The whole way: a config, two corpora, WSD, a kept seed, and an expert of it that decays by a schedule of its own."""
    store = Store(tmp_path / "store")
    for name, words in (("main", "the cat sat on a mat"), ("more", "for x in range of y")):
        lines = [" ".join([*words.split()[number % 5 :], str(number * 7919), words]) for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    main, said = str(tmp_path / "main.jsonl"), []
    seed = seeds.train_seed(
        main, store, config=tmp_path / "config.json", mix={str(tmp_path / "more.jsonl"): 0.25}, tokens=640, batch=2, length=32,
        schedule="wsd", keep_every=4, name="seed", progress=lambda what, *_: said.append(what),
    )  # fmt: skip
    assert (seed.architecture, seed.context, seed.limits) == ("Qwen3ForCausalLM", 64, {})
    assert seed.vocabulary <= 400
    assert [(store.load(part.corpus, Corpus).documents, part.weight) for part in seed.mix] == [(40, 0.75), (40, 0.25)]
    assert seed.mix[0] == Portion(corpus=seed.corpus, weight=0.75)
    assert sum(one.startswith(("reads about", "reads")) for one in said) == 2
    assert "MFU" in said
    kept = store.load("seed-step-4", Seed)
    assert sorted(store.names()) == ["seed", "seed-step-4", "seed-step-8"]
    assert summary(kept).endswith(f"step 4 of 10 of run {seed.run[:8]}, before the decay")
    assert summary(seed).endswith(f"step 10 of 10 of run {seed.run[:8]}")
    partition = cluster(main, store, domains=2)
    (expert,) = train(partition, kept, store, domains=0, method="full", tokens=256, batch=2, length=32, schedule="linear", workers=1)
    assert (expert.seed, expert.recipe.schedule) == (kept.digest, "linear")


def test_fit_knows_shapes_configs_and_processes(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    store = Store(tmp_path / "store")
    asked = {"method": "full", "length": 64, "device": "cpu", "memory": "80GB", "store": store}
    assert fitting.fit("smollm2-135m", **asked).answer.parameters == PUBLISHED["SmolLM2-135M"]
    whole, half = (fitting.fit(str(tmp_path / "tiny.json"), processes=count, **asked) for count in (1, 2))
    assert (whole.recipe.batch, half.recipe.batch) == (8, 4)
    assert half.answer.components["optimiser"] == whole.answer.components["optimiser"]
    assert half.answer.components["activations"] < whole.answer.components["activations"] or whole.answer.components["activations"] == 0
    with pytest.raises(BadInput, match="--processes 9"):
        fitting.fit("GPT-2", processes=9, **asked)
