"""Adapters trained elsewhere become experts, or are refused with the reason."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, save_adapter

from elmwood.errors import BadInput
from elmwood.lm.experts import Experts
from elmwood.lm.load import load_model
from elmwood.train.adopt import import_adapter


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
    tokens_BT = torch.randint(SHAPE.vocabulary, (2, 12), generator=torch.Generator().manual_seed(14))
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
