"""A seed tried at its import: what it cannot be used for is in its record, with the reason, and refused before any work."""

import pytest
import torch
from tiny_models import SHAPE, config_seed, lora_expert, louder, tiny_seed, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, RwkvConfig

from elmwood.errors import BadSeed, ElmwoodError
from elmwood.lm import load
from elmwood.lm.load import save_folder
from elmwood.lm.pretrained import empty_model, make_config
from elmwood.records import Expert, Recipe
from elmwood.store import Store
from elmwood.study import trial
from elmwood.study.ancestry import generate
from elmwood.study.exporting import export
from elmwood.study.merging import merge
from elmwood.study.page import show
from elmwood.study.seeds import import_seed
from elmwood.study.trial import check_use, shrunk, try_seed

KINDS = (
    "llama", "mistral", "qwen2_moe", "qwen3", "qwen3_next", "gemma2", "gemma3_text", "phi", "phi3", "opt", "gpt2", "gpt_neox", "bloom",
    "mpt", "falcon", "olmo2", "starcoder2", "stablelm", "smollm3", "mixtral", "deepseek_v3", "rwkv", "mamba", "rwkv",
)  # fmt: skip
RWKV = RwkvConfig(vocab_size=SHAPE.vocabulary, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=64)


@pytest.fixture
def no_adapters(monkeypatch):
    """Every architecture that is admitted today can do everything: a step that fails stands for one that cannot."""

    def fail(_):
        raise AttributeError("'Adapted' object has no attribute 'weight'")

    monkeypatch.setattr(trial, "_adapter", fail)


def head_size(config):
    size = getattr(config, "head_dim", None)
    return size if isinstance(size, int) else config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_published_config_is_small_and_alike(kind):
    large = AutoConfig.for_model(kind)  # the defaults are those of a published model
    small = make_config(shrunk(large.to_dict()))
    assert empty_model(small).num_parameters() <= trial.MOST
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


def test_a_copy_has_the_limits_of_the_seed_itself(tmp_path, monkeypatch, request):
    monkeypatch.setattr(trial, "OWN", 0)  # both are tried themselves in other tests
    store = Store(tmp_path)
    seed, before = config_seed(RWKV, store), torch.random.get_rng_state()
    assert try_seed(seed, store) == try_seed(tiny_seed(store), store) == {}
    assert torch.equal(torch.random.get_rng_state(), before)
    request.getfixturevalue("no_adapters")
    assert set(try_seed(seed, store)) == {"lora"}
    assert {path.name for path in tmp_path.iterdir()} <= {"blobs", "records", "views"}  # nothing of the trial is left


def test_what_a_seed_cannot_do_is_said_once_and_kept(tmp_path, no_adapters):
    folder, store = tmp_path / "rwkv", Store(tmp_path / "store")
    torch.manual_seed(0)
    save_folder(louder(AutoModelForCausalLM.from_config(RWKV).eval()), tiny_tokenizer(), folder)
    seed = import_seed(str(folder), store, name="rwkv")
    assert "no attribute" in seed.limits["lora"]
    assert store.load("rwkv") == seed
    assert seed == import_seed(str(folder), store, name="rwkv")  # the same reasons again, so the same digest
    assert "cannot train adapters" in str(show(seed, store))
    with pytest.raises(BadSeed, match="rwkv cannot train adapters"):
        check_use(seed, "lora")


@pytest.mark.parametrize(("own", "method", "settings"), [
    (0, "lora", {"use_rslora": True, "alpha_pattern": {"v_proj": 5}}),
    (trial.OWN, "dora", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
])  # fmt: skip
def test_an_adapter_made_elsewhere_is_tried(own, method, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "OWN", own)
    store = Store(tmp_path)
    seed = tiny_seed(store)
    expert = lora_expert(seed, store, 1, settings=settings)
    trial.try_adapter(expert.model_copy(update={"recipe": Recipe(method=method, steps=1)}), seed, store)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of adapters on embeddings
def test_an_adapter_that_cannot_be_used_fails_its_trial(store, seed):
    """A record that did not come by `adopt`."""
    with pytest.raises(ElmwoodError):
        trial.try_adapter(lora_expert(seed, store, 1, settings={"target_modules": ["q_proj", "embed_tokens"]}), seed, store)


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
