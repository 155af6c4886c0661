"""Many experts of one seed: scoring and reading on agree with each expert's own model."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_configs import CONFIGS, some_tokens
from tiny_models import config_seed, full_expert, lora_expert, tiny_seed

from elmwood.ensemble.one import OneLM
from elmwood.errors import BadInput, ForeignExpert
from elmwood.lm import cache
from elmwood.lm.experts import TOKENS, Experts
from elmwood.lm.load import check_seed, load_model


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
    monkeypatch.setitem(TOKENS, "cpu", 2 * 12)
    torch.testing.assert_close(experts.score(0, tokens_BT), whole, atol=1e-5, rtol=1e-5)
    late = experts.score(0, tokens_BT, 5)
    assert not late[:, :5].any()
    torch.testing.assert_close(late[:, 5:], whole[:, 5:], atol=1e-5, rtol=1e-5)


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
