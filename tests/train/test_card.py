"""What a card computes differently, held here against the plain way; what needs a card is measured by `benches/gpu.py`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import LLAMA, LORA, MODELS, packed_of, tiny
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from elmwood.records import Recipe
from elmwood.train import adapter, loop, together
from elmwood.train.adapter import add_adapter, round_at_random
from elmwood.train.card import precision
from elmwood.train.card.attention import can_choose, find_cuts, within
from elmwood.train.card.compiled import compile_layers, layers_of, narrow_residuals, pays
from elmwood.train.card.path import fast_path
from elmwood.train.card.peak import PEAKS, find_peak, flops_per_token
from elmwood.train.data import UNSCORED, batches
from elmwood.train.loss import Abilities, ChunkedLoss, base_model, loss, rows_of_chunk, score_at_once, score_logits

ROWS = Recipe(steps=1, batch=2, length=20)
MASK, DOCUMENTS = Abilities("mask", True), Abilities("documents", True)


def given_batch():
    packed = packed_of(*[7] * 8)
    batch = next(batches(packed._replace(tokens=packed.tokens % 64), ROWS))
    return [torch.from_numpy(part) for part in batch], torch.from_numpy(find_cuts(batch.positions_BL))


def trained(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt"])
def test_attention_by_document_is_attention_with_a_mask(kind):
    model = tiny(kind, **MODELS[kind])
    given_, cut_S = given_batch()
    plain = loss(model, MASK, *given_)
    with fast_path(model, ROWS, DOCUMENTS) as able:
        ours = loss(model, able, *given_, cut_S)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"
    for one, two in zip(torch.autograd.grad(ours, trained(model)), torch.autograd.grad(plain, trained(model)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


class Attended(TorchFunctionMode):
    """Collects the dtypes that torch's attention is given and gives."""

    def __init__(self):
        self.dtypes = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function is scaled_dot_product_attention:
            self.dtypes |= {args[0].dtype, found.dtype}
        return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_cpu_that_multiplies_in_bf16_attends_in_float32(kind, masked, monkeypatch):
    """But for narrow models, which are faster in float32 throughout, and for long rows."""
    model, (tokens_BL, targets_BL, positions_BL), _ = tiny(kind, **MODELS[kind]), *given_batch()
    rows, device = (tokens_BL, targets_BL, positions_BL if masked else None), torch.device("cpu")
    plain = loss(model, MASK, *rows)
    monkeypatch.setattr(precision, "uses_bf16", lambda device: True)
    assert not precision.autocasts(model, device)
    monkeypatch.setattr(precision, "LEAST_WIDTH", 1)
    assert precision.autocasts(model, device)
    with fast_path(model, ROWS, MASK), Attended() as attended:
        assert torch.equal(loss(model, MASK, *rows), plain)
        with precision.autocast(model, device):
            torch.testing.assert_close(loss(model, MASK, *rows), plain, rtol=0.02, atol=0.02)
    assert attended.dtypes == {torch.float32}
    with fast_path(model, ROWS.model_copy(update={"length": 512}), MASK), Attended() as attended, precision.autocast(model, device):
        loss(model, MASK, *rows)
    assert torch.bfloat16 in attended.dtypes
    assert model.config._attn_implementation == "sdpa"


def test_models_with_their_own_attention_keep_it():
    assert not any(can_choose(tiny(kind, **MODELS[kind])) for kind in ("bloom", "gemma2"))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_a_window_of_a_document_is_that_of_the_document_alone(sizes, window):
    query_NHD, key_NKD = torch.randn(sum(sizes), 4, 8), torch.randn(sum(sizes), 2, 8)
    cut_S = torch.tensor([0, *sizes]).cumsum(0).int()
    found = within(query_NHD, key_NKD, key_NKD, cut_S, max(sizes), window=window)
    place = 0
    for size in sizes:
        query_THD, key_THD = query_NHD[place : place + size], key_NKD[place : place + size].repeat_interleave(2, 1)
        score_HTT = torch.einsum("thd,shd->hts", query_THD, key_THD) / 8**0.5
        far_TT = torch.arange(size)[:, None] - torch.arange(size)
        probability_HTT = score_HTT.masked_fill((far_TT < 0) | (far_TT >= window), -torch.inf).softmax(-1)
        torch.testing.assert_close(
            found[place : place + size], torch.einsum("hts,shd->thd", probability_HTT, key_THD), rtol=1e-4, atol=1e-5
        )
        place += size


def test_both_scores_of_logits_agree():
    logit_CV, target_C1, share_C1 = torch.randn(7, 30) * 4, torch.randint(0, 30, (7, 1)), torch.rand(7, 1)
    for one, two in zip(score_logits(logit_CV.clone(), target_C1, share_C1), score_at_once(logit_CV, target_C1, share_C1), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_groups_of_positions_have_means_of_their_own():
    hidden, head, target = torch.randn(3 * 700, 8, requires_grad=True), torch.randn(3000, 8), torch.randint(0, 3000, (3 * 700,))
    target[torch.rand(len(target)) < 0.3] = UNSCORED
    weight_G = torch.tensor([1.0, 3.0, 0.5])
    ours = ChunkedLoss.apply(hidden * 1, head, target, 3)
    parts = zip((hidden @ head.t()).chunk(3), target.chunk(3), strict=True)
    theirs = torch.stack([cross_entropy(*part, ignore_index=UNSCORED) for part in parts])
    torch.testing.assert_close(ours, theirs)
    mine, its = (torch.autograd.grad((one * weight_G).sum(), hidden)[0] for one in (ours, theirs))
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-7)


def test_a_gpu_has_its_logits_in_few_parts():
    assert rows_of_chunk(65536, 49152, "gpu") == 2048
    assert rows_of_chunk(2048, 50272, "gpu") == 256
    assert rows_of_chunk(65536, 8192, "cpu") == 128


TRACED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it


@TRACED
@pytest.mark.parametrize("folded", [True, False])
def test_compiled_adapters_are_those_of_the_fused_function(folded, monkeypatch):
    """Traced, without the code generator, which takes a minute here. Layers share one program: none is traced twice."""
    monkeypatch.setattr(adapter, "FOLDED", 1000 if folded else 0)
    torch.manual_seed(0)
    model = add_adapter(tiny("llama", **LLAMA).to(torch.bfloat16), LORA, "base")
    with torch.no_grad():
        for weight in trained(model):
            weight.data = weight.float() + torch.randn_like(weight.float()) * 0.05
    given_, _ = given_batch()
    plain = loss(model, MASK, *given_)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compile_layers(base_model(model), "aot_eager"):
        ours = loss(model, MASK, *given_)
        mine = torch.autograd.grad(ours, trained(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of a layer, of the last norm
    assert not torch._dynamo.utils.counters["graph_break"]
    assert "forward" not in vars(layers_of(base_model(model))[0])
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)  # bf16 has three digits
    for one, two in zip(mine, torch.autograd.grad(plain, trained(model)), strict=True):
        assert (one - two).norm() < 0.05 * two.norm()


@TRACED
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")  # they are views of flat memory
def test_compiled_stacks_add_into_the_same_gradients():
    recipe = LORA.model_copy(update={"length": 20, "batch": 2})
    model = add_adapter(tiny("llama", **LLAMA), recipe, "base")
    stack = together.Stack(model, 3)
    with torch.no_grad():
        stack.flat_EP += torch.randn_like(stack.flat_EP) * 0.1
    tokens, targets = torch.randint(0, 64, (6, 16)), torch.randint(0, 64, (6, 16))
    found = []
    for compiled in (False, True):
        stack.flat_EP.grad.zero_()
        with compile_layers(base_model(model), "aot_eager") if compiled else fast_path(model, recipe, MASK):
            values_E = together.expert_losses(model, MASK, tokens, targets, None, 3)
            values_E.sum().backward()
        found.append((values_E.detach(), stack.flat_EP.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_rounding_at_random_is_right_on_average_and_keeps_what_is_bf16():
    value = torch.randn(100, 100)
    mean = torch.stack([round_at_random(value).float() for _ in range(200)]).mean(0)
    one = value.abs() * 2**-8  # a unit in the last place, at most
    assert ((mean - value).abs() < 0.3 * one).all()  # a chance of a half has a standard error of 0.035 units after 200 times
    assert abs(((mean - value) / one).mean()) < 2e-3
    assert torch.equal(round_at_random(value.bfloat16().float()), value.bfloat16())


def test_residuals_are_narrow_under_autocast():
    model, seen = tiny("llama", **LLAMA), []
    layers_of(model)[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    tokens = torch.arange(8)[None]
    with narrow_residuals(model):
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens)
        model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_layers_are_compiled_where_a_run_is_long_and_on_a_card():
    model, long = tiny("llama", **LLAMA), Recipe(steps=10**9, length=1024)
    assert not pays(model, long, torch.device("cpu"))
    assert not pays(model, long.model_copy(update={"steps": 1}), torch.device("cuda"))
    assert not pays(model, long.model_copy(update={"method": "qlora"}), torch.device("cuda"))


def test_the_peak_is_of_known_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert find_peak(torch.device("cuda")) == PEAKS["H100"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another")
    assert find_peak(torch.device("cuda")) is None
    assert find_peak(torch.device("cpu")) > 0


def test_operations_of_a_token_are_counted():
    model = tiny("llama", **LLAMA)
    layer = 4 * 32 * 32 + 3 * 32 * 48
    assert flops_per_token(model, 20) == 6 * (2 * layer + 64 * 32) + 12 * 2 * 32 * 20


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_share_of_the_layers_is_computed_again(share):
    recipe = ROWS.model_copy(update={"checkpointing": True, "checkpointed": share})
    model = tiny("llama", **LLAMA).train()
    given_, _ = given_batch()
    plain = loss(model, MASK, *given_)
    with loop.recompute_activations(model, recipe):
        assert [layer.gradient_checkpointing for layer in layers_of(model)] == [True, share == 1]
        ours = loss(model, MASK, *given_)
        mine = torch.autograd.grad(ours, trained(model))
    assert torch.equal(ours, plain)
    assert all(map(torch.equal, mine, torch.autograd.grad(plain, trained(model))))
