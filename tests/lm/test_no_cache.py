"""Text that grows, read by models of every kind of memory, against plain transformers on the whole text."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_configs import CONFIGS, some_tokens
from tiny_models import SHAPE, config_seed, lora_expert
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    CTRLConfig,
    FalconH1Config,
    Lfm2Config,
    MambaConfig,
    MiniMaxConfig,
    OpenAIGPTConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from elmwood.lm.experts import BASE, Experts
from elmwood.lm.files import seed_folder
from elmwood.lm.load import load_model

WIDE = {"vocab_size": SHAPE.vocabulary, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = WIDE | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
NAMED = {"vocab_size": SHAPE.vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
# no cache, a state, a state beside keys and values, windows of convolution, older forms of keys and values
OTHERS = {
    "gpt1": OpenAIGPTConfig(**NAMED),
    "ctrl": CTRLConfig(**NAMED, dff=48),
    "rwkv": RwkvConfig(**WIDE, attention_hidden_size=32, context_length=64),
    "mamba": MambaConfig(**WIDE, state_size=8),
    "recurrent_gemma": RecurrentGemmaConfig(**HEADS | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=16, head_dim=8),
    "falcon_h1": FalconH1Config(**HEADS, mamba_d_ssm=32, head_dim=8, **MAMBA2 | {"mamba_n_heads": 4}),
    "bamba": BambaConfig(**HEADS, attn_layer_indices=[1], **MAMBA2),
    "lfm2": Lfm2Config(**HEADS, layer_types=["conv", "full_attention"], block_multiple_of=8),
    "minimax": MiniMaxConfig(**HEADS, num_local_experts=2, layer_types=["linear_attention", "full_attention"], block_size=16, head_dim=8),
}
PIECES = [(0, 9), (9, 10), (10, 30), (30, 31), (31, 40)]


@pytest.mark.parametrize("kind", OTHERS)
def test_text_that_grows_is_read_right_whatever_a_model_remembers(kind, store):
    seed, row_1T = config_seed(OTHERS[kind], store), some_tokens(1, 40)
    plain = AutoModelForCausalLM.from_pretrained(seed_folder(seed, store), dtype=torch.float32).eval()
    experts = Experts(seed, [], store, "cpu")
    text = experts.start()
    for first, last in PIECES:
        logp_1V, _ = experts.extend([0], row_1T[0, first:last].tolist(), text)
        with torch.no_grad():
            wanted_V = plain(input_ids=row_1T[:, :last], use_cache=False).logits[0, -1].log_softmax(-1)
        assert (logp_1V[0] - wanted_V).abs().max() <= 1e-4, (first, last)


def test_candidates_of_a_model_without_a_cache_read_what_they_missed(store):
    seed, row_T = config_seed(OTHERS["lfm2"], store), some_tokens(40)
    expert = lora_expert(seed, store, 1)
    experts = Experts(seed, [expert], store, "cpu")
    scored_ET = torch.cat([experts.score(e, row_T[None]) for e in range(2)]).double()
    text, found_E = experts.start(), [[], []]
    for active, first, last in (([0, 1], 0, 7), ([1], 7, 20), ([1], 20, 21), ([0, 1], 21, 40)):
        _, news = experts.follow(active, row_T[first:last].tolist(), text)
        for e, one in zip(active, news, strict=True):
            assert one.first == len(found_E[e])
            found_E[e] += one.loglik_U.tolist()
    assert (torch.tensor(found_E) - scored_ET).abs().max() <= 1e-4
    assert not text.caches[BASE].layers


# layers of which PEFT's merged weights say the same as its live ones, and an RWKV whose later blocks transformers would halve
DEEP = RwkvConfig(**WIDE | {"num_hidden_layers": 3}, attention_hidden_size=32, context_length=64, rescale_every=1)
ADAPTED = {
    "rwkv": (DEEP, "all-linear"),
    "mamba": (OTHERS["mamba"], ["in_proj", "x_proj"]),
    "recurrent_gemma": (OTHERS["recurrent_gemma"], "all-linear"),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_a_bank_over_models_of_every_kind_says_what_peft_s_merged_weights_say(kind, store):
    config, targets = ADAPTED[kind]
    seed, row_1T = config_seed(config, store), some_tokens(1, 20)
    expert = lora_expert(seed, store, 1, settings={"target_modules": targets})
    plain = AutoModelForCausalLM.from_pretrained(seed_folder(seed, store), dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, store.folder(expert.files)).merge_and_unload().eval()
    with torch.no_grad():
        wanted_1TV = merged(input_ids=row_1T, use_cache=False).logits.log_softmax(-1)
    wanted_1T = wanted_1TV[:, :-1].gather(2, row_1T[:, 1:, None]).squeeze(2)
    assert (Experts(seed, [expert], store, "cpu").score(0, row_1T)[:, 1:] - wanted_1T).abs().max() <= 1e-4
    alone = load_model(seed, store, expert, "cpu")
    with torch.no_grad():
        assert (alone(input_ids=row_1T, use_cache=False).logits.log_softmax(-1) - wanted_1TV).abs().max() <= 1e-4


def test_an_rwkv_that_was_read_has_the_weights_of_its_files(store):
    seed = config_seed(DEEP, store)
    model = load_model(seed, store, device="cpu")
    with torch.no_grad():
        model(input_ids=some_tokens(1, 5))
    stored = load_file(store.get(seed.files["model.safetensors"]))
    assert all(torch.equal(weight, stored[name]) for name, weight in model.named_parameters())
    assert model.config.rescale_every == 1  # as the checkpoint says, for others


@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_models_keep_what_they_have_read(kind, store):
    experts = Experts(config_seed(CONFIGS[kind], store), [], store, "cpu")
    _, text = experts.extend([0], [1, 2, 3], experts.start())
    assert len(text.caches[BASE].layers) == 2
