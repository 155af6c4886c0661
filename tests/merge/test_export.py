"""Exported folders open where people run models, without us, and say what was in the store.

D numbers of a head
"""

import json
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, config_seed, full_expert, lora_expert, louder, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
from typer.testing import CliRunner

from elmwood.cli import app
from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, BadSeed, Damaged
from elmwood.lm.files import seed_folder, tokenizer
from elmwood.lm.load import import_seed, load_model, save_folder
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.export.folder import check_checkpoint, export
from elmwood.merge.export.gguf import write_gguf
from elmwood.merge.export.gguf_vocabulary import SPLITS, pre_tokenizer
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.moe import shards
from elmwood.merge.moe.build import Mixing, mix, order_of
from elmwood.merge.moe.gates import random_rows
from elmwood.merge.states import seed_places
from elmwood.records import Forest, Gates

TEXT = "the cat sat — naïve café 海 and 1234 猫 don't  stop\n\n x"


SMALL = {
    "vocab_size": SHAPE.vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def experts(seed, store):
    """One of each kind."""
    return {
        "full": full_expert(seed, store, 1),
        "lora": lora_expert(seed, store, 2, settings={"r": 3, "use_rslora": True, "alpha_pattern": {"v_proj": 5}}),
        "dora": lora_expert(seed, store, 3, settings={"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    }


@pytest.fixture(scope="module")
def merged(seed, experts, store):
    members = {experts[name].digest: everywhere(1.0) for name in ("full", "lora")}
    return merge(seed, members, [Answer("average", {})], store)[0]


def logits(folder, **settings):
    tokens_BT = torch.tensor([tiny_tokenizer().encode(TEXT).ids])
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)(tokens_BT).logits[0]


# ---- checkpoints and adapters


@pytest.mark.parametrize("name", ["full", "lora", "dora"])
@torch.inference_mode()
def test_an_expert_as_a_checkpoint_says_what_it_says_in_the_store(name, experts, seed, store, tmp_path):
    export(experts[name], store, tmp_path / "out", "transformers")
    tokens_BT = torch.tensor([tiny_tokenizer().encode(TEXT).ids])
    torch.testing.assert_close(logits(tmp_path / "out"), load_model(seed, store, experts[name])(tokens_BT).logits[0], atol=2e-5, rtol=2e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == tokens_BT[0].tolist()
    assert seed.digest in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folded_number_is_the_nearest_there_is(dtype, store, tmp_path):
    model = louder(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))).to(dtype)
    save_folder(model, tiny_tokenizer(), tmp_path / "seed")
    mine = import_seed(str(tmp_path / "seed"), store)
    expert = lora_expert(mine, store, 4, settings={"r": 5, "lora_alpha": 7})
    export(expert, store, tmp_path / "out", "transformers")
    made, factors = load_file(tmp_path / "out" / "model.safetensors"), load_file(store.folder(expert.files) / "adapter_model.safetensors")
    for name, tensor in model.state_dict().items():
        if (a := factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")) is None:
            assert name not in made or torch.equal(made[name], tensor)
            continue
        b = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
        exact = tensor.double() + 7 / 5 * (b.double() @ a.double())
        error = (made[name].double() - exact).abs()
        for other in (torch.nextafter(made[name], torch.full_like(made[name], side * torch.inf)) for side in (-1, 1)):
            assert (error <= (other.double() - exact).abs() * (1 + 1e-6)).all()


def test_an_adapter_stays_an_adapter(experts, seed, store, tmp_path):
    export(experts["lora"], store, tmp_path / "out")
    tokens_BT = torch.tensor([tiny_tokenizer().encode(TEXT).ids])
    with torch.inference_mode():
        found = PeftModel.from_pretrained(load_model(seed, store), tmp_path / "out").eval()(tokens_BT).logits
        torch.testing.assert_close(found, load_model(seed, store, experts["lora"])(tokens_BT).logits)
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_a_merge_keeps_its_own_card(merged, store, tmp_path):
    export(merged, store, tmp_path / "out")
    assert "Summed in whole numbers" in (tmp_path / "out" / "README.md").read_text()
    assert logits(tmp_path / "out").isfinite().all()


TURNED = {"rope_type": "default", "rope_theta": 777.0}
MIXED = {
    "llama": LlamaConfig(
        **SMALL, tie_word_embeddings=True, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 777.0}
    ),
    "mistral": MistralConfig(**SMALL, head_dim=32, sliding_window=32),
    "qwen3": Qwen3Config(**SMALL, head_dim=128),
    "olmo2": Olmo2Config(**SMALL),
}


def mixture_of(seed, members, store, layout="checkpoint"):
    forest = Forest(seed=seed.digest, partition="0" * 64, experts=tuple(one.digest for one in members))
    store.add(forest)
    rows = random_rows(seed_places(seed, store), order_of(forest, True, store), 0, 50.0)
    return mix(forest, rows, Mixing(gates=Gates(seed_bias=0.0), layout=layout), store)


def said(record, store):
    """What a model in the store says, as log-probabilities of a text's tokens."""
    return open_model(record, store, "cpu").score(torch.tensor([tiny_tokenizer().encode(TEXT).ids]))[0]


def read_elsewhere(folder):
    tokens_T = torch.tensor(tiny_tokenizer().encode(TEXT).ids)
    return logits(folder)[:-1].log_softmax(-1).gather(1, tokens_T[1:, None])[:, 0]


@pytest.mark.parametrize("kind", MIXED)
def test_a_mixture_of_any_architecture_makes_the_round_trip(kind, store, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 100_000)
    seed = config_seed(MIXED[kind], store)
    record = mixture_of(seed, [full_expert(seed, store, 1), lora_expert(seed, store, 2)], store)
    export(record, store, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    torch.testing.assert_close(read_elsewhere(tmp_path / "out"), said(record, store)[1:], atol=1e-5, rtol=1e-5)
    found, mine = AutoConfig.from_pretrained(tmp_path / "out"), MIXED[kind]
    for name in ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "sliding_window", "num_key_value_heads", "vocab_size"):
        assert getattr(found, name, None) == getattr(mine, name, None), name
    assert found.rope_parameters == mine.rope_parameters
    assert getattr(found, "norm_topk_prob", True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == tiny_tokenizer().encode(TEXT).ids
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(digest in card for digest in record.experts)
    assert all(f"| {path.name} |" in card for path in (tmp_path / "out").iterdir() if path.name != "README.md")
    if kind == "olmo2":
        with pytest.raises(BadInput, match="flex_olmo"):
            export(record, store, tmp_path / "gguf", "gguf")
        return
    export(record, store, tmp_path / "gguf", "gguf")
    if find_spec("llama_cpp"):
        theirs, _ = llama_cpp_logits(tmp_path / "gguf" / "model.gguf", tiny_tokenizer().encode(TEXT).ids)
        torch.testing.assert_close(theirs.log_softmax(-1), logits(tmp_path / "out").log_softmax(-1), atol=5e-2, rtol=0)


def test_a_low_rank_mixture_leaves_as_a_standard_one(seed, store, tmp_path):
    record = mixture_of(seed, [lora_expert(seed, store, n) for n in (5, 6)], store, "low-rank")
    export(record, store, tmp_path / "out")
    torch.testing.assert_close(read_elsewhere(tmp_path / "out"), said(record, store)[1:], atol=2e-5, rtol=2e-5)


REFUSED = {
    "no format 'onnx'": {"form": "onnx"},
    "no adapter": {"form": "peft"},
    "--dtype F16": {"form": "transformers", "dtype": "F16"},
    "--dtype Q4": {"form": "gguf", "dtype": "Q4"},
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_cannot_be_exported_so_is_refused(complaint, seed, store, tmp_path):
    with pytest.raises(BadInput, match=complaint):
        export(seed, store, tmp_path / "out", **REFUSED[complaint])


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SPOILT = {
    "not finite": (Damaged, lambda folder: spoil(folder, lambda found: found["model.norm.weight"].fill_(torch.inf))),
    "model.norm.weight": (BadSeed, lambda folder: spoil(folder, lambda found: found.pop("model.norm.weight"))),
    "stray": (BadSeed, lambda folder: spoil(folder, lambda found: found.update(stray=torch.zeros(2)))),
    "cannot be loaded": (BadSeed, lambda folder: spoil(folder, lambda found: found.update({"model.norm.weight": torch.zeros(3)}))),
    "no tokenizer": (BadSeed, lambda folder: [path.unlink() for path in folder.glob("tokenizer*")]),
    "differ in": (Damaged, lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')),
}


@pytest.mark.parametrize("complaint", SPOILT)
def test_an_export_that_went_wrong_is_seen(complaint, seed, store, tmp_path):
    shutil.copytree(seed_folder(seed, store), tmp_path / "out")
    check_checkpoint(tmp_path / "out")
    error, damage = SPOILT[complaint]
    damage(tmp_path / "out")
    with pytest.raises(error, match=complaint):
        check_checkpoint(tmp_path / "out")


# ---- GGUF

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=128),
    "biases": LlamaConfig(**SMALL, attention_bias=True),
    "linear": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3 | {"rope_theta": 10000.0}),
    "window": MistralConfig(**SMALL, head_dim=32, sliding_window=32),
    "olmo2": Olmo2Config(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),
    "qwen3moe": Qwen3MoeConfig(**SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True),
}
READABLE = ("llama", "qwen2", "qwen3")  # what transformers' own reader of these files reads whole


def folder_of(config, folder):
    torch.manual_seed(0)
    model = louder(AutoModelForCausalLM.from_config(config), 5.0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.2 * torch.randn_like(weight)
    save_folder(model, tiny_tokenizer(), folder)
    return folder


def llama_cpp_logits(path, tokens, lora=None):
    from llama_cpp import Llama

    model = Llama(
        str(path), logits_all=True, verbose=False, n_ctx=64, n_batch=64, n_threads=1, type_k=0, type_v=0, lora_path=lora and str(lora)
    )
    cut = model.tokenize(TEXT.encode(), add_bos=False, special=True)
    model.eval(tokens)
    found = torch.tensor(np.array(model.scores[: len(tokens)]))
    model.close()
    return found, cut


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_holds_every_number_where_llama_cpp_looks(name, tmp_path):
    folder = folder_of(CONFIGS[name], tmp_path)
    write_gguf(folder, folder / "model.gguf", name="tiny")
    reader = GGUFReader(folder / "model.gguf")
    architecture = {one: key for key, one in MODEL_ARCH_NAMES.items()}[reader.fields["general.architecture"].contents()]
    names = get_tensor_name_map(architecture, 2)
    found = {one.name: dequantize(one.data, one.tensor_type).reshape(*reversed(one.shape.tolist())) for one in reader.tensors}
    turn, expected = LlamaTensorProcessor()._reverse_permute_weights, load_file(folder / "model.safetensors")
    seen = set()
    for key, tensor in expected.items():
        head, _, tail = key.partition(".experts.")
        expert, _, part = tail.partition(".")
        there = names.get_name(f"{head}.experts.{part}" if tail else key, try_suffixes=(".weight", ".bias"))
        seen.add(there)
        value = found[there][int(expert)] if tail else found[there]
        if architecture is MODEL_ARCH.LLAMA and (".q_proj" in key or ".k_proj" in key):
            value = turn(value, 4, 4 if ".q_proj" in key else 2)
        assert np.array_equal(value, tensor.numpy()), key
    assert set(found) - seen == ({"rope_freqs.weight"} if name == "llama3" else set())
    kept = reader.fields[f"{MODEL_ARCH_NAMES[architecture]}.context_length"].contents()
    assert kept == (32 if name == "window" else 64)
    if name in READABLE:
        assert torch.equal(logits(folder, gguf_file="model.gguf"), logits(folder))
        read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        assert read(TEXT)["input_ids"] == tiny_tokenizer().encode(TEXT).ids
    if find_spec("llama_cpp"):
        tokens = tiny_tokenizer().encode(TEXT).ids
        theirs, cut = llama_cpp_logits(folder / "model.gguf", tokens)
        assert cut == tokens
        torch.testing.assert_close(theirs, logits(folder), atol=5e-3, rtol=0)  # it computes in half precision here and there


@pytest.mark.parametrize(("dtype", "error"), [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8)])
def test_a_gguf_file_of_a_folded_expert_in_any_dtype(dtype, error, experts, seed, store, tmp_path):
    export(experts["lora"], store, tmp_path / "dense", "transformers")
    export(experts["lora"], store, tmp_path / "out", "gguf", dtype.upper())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items():
        assert ((read[name] - tensor).abs() <= error * tensor.abs() + (1e-7 if error else 0)).all(), name


def test_an_adapter_for_llama_cpp_adds_what_the_folded_one_has_more(experts, seed, store, tmp_path):
    for form in ("gguf", "gguf-adapter"):
        export(experts["lora"], store, tmp_path / form, form)
    export(seed, store, tmp_path / "seed", "gguf")
    files = {name: tmp_path / name / "model.gguf" for name in ("seed", "gguf", "gguf-adapter")}
    found = {name: {one.name: np.array(one.data) for one in GGUFReader(path).tensors} for name, path in files.items()}
    for name, folded in found["gguf"].items():
        if f"{name}.lora_a" in found["gguf-adapter"]:
            a_RI, b_OR = (found["gguf-adapter"].pop(f"{name}.lora_{end}").astype(np.float64) for end in "ab")
            np.testing.assert_allclose(found["seed"][name] + b_OR @ a_RI / len(a_RI), folded, atol=1e-6)
        else:
            assert np.array_equal(folded, found["seed"][name])
    assert not found["gguf-adapter"]
    if find_spec("llama_cpp"):
        tokens = tiny_tokenizer().encode(TEXT).ids
        whole, over = llama_cpp_logits(files["gguf"], tokens)[0], llama_cpp_logits(files["seed"], tokens, files["gguf-adapter"])[0]
        torch.testing.assert_close(over, whole, atol=2e-2, rtol=0)
    with pytest.raises(BadInput, match="use_dora"):
        export(experts["dora"], store, tmp_path / "dora", "gguf-adapter")


def test_numbers_outside_a_dtype_are_seen(tmp_path):
    folder = folder_of(CONFIGS["llama"], tmp_path)
    spoil(folder, lambda found: found["model.layers.0.mlp.up_proj.weight"].fill_(1e5))
    with pytest.raises(Damaged, match="outside the range of F16"):
        write_gguf(folder, folder / "model.gguf", name="tiny", dtype="F16")


UNREACHED = {
    "opt models": OPTConfig(vocab_size=SHAPE.vocabulary, hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=1),
    "type 'yarn'": LlamaConfig(**SMALL, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "sum to one": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=False),
    "gelu": LlamaConfig(**SMALL, hidden_act="gelu"),
    "no place for": LlamaConfig(**SMALL, mlp_bias=True),
}


@pytest.mark.parametrize("complaint", UNREACHED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(complaint, tmp_path):
    folder = folder_of(UNREACHED[complaint], tmp_path)
    if complaint == "no place for":
        spoil(folder, lambda found: found.update({"model.layers.0.mlp.novel.weight": torch.zeros(2)}))
    with pytest.raises(BadInput, match=complaint):
        write_gguf(folder, folder / "model.gguf", name="tiny")


def byte_level(*first, use_regex=True):
    made = tiny_tokenizer()
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])
    return json.loads(made.to_str())


def test_how_text_is_cut_has_a_name():
    assert pre_tokenizer(json.loads(tiny_tokenizer().to_str())) == "gpt-2"
    assert pre_tokenizer(byte_level(pre_tokenizers.Digits(individual_digits=True))) == "smollm"
    for pattern, name in SPLITS.items():
        assert pre_tokenizer(byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), use_regex=False)) == name
    for other in (byte_level(pre_tokenizers.Digits()), byte_level(pre_tokenizers.Split(Regex("a"), "isolated"), use_regex=False)):
        with pytest.raises(BadInput, match="no name"):
            pre_tokenizer(other)


def sentencepiece(words):
    """BPE that falls back to bytes, as Llama 2 and Mistral have it."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator([words] * 3, trainers.BpeTrainer(vocab_size=SHAPE.vocabulary, special_tokens=special, show_progress=False))
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [one for one in spec["added_tokens"] if one["id"] < 3]
    return Tokenizer.from_str(json.dumps(spec))


def test_a_vocabulary_that_falls_back_to_bytes(tmp_path):
    folder = folder_of(LlamaConfig(**SMALL | {"bos_token_id": 1, "eos_token_id": 2}), tmp_path)
    words = sentencepiece("the cat sat on the mat and sailed over the sea again and again")
    words.save(str(folder / "tokenizer.json"))
    write_gguf(folder, folder / "model.gguf", name="tiny", begins=True)
    texts = ["the cat sat", "again — 海 the mat", "sea  over"]
    read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    fields = GGUFReader(folder / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents()
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [2, 3, 3, 6]
    for text in texts:
        assert read(text, add_special_tokens=False)["input_ids"] == words.encode(text).ids
    if find_spec("llama_cpp"):
        from llama_cpp import Llama

        model = Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
        assert [model.tokenize(text.encode(), add_bos=True) for text in texts] == [[1, *words.encode(text).ids] for text in texts]
        model.close()


def test_the_verb_says_what_it_wrote_and_leaves_nothing_of_a_failure(experts, store, tmp_path):
    def asked(*words):
        return CliRunner().invoke(app, ["export", *words, "--store", str(store.root), "--json"])

    done = asked(experts["lora"].digest, str(tmp_path / "out"), "--format", "gguf", "--dtype", "bf16")
    assert json.loads(done.stdout)["files"] == ["README.md", "elmwood.json", "model.gguf"]
    assert json.loads((tmp_path / "out" / "elmwood.json").read_bytes())["kind"] == "expert"
    for words in ((experts["full"].digest, str(tmp_path / "bad"), "--format", "peft"), (experts["full"].digest, str(tmp_path / "out"))):
        assert isinstance(asked(*words).exception, BadInput)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- without us

BARE = """
import sys
sys.path.append(sys.argv[1])
try:
    import elmwood
except ImportError:
    pass
else:
    sys.exit("elmwood is here: this is no bare environment")
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder, *base in json.loads(sys.argv[2]):
    model = AutoModelForCausalLM.from_pretrained(*base or [folder])
    words = AutoTokenizer.from_pretrained(*base or [folder])
    if base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    start = torch.tensor([[words.eos_token_id, *words(sys.argv[3], add_special_tokens=False)["input_ids"]]])
    made = model.eval().generate(input_ids=start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=24, pad_token_id=0)
    print(json.dumps(made[0, start.shape[1] :].tolist()))
"""


def test_plain_transformers_writes_the_same_text_without_us(seed, experts, merged, store, tmp_path):
    records = {"seed": seed, "full": experts["full"], "lora": experts["lora"], "merged": merged}
    records["mixture"] = mixture_of(seed, [experts["full"], experts["lora"]], store)
    for name, record in records.items():
        export(record, store, tmp_path / name)
    export(experts["lora"], store, tmp_path / "folded", "transformers")
    asked = [[name, "seed"] if name == "lora" else [name] for name in [*records, "folded"]]
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", BARE, sysconfig.get_path("purelib"), json.dumps(asked), "the cat"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, line in zip([*records, "lora"], done.stdout.splitlines(), strict=True):
        steps = generate(open_model(records[name], store), tokenizer(seed, store), "the cat", max_tokens=24, temperature=0)
        assert json.loads(line) == [step.token for step in steps], name
