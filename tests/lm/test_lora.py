"""A bank of LoRA adapters on one base: any row of a batch may use any adapter."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_configs import CONFIGS, some_tokens
from tiny_models import config_seed, save_adapter, tiny_seed

from elmwood.errors import BadInput
from elmwood.lm.adapters import lora
from elmwood.lm.adapters.lora import Adapter, Bank
from elmwood.lm.load import load_model


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
    folds, folded = lora.Adapted.folds, []
    monkeypatch.setattr(lora.Adapted, "folds", lambda *given: folded.append(folds(*given)) or folded[-1])
    bank = Bank(model, [Adapter(folder / "adapter_config.json", folder / "adapter_model.safetensors") for folder in folders])
    expected = [*alone, plain]
    for rows in ((0, 1, 2, 3, 0), (2, 2, 1, 1, 3), (3, 3, 3, 3, 3), (2,), (1,), (0, 1, 2, 3, 1), (3,)):
        bank.select(rows)
        wanted = torch.stack([expected[rows[place % len(rows)]][place] for place in range(5)])
        torch.testing.assert_close(model(tokens_BT).logits, wanted, atol=1e-5, rtol=1e-5)
    assert folded
    assert all(folded), "one adapter for 55 tokens is added to the weights"


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
