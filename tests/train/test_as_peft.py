"""Adapters are worth here what they are worth in PEFT: live, as text grows, folded, merged; or they are refused before anything is made."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, config_seed, save_adapter
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from elmwood.errors import BadInput
from elmwood.lm.adapters import peft_config
from elmwood.lm.adapters.places import linear_layers, unfit
from elmwood.lm.experts import Experts
from elmwood.lm.load import import_seed, load_model
from elmwood.merge.answers import make
from elmwood.merge.checkpoint import Answer
from elmwood.merge.export.folder import export
from elmwood.merge.layer_weights import everywhere
from elmwood.records import Expert, Recipe
from elmwood.train.adapter import add_adapter
from elmwood.train.adopt import import_adapter
from elmwood.train.tasks import train
from elmwood.weights.experts import CONV1D, Low, seed_places

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")  # what PEFT says when it saves or corrects such adapters

BASE = {"vocab_size": SHAPE.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
USUAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
USUAL |= {"max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
MODELS = {
    "llama": USUAL | {"tie_word_embeddings": False},
    "gpt2": GPT2,
    "openai-gpt": GPT2,
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": USUAL,
    "phi": USUAL,
    "mixtral": USUAL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": USUAL | MOE,
    "qwen2_moe": USUAL | MOE | {"shared_expert_intermediate_size": 16},
    "llama4_text": USUAL | {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8, "interleave_moe_layer_step": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "jamba": USUAL
    | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"use_mamba_kernels": False, "mamba_d_state": 8},
    "bamba": USUAL | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
}
KINDS = {
    "llama-patterns": {
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 12, "up_proj": 3},
    },
    "llama-head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "llama-late": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "exclude_modules": ["o_proj"]},
    "llama-init": {"r": 4, "init_lora_weights": "orthogonal"},
    "llama-dora": {"r": 4, "use_dora": True},
    "gpt2-square": {"r": 4, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
    "gpt2-all": {"r": 4, "fan_in_fan_out": True},
    "gpt2-dora": {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "opt-all": {"r": 4},
    "gpt_neox-all": {"r": 4},
    "phi-all": {"r": 4},
    "mixtral-attention": {"r": 4, "target_modules": ["q_proj", "o_proj"]},
}


def seed_of(kind, store, **changed):
    return config_seed(AutoConfig.for_model(kind, **BASE | MODELS[kind] | changed), store)


@pytest.fixture(scope="module")
def seeds(store):
    """The seed of an architecture, made once."""
    made = {}
    return lambda kind: made[kind] if kind in made else made.setdefault(kind, seed_of(kind, store))


def loglik(model, tokens_BT):
    with torch.inference_mode():
        logp_BTV = model.eval()(input_ids=tokens_BT, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return logp_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]


def some(rng_seed=14):
    return torch.randint(SHAPE.vocabulary, (2, 12), generator=torch.Generator().manual_seed(rng_seed))


def saved(folder, **settings):
    """An adapter whose settings file says something else than PEFT wrote."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({name: value for name, value in (json.loads(path.read_bytes()) | settings).items() if value != "absent"}))
    return folder


def check_everywhere(expert, seed, store, wanted_BT, tmp_path, grows=True):
    """Live, as text grows, folded, as an adapter, and merged with an expert that has no say: all are the log-likelihoods of PEFT."""
    tokens_BT, close = some(), {"atol": 1e-5, "rtol": 1e-5}
    experts = Experts(seed, [expert], store, "cpu")
    torch.testing.assert_close(experts.score(0, tokens_BT)[:, 1:], wanted_BT, **close)
    text = experts.start()
    for first, last in [(0, 7), (7, 8), (8, 10)] if grows else []:
        logp_1V, text = experts.extend([0], tokens_BT[0, first:last].tolist(), text)
        torch.testing.assert_close(logp_1V[0, tokens_BT[0, last]], wanted_BT[0, last - 1], **close)
    export(expert, store, tmp_path / "folded", "transformers")
    torch.testing.assert_close(loglik(AutoModelForCausalLM.from_pretrained(tmp_path / "folded"), tokens_BT), wanted_BT, **close)
    export(expert, store, tmp_path / "peft", "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_bytes()).get("fan_in_fan_out", False) == (
        "gpt2" in seed.architecture.lower()
    )
    plain = PeftModel.from_pretrained(load_model(seed, store, device="cpu"), tmp_path / "peft")
    torch.testing.assert_close(loglik(plain, tokens_BT), wanted_BT, **close)
    if expert.recipe.method == "dora":
        return
    other = expert.model_copy(update={"contributor": "silent"})
    store.add(other)
    members = {expert.digest: everywhere(1.0), other.digest: everywhere(0.0)}
    for merged in make(seed, members, [Answer("task_arithmetic", {}), Answer("concat", {}), Answer("svd", {})], store):
        torch.testing.assert_close(loglik(load_model(seed, store, merged, "cpu"), tokens_BT), wanted_BT, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adopted_adapter_is_that_of_peft_everywhere(kind, seeds, store, tmp_path):
    seed = seeds(kind.partition("-")[0])
    folder, settings = tmp_path / "adapter", {"target_modules": "all-linear", "lora_alpha": 8} | KINDS[kind]
    save_adapter(load_model(seed, store, device="cpu"), str(folder), 5, **settings)
    saved(folder, fan_in_fan_out=False, lora_alpha="absent", init_lora_weights=settings.get("init_lora_weights", True))
    plain = PeftModel.from_pretrained(load_model(seed, store, device="cpu"), folder)
    expert = import_adapter(str(folder), seed, store)
    check_everywhere(expert, seed, store, loglik(plain, some()), tmp_path)
    merged = plain.merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "folded" / "model.safetensors").items():
        if name in merged:  # but stacked experts
            torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-6)


def test_matrices_saved_beside_an_adapter_are_left_out_where_they_are_the_seeds(seeds, store, tmp_path):
    seed = seeds("llama")
    save_adapter(load_model(seed, store), str(tmp_path / "a"), 5, r=4, target_modules=["q_proj", "lm_head"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    lean = {name: value for name, value in tensors.items() if "lora_" in name}
    whole = {"base_model.model.lm_head.base_layer.weight": load_file(store.get(seed.files["model.safetensors"]))["lm_head.weight"]}
    save_file(lean, path, {"format": "pt"})
    expert = import_adapter(str(tmp_path / "a"), seed, store)
    save_file(lean | whole, path)
    assert import_adapter(str(tmp_path / "a"), seed, store) == expert
    save_file(lean | {name: value.bfloat16() for name, value in whole.items()}, path)
    assert import_adapter(str(tmp_path / "a"), seed, store) == expert
    save_file(lean | {name: value * 1.01 for name, value in whole.items()}, path)
    with pytest.raises(BadInput, match=r"lm_head.base_layer.weight.*whole matrix, and not the seed's"):
        import_adapter(str(tmp_path / "a"), seed, store)


REFUSED = {
    "embed_tokens cannot carry an adapter: of class Embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "lm_head cannot carry an adapter: its matrix stands elsewhere": ("phi", {"target_modules": ["q_proj", "lm_head"]}),
    "experts cannot carry an adapter: of class MixtralExperts": (
        "mixtral",
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    ),
    "target_parameters": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
    "dt_proj cannot carry an adapter: MambaMixer reads its matrix": ("mamba", {"target_modules": ["in_proj", "dt_proj"]}),
    "conv1d cannot carry an adapter: of class Conv1d": ("bamba", {"r": 80, "target_modules": ["q_proj", "conv1d"]}),
    "lora_bias": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
    "trainable_token_indices": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_cannot_be_folded_is_refused_before_anything_is_stored(complaint, store, tmp_path):
    kind, settings, *edited = REFUSED[complaint]
    seed = seed_of(kind, store, tie_word_embeddings=kind == "phi")
    save_adapter(load_model(seed, store), str(tmp_path / "a"), 5, **{"r": 4} | settings)
    saved(tmp_path / "a", **dict(*edited))
    before = sorted(store.root.rglob("*.json"))
    with pytest.raises(BadInput, match=complaint):
        import_adapter(str(tmp_path / "a"), seed, store)
    assert sorted(store.root.rglob("*.json")) == before


@pytest.mark.parametrize(("key", "fits"), [("use_magic", False), ("megatron_core", True)])
def test_a_setting_that_is_not_known_is_refused_unless_it_is_off(key, fits, seeds, store, tmp_path, monkeypatch):
    """`megatron_core` stands for a setting of a newer PEFT, with the value it has there by default."""
    monkeypatch.setattr(peft_config, "IDLE", tuple(name for name in peft_config.IDLE if name != key))
    save_adapter(load_model(seeds("llama"), store), str(tmp_path / "a"), 5, r=4, target_modules=["q_proj"])
    saved(tmp_path / "a", use_magic=None)
    import_adapter(str(tmp_path / "a"), seeds("llama"), store)
    saved(tmp_path / "a", **{key: 3})
    with pytest.raises(BadInput, match=f"uses '{key}', which is not known here"):
        import_adapter(str(tmp_path / "a"), seeds("llama"), store)


def test_the_table_has_every_setting_of_peft():
    known = {*peft_config.USED, *peft_config.IDLE, *peft_config._UNSUPPORTED}
    assert known == {field for field in LoraConfig.__dataclass_fields__ if not field.startswith("_")}


def test_the_architectures_with_transposed_matrices_are_all_there_are(seeds, store):
    texts = [path.read_text() for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")]
    found = {name for text in texts if "Conv1D(" in text for name in re.findall(r"^class (\w+)\(", text, re.MULTILINE)}
    assert found.intersection(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) == set(CONV1D)
    for kind in ("gpt2", "openai-gpt", "llama"):
        model, tensors = load_model(seeds(kind), store, device="cpu"), seed_places(seeds(kind), store)
        there = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        assert {name for name, place in tensors.items() if place.turned} == there


def test_a_reader_meets_no_tensor_that_it_does_not_use(seeds, store, tmp_path):
    """Records come from others, who may not have adopted anything here."""
    seed = seeds("llama")
    save_adapter(load_model(seed, store), str(tmp_path), 5, r=4, target_modules=["q_proj"])
    (tmp_path / "README.md").unlink()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    top, tensor = "base_model.model.model", torch.zeros(4, SHAPE.vocabulary)
    strange = {
        "embedding": {f"{top}.embed_tokens.lora_embedding_A": tensor, f"{top}.embed_tokens.lora_embedding_B": torch.zeros(32, 4)},
        "bias": {first.replace("lora_A.weight", "lora_B.bias"): torch.zeros(32)},
        "magnitudes": {first.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)},
        "whole": {f"{top}.norm.weight": torch.ones(32)},
        "half": {first.replace("q_proj", "k_proj"): tensors[first].clone()},
    }
    for name, more in strange.items():
        save_file(tensors | more, tmp_path / "adapter_model.safetensors")
        expert = Expert(seed=seed.digest, data=(), recipe=Recipe(method="lora", steps=1), files=store.put_folder(tmp_path))
        store.add(expert)
        with pytest.raises(BadInput):
            Low(expert.digest, store.folder(expert.files), seed_places(seed, store))
        with pytest.raises(BadInput):
            export(expert, store, tmp_path / name, "transformers")
        with pytest.raises(BadInput):
            Experts(seed, [expert], store).score(0, some())


# ---- trained here ------------------------------------------------------------------------------------------------

PLACES = {
    "llama": set(),
    "mixtral": {"w1"},
    "qwen3_moe": {"gate_up_proj"},
    "qwen2_moe": set(),
    "llama4_text": {"router"},
    "mamba": {"dt_proj", "out_proj", "x_proj"},
    "jamba": {"dt_proj"},
    "bamba": {"out_proj"},
}


@pytest.mark.parametrize("kind", PLACES)
def test_adapters_of_all_linear_layers_stand_where_they_count(kind, store):
    """Each layer with an adapter is called in a pass, and each that is passed by has none."""
    config, said = AutoConfig.for_model(kind, **BASE | MODELS[kind]), []
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).eval()
    layers, refused = linear_layers(model), unfit(model)
    called = set()
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(input_ids=some(), use_cache=False)
    assert layers.keys() - called <= refused.keys()
    model = add_adapter(model, Recipe(method="lora", steps=1, rank=2), "base", progress=lambda what, *_: said.append(what))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any(leaf in name for name in trained for leaf in PLACES[kind])
    assert bool(PLACES[kind]) == bool(said)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model(input_ids=some(), use_cache=False).logits.square().sum().backward()
    assert trained
    assert all(model.get_parameter(name).grad.any() for name in trained)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "dt_proj", "w1"])
def test_targets_that_would_be_lost_are_refused_before_training(target):
    kind = {"dt_proj": "mamba", "w1": "mixtral"}.get(target, "llama")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **BASE | MODELS[kind] | {"tie_word_embeddings": kind == "llama"}))
    with pytest.raises(BadInput, match=r"--targets .*" + ("PEFT refuses them" if target == "w1" else "cannot carry an adapter")):
        add_adapter(model, Recipe(method="lora", steps=1, rank=2, targets=(target,)), "base")


@pytest.mark.parametrize("kind", ["gpt2-qlora", "gpt2-lora", "mixtral-lora", "jamba-lora"])
def test_an_own_expert_is_that_of_peft_everywhere(kind, case, seeds, tmp_path):
    name, method = kind.split("-")
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    store, corpus, _ = case
    seed = seed_of(name, store, **({"n_embd": 64} if method == "qlora" else {}))
    recipe = Recipe(method=method, rank=4, steps=3, batch=2, length=16, learning_rate=3e-2)
    expert = train(seed, corpus.train, recipe, store, device="cpu")
    plain = PeftModel.from_pretrained(load_model(seed, store, device="cpu"), store.folder(expert.files))
    assert (loglik(plain, some()) - loglik(load_model(seed, store, device="cpu"), some())).abs().max() > 1e-2
    check_everywhere(expert, seed, store, loglik(plain, some()), tmp_path, grows=name != "jamba")  # it keeps other states


def test_an_adapter_over_a_seed_in_several_files_is_folded_into_them(seeds, store, tmp_path):
    whole = seeds("llama")
    load_model(whole, store, device="cpu").save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    for path in store.folder(whole.files).glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "parts" / path.name)
    seed = import_seed(str(tmp_path / "parts"), store, name="parts", separator=0)
    assert len([name for name in seed.files if name.endswith(".safetensors")]) > 2
    save_adapter(load_model(seed, store, device="cpu"), str(tmp_path / "a"), 5, r=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    plain = PeftModel.from_pretrained(load_model(seed, store, device="cpu"), tmp_path / "a")
    check_everywhere(import_adapter(str(tmp_path / "a"), seed, store), seed, store, loglik(plain, some()), tmp_path)
