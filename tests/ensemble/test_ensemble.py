"""Ensembles: the laws of mixing, the door to every model, and text."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import SHAPE, lora_expert

from elmwood.corpus.build import documents
from elmwood.corpus.tokens import Windows
from elmwood.domains.dense import Model
from elmwood.domains.distances import nearest_place, token_distances
from elmwood.domains.partition import assign, centroids, fit_embedder, partition, split
from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import EnsembleLM, open_model
from elmwood.errors import ForeignExpert, UnknownName
from elmwood.lm.hidden_states import open_hidden_states
from elmwood.lm.load import load_model
from elmwood.records import Corpus, Ensemble, Forest
from elmwood.study.quality.evaluation import evaluate

SETTINGS = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 2, "seed_distance": 0.4},
    {"top_k": 4, "seed_distance": 0.9, "router": "cbtm"},
    {"top_k": 3, "temperature": 1.0},
    {"top_k": 2, "router": "sparse", "seed_distance": 1.9},
    {"top_k": 1, "router": "live", "memory": 0.5, "seed_distance": 0.9},
    {"top_k": 2, "router": "live", "temperature": 0.5, "decay": 0.9},
    {"top_k": 1, "router": "live", "temperature": 0.5, "memory": 1.0, "decay": 1.0},
    {"top_k": 2, "router": "posterior", "temperature": 1.0},
    {"top_k": 4, "router": "posterior", "temperature": 4.0, "seed_distance": 0.5},
    {"top_k": 1, "router": "live", "temperature": 0.5, "every": 16, "shortlist": 2, "margin": 0.02},
    {"top_k": 2, "router": "live", "memory": 2.0, "every": 4, "sure": 0.6, "seed_distance": 0.9},
    {"top_k": 2, "temperature": 0.05, "every": 8, "sure": 0.8, "margin": 0.1, "far": 1.3, "seed_distance": 0.9},
]


@pytest.mark.parametrize("fields", SETTINGS)
def test_reading_on_equals_scoring(fields, house, monkeypatch):
    monkeypatch.setattr("elmwood.domains.route.EARLY", 4)  # texts are short here
    lm = open_model(house.ensemble(**fields), house.store)
    assert lm.score([[0], [0]]).tolist() == [[0], [0]]
    tokens_T, text, met = house.tokens, lm.start(), set()
    loglik_T = lm.score([tokens_T])[0]
    for t, token in enumerate(tokens_T[:-1]):
        logp_V, text = lm.extend([token], text)
        torch.testing.assert_close(logp_V[tokens_T[t + 1]], loglik_T[t + 1], atol=1e-5, rtol=1e-5)
        assert len(text.shares) <= fields["top_k"] + (fields.get("router") == "live" and "seed_distance" in fields)
        assert sum(text.shares.values()) == pytest.approx(1)
        met.add(frozenset(text.shares))
    if fields["top_k"] < 3 and fields.get("router") != "posterior":
        assert len(met) > 1, "the active experts should have changed on the way"


@pytest.mark.parametrize("sizes", [(7, 1, 13, 2), (30, 1, 1), (5, 20, 3)])
@pytest.mark.parametrize("fields", SETTINGS[-3:])
def test_searches_do_not_depend_on_how_a_text_comes(fields, sizes, house, monkeypatch):
    monkeypatch.setattr("elmwood.domains.route.EARLY", 4)
    lm = open_model(house.ensemble(**fields), house.store)
    loglik_T, text, read = lm.score([house.tokens])[0], lm.start(), 0
    for size in sizes:
        logp_V, text = lm.extend(house.tokens[read : read + size], text)
        read += size
        torch.testing.assert_close(logp_V[house.tokens[read]], loglik_T[read], atol=1e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 7), min_size=3, max_size=8))
def test_reading_in_pieces_changes_nothing(sizes, house, lm2):
    lm, loglik_T = lm2
    text, read = lm.start(), 0
    for size in sizes:
        logp_V, text = lm.extend(house.tokens[read : read + size], text)
        read += size
        if read >= len(house.tokens):
            break
        torch.testing.assert_close(logp_V[house.tokens[read]], loglik_T[read], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def lm2(house):
    lm = open_model(house.ensemble(top_k=2), house.store)
    return lm, lm.score([house.tokens])[0]


@pytest.mark.parametrize("which", [0, 2])
def test_copies_of_one_expert_are_that_expert(which, house):
    alone = open_model(house.experts[which], house.store)
    tokens_BT = torch.tensor([house.tokens])
    for fields in ({"top_k": 3}, {"top_k": 2, "router": "uniform"}):
        assert len({expert.digest for expert in house.copies(house.experts[which])}) == 3
        lm = open_model(house.ensemble(house.copies(house.experts[which]), **fields), house.store)
        torch.testing.assert_close(lm.score(tokens_BT), alone.score(tokens_BT), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            lm.extend(house.tokens, lm.start())[0], alone.extend(house.tokens, alone.start())[0], atol=1e-5, rtol=1e-5
        )


def test_the_order_of_experts_changes_no_bit(house):
    one, other = (open_model(house.ensemble(experts, top_k=3), house.store) for experts in (house.experts, house.experts[::-1]))
    assert torch.equal(one.score([house.tokens]), other.score([house.tokens]))
    assert torch.equal(one.extend(house.tokens, one.start())[0], other.extend(house.tokens, other.start())[0])


@torch.inference_mode()
def test_uniform_weights_are_the_plain_average(house):
    lm = open_model(house.ensemble(router="uniform", top_k=4, seed_distance=1.0), house.store)
    models = [load_model(house.seed, house.store, expert) for expert in (*house.experts, None)]
    p_EV = torch.stack([model(torch.tensor([house.tokens])).logits[0, -1].softmax(-1) for model in models])
    logp_V, text = lm.extend(house.tokens, lm.start())
    torch.testing.assert_close(logp_V.exp(), p_EV.mean(0), atol=1e-6, rtol=1e-4)
    assert set(text.shares.values()) == {0.25}
    assert text.shares.keys() == {*(domain.name for domain in house.partition.domains), "seed"}


@pytest.mark.parametrize("seed_distance", [None, 0.5])
def test_the_posterior_weighs_by_what_each_said(seed_distance, house):
    """The live ensemble, read at once or in pieces, is what its formula makes of the experts' own columns."""
    lm = open_model(house.ensemble(router="posterior", top_k=4, temperature=1.0, seed_distance=seed_distance), house.store)
    members = [*lm.experts.experts, *([] if seed_distance is None else [house.seed])]
    loglik_TE = np.stack([open_model(member, house.store).score([house.tokens])[0].numpy() for member in members], 1)
    prior_E = np.exp([0, 0, 0] if seed_distance is None else [0, 0, 0, -seed_distance])
    log_TE = np.log(prior_E) + np.cumsum(loglik_TE, 0, dtype=np.float64) - loglik_TE
    joint_TE = np.exp(log_TE - log_TE.max(1, keepdims=True))
    weight_TE = joint_TE / joint_TE.sum(1, keepdims=True)
    expected_T = torch.from_numpy(np.log((weight_TE * np.exp(loglik_TE.astype(np.float64))).sum(1))).float()
    expected_T[0] = 0
    torch.testing.assert_close(lm.score([house.tokens])[0], expected_T, atol=1e-5, rtol=1e-5)
    text, read = lm.start(), 0
    for size in (1, 5, 1, 1, 3):
        logp_V, text = lm.extend(house.tokens[read : read + size], text)
        read += size
        torch.testing.assert_close(logp_V[house.tokens[read]], expected_T[read], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(list(text.shares.values()), weight_TE[read][weight_TE[read] > 0], atol=1e-4)


@pytest.mark.parametrize("seed_distance", [None, 1.1])
def test_live_weights_are_their_formula(seed_distance, house):
    """From the members' own columns: the two nearest experts and the seed, by distance and a fading sum of what each said."""
    lm = open_model(house.ensemble(router="live", temperature=0.5, memory=0.7, decay=0.9, seed_distance=seed_distance), house.store)
    loglik_TC = np.stack([open_model(one, house.store).score([house.tokens])[0].numpy() for one in (*lm.experts.experts, house.seed)], 1)
    dist2_TK = token_distances(lm.router.embedder, centroids(house.partition, house.store), house.tokens, lm.router.spelled)
    dist2_TE = dist2_TK[:, [expert.domain for expert in lm.experts.experts]]
    loglik_TC = loglik_TC.astype(np.float64)
    memory_C, expected, text = np.zeros(4), [], lm.start()
    for t in range(len(house.tokens) - 1):
        memory_C = 0.9 * memory_C + loglik_TC[t]
        p_C = np.exp(0.7 * memory_C - np.append(dist2_TE[t + 1], 0 if seed_distance is None else seed_distance) / 0.5)
        p_C[np.argsort(dist2_TE[t + 1])[2:]] = 0
        p_C[-1] *= seed_distance is not None
        if np.isinf(dist2_TE[t + 1]).all():  # no known word yet
            p_C = np.array([0, 0, 0, 1.0] if seed_distance else [1.0, 1, 0, 0])
        expected.append(np.log(p_C @ np.exp(loglik_TC[t + 1]) / p_C.sum()))
        _, text = lm.extend([house.tokens[t]], text)
        np.testing.assert_allclose(list(text.shares.values()), (p_C / p_C.sum())[p_C > 0], atol=1e-5)
    np.testing.assert_allclose(lm.score([house.tokens])[0, 1:], expected, atol=1e-5)


def test_an_expert_that_joins_late_has_read_all_of_the_text(house):
    """Idle for a while, dropped from the cache or new: the same weights as one that was never away."""
    lm = open_model(house.ensemble(router="live", top_k=1, temperature=0.5, memory=1.0, seed_distance=1.0), house.store)
    always = open_model(house.ensemble(router="live", top_k=3, temperature=0.5, memory=1.0, seed_distance=1.0), house.store)
    words = "captain def path open return sea harbour crew sailed toward captain"
    text, other, met = lm.start(), always.start(), []
    for t, token in enumerate([0, *house.tokenizer.encode(words).ids]):
        _, text = lm.extend([token], text)
        _, other = always.extend([token], other)
        (one, *_) = [name for name in text.shares if name != "seed"] or ["seed"]
        assert text.shares["seed"] / (text.shares["seed"] + text.shares[one] * (one != "seed")) == pytest.approx(
            other.shares["seed"] / (other.shares["seed"] + other.shares[one] * (one != "seed")), abs=1e-5
        )
        met.append(one)
        if t == 20:  # as when more experts are active than the cache has rows for
            for cache in text.caches.values():
                cache.owner.clear()
                cache.length.clear()
    assert len(set(met)) > 2
    assert any(met[t] != met[t - 1] and met[t] in met[: t - 1] for t in range(2, len(met))), "one should have come back"


def test_old_experts_serve_a_revised_partition_until_new_ones_come(house):
    revised = split(house.partition, 1, house.store)
    old = house.add(Forest(seed=house.seed.digest, partition=revised.digest, experts=[expert.digest for expert in house.experts]))
    lm = open_model(house.add(Ensemble(forest=old.digest, top_k=2)), house.store)
    served = dict(zip((expert.domain for expert in lm.experts.experts), lm.router.places_E, strict=True))
    assert served == {0: (0,), 1: (1, 3), 2: (2,)}
    dist2_TK = token_distances(lm.router.embedder, centroids(revised, house.store), house.tokens, lm.router.spelled)
    row = Windows(np.array([house.tokens]), np.array([len(house.tokens)]), np.ones(1, int), np.zeros(1, int))
    np.testing.assert_allclose(lm.router.distances(row), nearest_place(dist2_TK, lm.router.places_E)[1:], atol=1e-6)
    assert "".join(step.text for step in generate(lm, house.tokenizer, "the sea", max_tokens=4))
    assert set(lm.names) == {*(domain.name for domain in house.partition.domains), "seed"}
    made = evaluate(old, house.store, length=64, workers=1)
    comparison, found = made.record, made.ensemble
    rows = {row.name: row for row in comparison.rows}
    assert {len(row) for row in comparison.routing} == {5}
    assert len(rows["oracle routing"].domains) == 4
    np.testing.assert_allclose(np.sum([row for row in comparison.routing if any(row)], 1), 1)
    (live,) = evaluate(found, house.store, length=64, workers=1).record.rows
    assert live.bits_per_byte == pytest.approx(rows[comparison.chosen].bits_per_byte, abs=1e-4)
    part = lora_expert(house.seed, house.store, 7, domain=3, partition=revised.digest)
    both = house.add(old.model_copy(update={"experts": tuple(sorted((*old.experts, part.digest)))}))
    lm = open_model(house.add(Ensemble(forest=both.digest, top_k=1)), house.store)
    assert dict(zip((expert.digest for expert in lm.experts.experts), lm.router.places_E, strict=True))[part.digest] == (3,)
    assert lm.score([house.tokens]).isfinite().all()
    rest = lora_expert(house.seed, house.store, 8, domain=1, partition=revised.digest)
    full = house.add(both.model_copy(update={"experts": tuple(sorted((*both.experts, rest.digest)))}))
    with pytest.raises(ForeignExpert, match="experts of its own by now"):
        open_model(house.add(Ensemble(forest=full.digest)), house.store)


def test_a_partition_embedded_by_its_seed_routes_live(house):
    corpus = house.store.load(house.partition.corpus, Corpus)
    model = Model(house.seed.digest, open_hidden_states(house.seed.digest, house.store))
    embedder = fit_embedder(corpus, house.store, "seed", model=model)
    divided = partition(corpus, house.store, domains=3, embedder=embedder)
    experts = [house.add(expert.model_copy(update={"partition": divided.digest})) for expert in house.experts]
    forest = house.add(Forest(seed=house.seed.digest, partition=divided.digest, experts=[expert.digest for expert in experts]))
    lm = open_model(house.add(Ensemble(forest=forest.digest, top_k=1)), house.store)
    own = [next(document.text for document in documents(domain.train, house.store)) for domain in divided.domains]
    for text in own:
        state = lm.start()
        lm.extend([0, *house.tokenizer.encode(text).ids[:60]], state)
        near_N, _ = assign(divided, house.store, [house.tokenizer.decode(state.tokens[1:])])
        assert state.shares == {divided.domains[near_N[0]].name: 1.0}
    assert lm.score([house.tokens]).isfinite().all()


def test_only_experts_with_weight_are_run(house, monkeypatch):
    lm = open_model(house.ensemble(top_k=1), house.store)
    asked = []
    score = lm.experts.score
    monkeypatch.setattr(lm.experts, "score", lambda e, rows, *since: asked.append((e, len(rows))) or score(e, rows, *since))
    row = [0, *house.tokenizer.encode("sea sailed captain crew harbour " * 5).ids][:30]
    lm.score([row, row])
    assert sum(count for _, count in asked) <= 4  # one expert for empty prefixes, one for the topic


def test_text_far_from_every_domain_is_left_to_the_seed(house):
    lm, seed = open_model(house.ensemble(top_k=1, seed_distance=0.0), house.store), open_model(house.seed, house.store)
    torch.testing.assert_close(lm.score([house.tokens]), seed.score([house.tokens]))
    assert lm.extend(house.tokens, lm.start())[1].shares == {"seed": 1.0}


def test_every_kind_of_model_opens_as_an_lm(house):
    for record in (house.seed, *house.experts, house.ensemble()):
        lm = open_model(record, house.store)
        assert (lm.context, lm.vocabulary, lm.separator, lm.stops) == (SHAPE.context, SHAPE.vocabulary, 0, {0})
        assert lm.score(np.array([house.tokens])).shape == (1, len(house.tokens))
    with pytest.raises(UnknownName, match="partition is not a model"):
        open_model(house.partition, house.store)


def test_experts_without_a_place_and_strange_routers_are_refused(house):
    pooled = house.add(house.experts[0].model_copy(update={"domain": None}))
    moved = house.add(house.experts[0].model_copy(update={"partition": "0" * 64}))
    for expert, complaint in ((pooled, "no domain"), (moved, "partition 00000000")):
        with pytest.raises(ForeignExpert, match=complaint):
            EnsembleLM(house.ensemble([expert]), house.store)
    with pytest.raises(UnknownName, match="os:system"):
        EnsembleLM(house.ensemble(router="os:system"), house.store)
    with pytest.raises(UnknownName, match="oracle"):
        EnsembleLM(house.ensemble(router="oracle"), house.store)


@pytest.mark.parametrize("fields", SETTINGS)
def test_greedy_text_is_what_scoring_likes_best(fields, house):
    lm = open_model(house.ensemble(**fields), house.store)
    prompt = [0, *house.tokenizer.encode("la pomme").ids]
    steps = list(generate(lm, house.tokenizer, "la pomme", max_tokens=6, temperature=0))
    loglik_T = lm.score([[*prompt, *(step.token for step in steps)]])[0, len(prompt) :]
    torch.testing.assert_close(loglik_T, torch.tensor([step.logprob for step in steps]), atol=1e-5, rtol=1e-5)
