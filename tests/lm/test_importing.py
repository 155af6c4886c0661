"""Checkpoints as they are published: written anew at import where names or layouts differ, kept byte for byte where not, or refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_configs import CONFIGS, SMALL, some_tokens
from tiny_models import SHAPE, full_expert, lora_expert, louder, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3MoeConfig,
    RobertaConfig,
)

from elmwood.errors import BadSeed
from elmwood.lm.files import seed_folder
from elmwood.lm.load import import_seed, load_model, save_folder
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.export.folder import export
from elmwood.merge.layer_weights import everywhere

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {**SMALL, **HEADS, "num_local_experts": 4, "num_experts": 4, "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8}
PUBLISHED = CONFIGS | {
    "opt-6.7b": OPTConfig(**SMALL, ffn_dim=128, num_attention_heads=4),
    "gpt2": GPT2Config(vocab_size=SHAPE.vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "bloom": BloomConfig(vocab_size=SHAPE.vocabulary, hidden_size=32, n_layer=2, n_head=4),
    "neox": GPTNeoXConfig(**SMALL, intermediate_size=48, num_attention_heads=4),
    "llama": LlamaConfig(**SMALL, **HEADS, intermediate_size=48, tie_word_embeddings=False),
    "tied": LlamaConfig(**SMALL, **HEADS, intermediate_size=48, tie_word_embeddings=True),
    "roberta": RobertaConfig(**SMALL, intermediate_size=48, num_attention_heads=4, is_decoder=True),
    "mixtral": MixtralConfig(**EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**EXPERTS),
}


def write(kind, folder, dtype=torch.float32, **how):
    """A checkpoint as save_pretrained writes it today."""
    torch.manual_seed(3)
    model = louder(AutoModelForCausalLM.from_config(PUBLISHED[kind]).eval(), 4.0).to(dtype)
    save_folder(model, tiny_tokenizer(), folder)
    if how:
        model.save_pretrained(folder, **how)
    return model


def change(folder, alter):
    tensors = load_file(folder / "model.safetensors")
    found = alter(tensors) or tensors
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "model.safetensors", {"format": "pt"})


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))


def without(prefix):
    return lambda tensors: {name.removeprefix(prefix): value for name, value in tensors.items() if name != "lm_head.weight"}


def hub_gpt2(tensors):
    return without("transformer.")(tensors) | {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}


def frequencies(tensors):
    tensors.update({f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(4) for layer in range(2)})


def embed(tensors, times=1.0):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * times


def half(tensors):
    tensors["score.weight"] = torch.rand(2, 32)
    return {name: value.bfloat16() if value.dim() > 1 else value for name, value in tensors.items()}


# name -> kind, what is done to the file, what import says of it
WILD = {
    "opt from the trunk": ("opt-6.7b", without("model."), "names of the loaded model: decoder.embed"),
    "opt-350m from the trunk": ("opt", without("model."), "names of the loaded model"),
    "gpt2 of the hub": ("gpt2", hub_gpt2, r"left out: h\.0\.attn\.bias, h\.1\.attn\.bias"),
    "bloom of the hub": ("bloom", without("transformer."), "names of the loaded model"),
    "neox from the trunk": ("neox", lambda tensors: {name.removeprefix("gpt_neox."): value for name, value in tensors.items()}, "names"),
    "inv_freq": ("llama", frequencies, "left out: model.layers.0.self_attn.rotary_emb.inv_freq"),
    "a value head": ("llama", lambda tensors: tensors.update({"v_head.summary.weight": torch.rand(1, 32)}), "left out: v_head"),
    "a copy of a tied head": ("tied", embed, "lm_head.weight, a copy of the embedding"),
    "another head though tied": ("tied", lambda tensors: embed(tensors, 0.5), "tie_word_embeddings is now false"),
    "the head in place of the embedding": (
        "tied", lambda tensors: {re.sub("model.embed_tokens", "lm_head", name): value for name, value in tensors.items()}, "became model"
    ),
    "mixed dtypes and a score": ("llama", half, "torch.float32, which holds every value: they were BF16 and F32"),
}  # fmt: skip


def says(model):
    with torch.inference_mode():
        return model(some_tokens(2, 30)).logits.log_softmax(-1)


@pytest.mark.parametrize("case", WILD)
def test_a_published_checkpoint_is_written_anew_and_says_the_same(case, tmp_path, store):
    kind, alter, told = WILD[case]
    expected = set(load_file(write(kind, tmp_path).save_pretrained(tmp_path) or tmp_path / "model.safetensors"))
    change(tmp_path, alter)
    seed = import_seed(str(tmp_path), store)
    assert any(re.search(told, change) for change in seed.changes), seed.changes
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(says(load_model(seed, store, device="cpu")), says(plain), atol=1e-6, rtol=0)
    names = set(load_file(seed_folder(seed, store) / "model.safetensors"))
    assert names == expected | ({"lm_head.weight"} if "another" in case else set())
    assert import_seed(str(seed_folder(seed, store)), store).files == seed.files  # what was written is kept
    turned = {"settings": {"fan_in_fan_out": True}} if kind == "gpt2" else {}
    full, low = full_expert(seed, store, 1), lora_expert(seed, store, 2, **turned)
    merged = merge(seed, {one.digest: everywhere(1.0) for one in (full, low)}, [Answer("average", {})], store)[0]
    whole, folded = load_model(seed, store, full, "cpu"), load_model(seed, store, low, "cpu").merge_and_unload()
    for (name, mine), (other, its) in zip(whole.named_parameters(), folded.named_parameters(), strict=True):
        assert name == other
        plain.get_parameter(name).data = (mine.data + its.data) / 2
    for record, live in ((full, whole), (low, folded), (merged, plain)):
        export(record, store, tmp_path / record.digest, "transformers" if record is low else None)
        there = AutoModelForCausalLM.from_pretrained(tmp_path / record.digest, dtype=torch.float32)
        torch.testing.assert_close(says(there), says(live), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_checkpoint_of_today_is_kept_byte_for_byte(kind, tmp_path, store):
    write(kind, tmp_path, torch.bfloat16, max_shard_size="30KB")
    (tmp_path / "model.safetensors").unlink()
    seed = import_seed(str(tmp_path), store)
    assert not any("tensors" in change for change in seed.changes)
    kept = [*tmp_path.glob("*.safetensors"), tmp_path / "config.json"]
    assert len(kept) > 2
    assert all((seed_folder(seed, store) / path.name).read_bytes() == path.read_bytes() for path in kept)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_stored_one_by_one(kind, tmp_path, store):
    model = write(kind, tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert expected.keys() != load_file(tmp_path / "model.safetensors").keys()
    seed = import_seed(str(tmp_path), store)
    found = load_file(seed_folder(seed, store) / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_strays_beside_the_weights_are_left_out(tmp_path, store):
    model = write("llama", tmp_path)
    save_file({"tok_embeddings.weight": torch.rand(3, 3)}, tmp_path / "consolidated.safetensors")
    lora = lora_expert(import_seed(str(tmp_path), store), store, 1)
    for name in lora.files:
        (tmp_path / name).write_bytes(store.get(lora.files[name]).read_bytes())
    seed = import_seed(str(tmp_path), store)
    assert not {"consolidated.safetensors", "adapter_model.safetensors", "adapter_config.json"} & seed.files.keys()
    assert any("adapter_model.safetensors, consolidated.safetensors" in change for change in seed.changes)
    torch.testing.assert_close(says(load_model(seed, store, device="cpu")), says(model), atol=1e-6, rtol=0)


def nan(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan


REFUSED = {
    "1 tensors have no place in a LlamaForCausalLM, first model.layers.2": (
        "llama", lambda tensors: tensors.update({"model.layers.2.mlp.down_proj.weight": torch.rand(3)})
    ),
    "no place in a LlamaForCausalLM, first model.layers.0.self_attn.q_proj.bias": (
        "llama", lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.rand(32)})
    ),
    "first lm_head.weight: .* tie_word_embeddings": ("llama", lambda tensors: tensors.pop("lm_head.weight") is None or None),
    "down_proj.weight contains NaN": ("llama", nan),
    "stored as U8": ("llama", lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.uint8)})),
}  # fmt: skip


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_cannot_be_read_exactly_is_refused_by_name(complaint, tmp_path, store):
    kind, alter = REFUSED[complaint]
    write(kind, tmp_path)
    change(tmp_path, alter)
    with pytest.raises(BadSeed, match=complaint):
        import_seed(str(tmp_path), store)
    assert not [*(store.root / "work").glob("tmp*")]


def test_half_of_a_sharded_checkpoint_is_refused(tmp_path, store):
    write("llama", tmp_path, max_shard_size="30KB")
    (tmp_path / "model.safetensors").unlink()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[-1].rename(tmp_path / "elsewhere")
    with pytest.raises(BadSeed, match=r"1 of .* weight files are missing"):
        import_seed(str(tmp_path), store)
    (tmp_path / "elsewhere").rename(shards[-1])
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(BadSeed, match="add the index"):
        import_seed(str(tmp_path), store)


def test_a_model_that_sees_is_refused(tmp_path, store):
    write("gemma3", tmp_path)
    Gemma3Config(text_config=CONFIGS["gemma3"].to_dict(), architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(BadSeed, match=r"reads more than text .vision_config"):
        import_seed(str(tmp_path), store)


def test_a_special_token_without_a_row_does_no_harm_and_a_word_does(tmp_path, store):
    write("llama", tmp_path)
    words = json.loads((tmp_path / "tokenizer.json").read_bytes())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    extra = [{"id": row, "content": f"<{row}>", **flags} for row in range(len(words["model"]["vocab"]), SHAPE.vocabulary + 1)]
    for special in (True, False):
        extra[-1]["special"] = special
        known = [*words["added_tokens"], *extra]
        (tmp_path / "tokenizer.json").write_text(json.dumps(words | {"added_tokens": known}))
        if special:
            import_seed(str(tmp_path), store)
        else:
            with pytest.raises(BadSeed, match="ids up to 320"):
                import_seed(str(tmp_path), store)


def test_quantised_weights_are_refused(tmp_path, store):
    write("llama", tmp_path)
    configure(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BadSeed, match=r"quantised \(gptq\)"):
        import_seed(str(tmp_path), store)


@pytest.mark.parametrize(
    ("kind", "fields", "context", "told"),
    [("gpt2", {}, 64, 0), ("bloom", {"seq_length": 99}, 99, 0), ("bloom", {}, 2048, 1), ("roberta", {}, 62, 0)],
)
def test_positions_go_by_several_names_or_none(kind, fields, context, told, tmp_path, store):
    write(kind, tmp_path)
    configure(tmp_path, **fields)
    seed = import_seed(str(tmp_path), store)
    assert (seed.context, len(seed.changes)) == (context, told)
