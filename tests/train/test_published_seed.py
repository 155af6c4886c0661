"""A checkpoint with the shape of facebook/opt-6.7b as it is published: names of the trunk, float16, in shards, the head tied."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_training import SHAPE
from transformers import AutoModelForCausalLM, OPTConfig

from elmwood.lm.files import seed_folder, tokenizer
from elmwood.lm.load import import_seed, load_model, save_folder
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.export.folder import export
from elmwood.merge.layer_weights import everywhere
from elmwood.records import Recipe
from elmwood.train.tasks import train

SMALL = {"vocab_size": SHAPE.vocabulary, "hidden_size": 32, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
FULL = Recipe(steps=3, batch=4, length=32, learning_rate=1e-3)
LORA = Recipe(method="lora", steps=3, batch=4, length=32, learning_rate=1e-2, rank=4)


@pytest.fixture(scope="module")
def opt(place, tmp_path_factory):
    from elmwood.records import Seed
    from elmwood.store import Store

    store, folder = Store(place), tmp_path_factory.mktemp("opt")
    words = tokenizer(store.load("seed", Seed), store)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OPTConfig(**SMALL, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1))
    save_folder(model.half(), words, folder)
    tensors = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, some in shards.items():
        save_file({name: tensors[name] for name in some}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {name: file for file, some in shards.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def says(model):
    tokens_BT = torch.randint(0, SHAPE.vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(tokens_BT).logits.log_softmax(-1)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_its_experts_train_merge_and_leave_as_plain_checkpoints(opt, case, tmp_path):
    store, corpus, _ = case
    seed = import_seed(str(opt), store)
    assert {value.dtype for value in load_file(seed_folder(seed, store) / "model.safetensors").values()} == {torch.float16}
    torch.testing.assert_close(says(load_model(seed, store, device="cpu")), says(plain(opt)), atol=1e-6, rtol=0)
    full, low = (train(seed, corpus.train, recipe, store) for recipe in (FULL, LORA))
    merged = merge(seed, {one.digest: everywhere(1.0) for one in (full, low)}, [Answer("average", {})], store)[0]
    for name, record in {"seed": seed, "full": full, "low": low, "merged": merged}.items():
        export(record, store, tmp_path / name)
    there = {
        "full": plain(tmp_path / "full"), "merged": plain(tmp_path / "merged"),
        "low": PeftModel.from_pretrained(plain(tmp_path / "seed"), tmp_path / "low"),
    }  # fmt: skip
    base = says(plain(opt))
    for name, record in {"full": full, "low": low, "merged": merged}.items():
        live = says(load_model(seed, store, record, "cpu"))
        assert not torch.allclose(live, base, atol=1e-4)
        torch.testing.assert_close(says(there[name]), live, atol=1e-5, rtol=0)
    mean = plain(tmp_path / "full")
    folded = there["low"].merge_and_unload()
    for (name, mine), (other, its) in zip(mean.named_parameters(), folded.named_parameters(), strict=True):
        assert name == other
        mine.data = ((mine.data + its.data) / 2).half().float()  # a merge is stored in the seed's dtype
    torch.testing.assert_close(says(there["merged"]), says(mean), atol=1e-3, rtol=0)
