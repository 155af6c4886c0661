"""Products by oneDNN give what torch gives, with their gradients, and are left alone where they do not apply."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from elmwood.lm import products
from elmwood.lm.load import new_model
from elmwood.lm.products import FEWEST, hasten, linear, plain_head
from tests.tiny_models import SHAPE


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    """Intel's are left to MKL."""
    monkeypatch.setattr(products, "is_mkls_own", lambda: False)
    products._here.cache_clear()
    yield
    products._here.cache_clear()


def grown(product: Callable[..., torch.Tensor], *parts: torch.Tensor | None) -> list[torch.Tensor]:
    """y, and the gradients of the sum of its sines."""
    leaves = [one.detach().clone().requires_grad_() for one in parts if one is not None]
    y = product(*leaves)
    y.sin().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [(FEWEST,), (3, 50), (2, 5, 40)])
def test_products_and_gradients_are_torchs_within_rounding(rows, with_bias):
    generator = torch.Generator().manual_seed(len(rows))
    x, weight = torch.randn(*rows, 48, generator=generator), torch.randn(70, 48, generator=generator) / 7
    bias = torch.randn(70, generator=generator) if with_bias else None
    fast = grown(linear, x, weight, bias)
    for mine, again, plain in zip(fast, grown(linear, x, weight, bias), grown(functional.linear, x, weight, bias), strict=True):
        torch.testing.assert_close(mine, plain, atol=2e-5, rtol=1e-5)
        assert torch.equal(mine, again), "the same inputs give the same bits"
    turned = x.transpose(0, -2)  # rows that do not stand one after another
    torch.testing.assert_close(linear(turned, weight, bias), functional.linear(turned, weight, bias), atol=1e-5, rtol=1e-5)


def test_few_rows_other_types_and_autocast_are_left_to_torch():
    x, weight = torch.randn(64, 32), torch.randn(40, 32)
    for some, other in ((x[: FEWEST - 1], weight), (x.double(), weight.double()), (x.bfloat16(), weight.bfloat16())):
        assert torch.equal(linear(some, other), functional.linear(some, other))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        assert torch.equal(linear(x, weight), functional.linear(x, weight))


def test_a_copied_model_multiplies_by_its_own_weights():
    layer = hasten(torch.nn.Sequential(torch.nn.Linear(32, 40)))
    copied, x = copy.deepcopy(layer), torch.randn(64, 32)
    with torch.no_grad():
        copied[0].weight.zero_()
        copied[0].bias.zero_()
        assert not copied(x).any()
        assert layer(x).any()
        assert type(layer[0]) is torch.nn.Linear


def test_a_head_that_does_more_than_multiply_is_not_plain():
    llama = new_model(SHAPE, 0)
    assert plain_head(llama) is llama.get_output_embeddings().weight
    biased = copy.deepcopy(llama)
    biased.lm_head = torch.nn.Linear(SHAPE.width, SHAPE.vocabulary)
    assert plain_head(biased) is None
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        max_position_embeddings=64,
    )  # fmt: skip
    assert plain_head(Gemma2ForCausalLM(config).eval()) is None, "its logits are capped"


def test_gated_feed_forwards_say_what_they_said_and_others_are_left_alone():
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    plain, x = LlamaForCausalLM(config).eval(), torch.randn(2, 40, 32)
    fast = hasten(copy.deepcopy(plain))
    mlp, copied = fast.model.layers[0].mlp, copy.deepcopy(fast).model.layers[0].mlp
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), plain.model.layers[0].mlp(x), atol=1e-6, rtol=1e-5)
        copied.up_proj.weight.zero_()
        assert not copied(x).any()
        assert mlp(x).any()
    mlp(x).sum().backward()
    assert mlp.gate_proj.weight.grad.any()
    config.hidden_act = "gelu"
    assert "forward" not in vars(hasten(LlamaForCausalLM(config)).model.layers[0].mlp)
