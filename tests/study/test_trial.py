"""A seed tried at its import: what it cannot be used for is in its record, with the reason, and refused before any work."""

import pytest
import torch
from tiny_models import SHAPE, config_seed, louder, tiny_seed, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, JambaConfig

from elmwood.errors import BadSeed
from elmwood.lm import load
from elmwood.lm.load import save_folder
from elmwood.records import Expert, Recipe
from elmwood.store import Store
from elmwood.study import trial
from elmwood.study.ancestry import generate
from elmwood.study.exporting import export
from elmwood.study.merging import merge
from elmwood.study.page import show
from elmwood.study.training import import_seed
from elmwood.study.trial import check_use, shrunk, try_seed

KINDS = (
    "llama", "mistral", "qwen2_moe", "qwen3", "qwen3_next", "gemma2", "gemma3_text", "phi", "phi3", "opt", "gpt2", "gpt_neox", "bloom",
    "mpt", "falcon", "olmo2", "starcoder2", "stablelm", "smollm3", "mixtral", "deepseek_v3", "jamba", "mamba", "rwkv",
)  # fmt: skip
RECURRENT = JambaConfig(
    vocab_size=SHAPE.vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    num_experts=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
    mamba_d_state=8, max_position_embeddings=64, pad_token_id=None,
)  # fmt: skip


def head_size(config):
    size = getattr(config, "head_dim", None)
    return size if isinstance(size, int) else config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_published_config_is_small_and_alike(kind):
    large = AutoConfig.for_model(kind)  # the defaults are those of a published model
    small = AutoConfig.for_model(kind, **shrunk(large.to_dict()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    assert model.num_parameters() <= trial.MOST
    if hasattr(large, "num_attention_heads") and isinstance(large.num_attention_heads, int):
        assert head_size(small) == head_size(large)
    assert set(getattr(small, "layer_types", None) or ()) == set(getattr(large, "layer_types", None) or ())


def test_a_seed_that_can_do_everything_has_the_record_it_had_before(tmp_path):
    store, other = Store(tmp_path / "store"), Store(tmp_path / "other")
    folder = store.folder(tiny_seed(store).files)
    seed = import_seed(str(folder), store, name="tiny")
    assert seed == load.import_seed(str(folder), other, name="tiny")
    assert seed.limits == {}
    assert b"limits" not in store.get(seed.digest).read_bytes()


@pytest.mark.parametrize("own", [0, trial.OWN])
def test_a_copy_has_the_limits_of_the_seed_itself(own, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "OWN", own)
    store = Store(tmp_path)
    seed, before = config_seed(RECURRENT, store), torch.random.get_rng_state()
    limits = try_seed(seed, store)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "recurrent state" in limits["generate"]
    assert try_seed(tiny_seed(store), store) == {}
    assert {path.name for path in tmp_path.iterdir()} <= {"blobs", "records", "views"}  # nothing of the trial is left


def test_what_a_seed_cannot_do_is_said_once_and_kept(tmp_path):
    folder, store = tmp_path / "jamba", Store(tmp_path / "store")
    torch.manual_seed(0)
    save_folder(louder(AutoModelForCausalLM.from_config(RECURRENT).eval()), tiny_tokenizer(), folder)
    seed = import_seed(str(folder), store, name="jamba")
    assert "recurrent state" in seed.limits["generate"]
    assert store.load("jamba") == seed
    assert seed == import_seed(str(folder), store, name="jamba")  # the same reasons again, so the same digest
    assert "cannot continue text" in str(show(seed, store))
    with pytest.raises(BadSeed, match="jamba cannot continue text"):
        generate(seed, "the cat", store)


def test_a_use_is_refused_before_any_work(tmp_path):
    """A record that comes from somewhere may claim limits: each refuses its verbs. That it claims none allows nothing."""
    store = Store(tmp_path)
    plain = tiny_seed(store)
    seed = plain.model_copy(update={"limits": dict.fromkeys(trial.WORDS, "it is a test")})
    experts = [Expert(seed=seed.digest, data=(), recipe=Recipe(steps=step), files={}) for step in (1, 2)]
    for record in (seed, *experts):
        store.add(record)
    for use in trial.WORDS:
        check_use(plain, use)
        with pytest.raises(BadSeed, match=r"tiny cannot .*: it is a test"):
            check_use(seed, use)
    for refused in (
        lambda: merge(experts, store),
        lambda: generate(seed, "the cat", store),
        lambda: export(Expert(seed=seed.digest, data=(), recipe=Recipe(steps=1, method="lora"),
                              files={"adapter_config.json": "sha256:" + 64 * "0"}), tmp_path / "out", format="gguf", store=store),
    ):  # fmt: skip
        with pytest.raises(BadSeed, match="it is a test"):
            refused()
    assert not {"work", "out"} & {path.name for path in tmp_path.iterdir()}
