"""What tests of merges share: members, tensors as float64, deltas by a formula of their own."""

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, louder, tiny_tokenizer
from transformers import AutoModelForCausalLM

from elmwood.lm.load import save_folder
from elmwood.merge.layer_weights import everywhere


def fitting(method, experts):
    """As many experts as a rule takes."""
    return experts[2:4] if method in ("slerp", "nuslerp") else experts


def equally(experts, weight=1.0):
    return {expert.digest: everywhere(weight) for expert in experts}


def weights_of(record, store) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in load_file(store.get(record.files["model.safetensors"])).items()}


def deltas_of(seed, experts, store) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The seed's tensors and each expert's deltas in float64; an adapter's by its own factors."""
    base = weights_of(seed, store)
    found = []
    for expert in sorted(experts, key=lambda one: one.digest):
        if expert.recipe.method == "full":
            mine = weights_of(expert, store)
            found.append({name: mine[name] - base[name] for name in base})
            continue
        factors = {n: v.double().numpy() for n, v in load_file(store.get(expert.files["adapter_model.safetensors"])).items()}
        delta = {name: np.zeros_like(value) for name, value in base.items()}
        for key, a in factors.items():
            if ".lora_A." in key:
                name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                delta[name] = factors[key.replace("lora_A", "lora_B")] @ a * 2  # alpha 8, rank 4
        found.append(delta)
    return base, found


TEXT = "the cat sat — naïve café 海 and 1234 猫 don't  stop\n\n x"


SMALL = {
    "vocab_size": SHAPE.vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip


def folder_of(config, folder):
    """A transformers folder of any architecture, with random weights, biases and norms."""
    torch.manual_seed(0)
    model = louder(AutoModelForCausalLM.from_config(config), 5.0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.2 * torch.randn_like(weight)
    save_folder(model, tiny_tokenizer(), folder)
    return folder


def logits(folder, **settings):
    tokens_BT = torch.tensor([tiny_tokenizer().encode(TEXT).ids])
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)(tokens_BT).logits[0]


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
