"""Exported folders open where people run models, without us, and give what was in the store."""

import json
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from gguf import GGUFReader
from llama_server import Llama
from peft import PeftModel
from safetensors.torch import load_file
from tiny_merges import SMALL, TEXT, logits, spoil
from tiny_models import config_seed, full_expert, lora_expert, louder, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen3Config,
)

from elmwood.corpus.build import build
from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, BadSeed, Damaged
from elmwood.lm.files import seed_folder, tokenizer
from elmwood.lm.load import import_seed, load_model, save_folder
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.export.folder import check_checkpoint, export
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.moe import shards
from elmwood.merge.moe.build import Mixing, mix, order_of
from elmwood.merge.moe.gates import random_rows
from elmwood.merge.states import seed_places
from elmwood.records import Forest, Gates, Recipe
from elmwood.study import exporting
from elmwood.train.tasks import train


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
    assert Llama(tmp_path / "gguf" / "model.gguf").differs(tiny_tokenizer().encode(TEXT).ids, logits(tmp_path / "out")) < 1e-4


def test_a_low_rank_mixture_leaves_as_a_standard_one(seed, store, tmp_path):
    record = mixture_of(seed, [lora_expert(seed, store, n) for n in (5, 6)], store, "low-rank")
    export(record, store, tmp_path / "out")
    torch.testing.assert_close(read_elsewhere(tmp_path / "out"), said(record, store)[1:], atol=2e-5, rtol=2e-5)


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPOKEN = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "a", "eos_token": "b", "pad_token": "c"}
ENDS = {"eos_token_id": [0, 66], "temperature": 0.6, "do_sample": True}


@pytest.fixture(scope="module")
def chatty(store, tmp_path_factory):
    """A seed in several files with all that belongs to it, and what grows from it."""
    folder = tmp_path_factory.mktemp("chatty")
    model = louder(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)))
    save_folder(model, tiny_tokenizer(), folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "additional_chat_templates").mkdir()
    for name, text in (("chat_template", TEMPLATE), ("additional_chat_templates/tools", TEMPLATE + "tools")):
        (folder / f"{name}.jinja").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(SPOKEN))
    (folder / "generation_config.json").write_text(json.dumps(ENDS))
    (folder / "LICENSE").write_text("any")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{TEXT} {n}"}) + "\n" for n in range(20)))
    seed = import_seed(str(folder), store, name="chatty", separator=0)
    full = train(seed, build([str(folder / "text.jsonl")], store).train, Recipe(method="full", steps=1, batch=1, length=16), store)
    lora = lora_expert(seed, store, 2)
    merged = merge(seed, {one.digest: everywhere(1.0) for one in (full, lora)}, [Answer("average", {})], store)[0]
    return {"seed": seed, "full": full, "lora": lora, "merged": merged, "mixture": mixture_of(seed, [full, lora], store),
            "low-rank": mixture_of(seed, [lora, lora_expert(seed, store, 3)], store, "low-rank")}  # fmt: skip


@pytest.mark.parametrize("name", ["seed", "full", "lora", "merged", "mixture", "low-rank"])
def test_what_belongs_to_a_seed_leaves_with_all_that_grows_from_it(name, chatty, store, tmp_path):
    export(chatty[name], store, tmp_path / "out", "transformers")
    words, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (words.bos_token, words.eos_token, words.pad_token) == ("a", "b", "c")
    assert words.chat_template == {"default": TEMPLATE, "tools": TEMPLATE + "tools"}
    assert {name: getattr(model.generation_config, name) for name in ENDS} == ENDS
    assert (tmp_path / "out" / "LICENSE").read_text() == "any"
    torch.testing.assert_close(read_elsewhere(tmp_path / "out"), said(chatty[name], store)[1:], atol=2e-5, rtol=2e-5)
    if name in ("full", "merged"):
        export(chatty[name], store, tmp_path / "gguf", "gguf")
        fields = {name: one.contents() for name, one in GGUFReader(tmp_path / "gguf" / "model.gguf").fields.items()}
        ids = [tiny_tokenizer().token_to_id(token) for token in "abc"]
        assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == ids
        assert fields["tokenizer.chat_template"] == TEMPLATE
        assert Llama(tmp_path / "gguf" / "model.gguf").differs(tiny_tokenizer().encode(TEXT).ids, logits(tmp_path / "out")) < 1e-4


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


SPOILT = {
    "NaN or Inf": (Damaged, lambda folder: spoil(folder, lambda found: found["model.norm.weight"].fill_(torch.inf))),
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


def test_an_export_has_its_record_beside_it_and_leaves_nothing_of_a_failure(experts, store, tmp_path):
    out = exporting.export(experts["lora"], tmp_path / "out", format="gguf", dtype="bf16", store=store)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "elmwood.json", "model.gguf"]
    assert json.loads((out / "elmwood.json").read_bytes())["kind"] == "expert"
    for folder, how in ((tmp_path / "bad", {"format": "peft"}), (out, {})):
        with pytest.raises(BadInput):
            exporting.export(experts["full"], folder, **how, store=store)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
