"""Adapters summed for each prompt."""

import pytest
import torch
from tiny_models import lora_expert

from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput
from elmwood.merge.adapters import merge_adapters
from elmwood.merge.layer_weights import everywhere


@pytest.fixture(scope="module")
def adapters(house):
    place = {"partition": house.partition.digest}
    return [*house.experts[:2], lora_expert(house.seed, house.store, 5, domain=2, settings={"r": 2, "lora_alpha": 3}, **place)]


def test_weights_of_a_prompt_are_a_static_merge_of_its_own(house, adapters):
    lm = open_model(house.ensemble(adapters, mixing="weights", top_k=2, temperature=0.5), house.store)
    prompt, rest = house.tokens[:20], house.tokens[20:26]
    logp_V, text = lm.extend(prompt, lm.start())
    assert len(text.shares) == 2
    members = {expert.digest: everywhere(w) for expert, w in zip(lm.experts.experts, text.weight_C[:-1], strict=True) if w}
    (merged,) = merge_adapters(house.seed, members, [("concat", {})], house.store)
    static = open_model(merged, house.store)
    expected_V, other = static.extend(prompt, static.start())
    for token in rest:
        torch.testing.assert_close(logp_V, expected_V, atol=1e-5, rtol=1e-5)
        (logp_V, text), (expected_V, other) = lm.extend([token], text), static.extend([token], other)
    assert text.shares == lm.extend(prompt, lm.start())[1].shares, "the weights are the prompt's, whatever comes after it"


@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_k": 3, "temperature": 1.0, "seed_distance": 0.4}, {"top_k": 1, "block": 7}])
def test_scores_are_what_each_block_s_prompt_would_say(house, adapters, fields):
    lm = open_model(house.ensemble(adapters, mixing="weights", **({"block": 16} | fields)), house.store)
    rows = torch.tensor([house.tokens[:40], house.tokens[:20] * 2])
    loglik_BT = lm.score(rows)
    for row, loglik_T in zip(rows.tolist(), loglik_BT, strict=True):
        for begin in range(0, len(row), lm.block):
            logp_V, text = lm.extend(row[: max(1, begin)], lm.start())
            for t in range(max(1, begin), min(begin + lm.block, len(row))):
                torch.testing.assert_close(logp_V[row[t]], loglik_T[t], atol=1e-5, rtol=1e-5)
                logp_V, text = lm.extend([row[t]], text)


def test_weights_mixed_of_copies_are_the_expert_and_only_adapters_are_mixed(house, adapters):
    alone = open_model(house.experts[0], house.store)
    lm = open_model(house.ensemble(house.copies(house.experts[0]), mixing="weights", top_k=3, temperature=1.0), house.store)
    torch.testing.assert_close(lm.score([house.tokens]), alone.score([house.tokens]), atol=1e-5, rtol=1e-5)
    lone = open_model(house.ensemble(house.copies(house.experts[0]), mixing="weights", top_k=1, seed_distance=0.0), house.store)
    torch.testing.assert_close(lone.score([house.tokens]), open_model(house.seed, house.store).score([house.tokens]))
    with pytest.raises(BadInput, match="only LoRA adapters"):
        open_model(house.ensemble(mixing="weights"), house.store)
    for router in ("posterior", "live"):
        with pytest.raises(BadInput, match="runs experts to weigh them"):
            open_model(house.ensemble(adapters, mixing="weights", router=router), house.store)
    assert house.ensemble(mixing="outputs").digest == house.ensemble().digest
