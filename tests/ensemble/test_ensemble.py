"""Ensembles: the laws of mixing, the door to every model, and text."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import SHAPE, full_expert, lora_expert, tiny_seed

from elmwood.cli.old_evaluation import compare_models
from elmwood.corpus.build import build, documents
from elmwood.domains.dense import Model
from elmwood.domains.grow import Means
from elmwood.domains.partition import assign, centroids, fit_embedder, partition, split
from elmwood.domains.route import gate, nearest_place, posterior_scores, token_distances
from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import EnsembleLM, open_model
from elmwood.errors import BadInput, ForeignExpert, UnknownName
from elmwood.lm.files import tokenizer
from elmwood.lm.hidden_states import seed_states
from elmwood.lm.load import load_model
from elmwood.merge.adapters import merge_adapters
from elmwood.merge.layer_weights import everywhere
from elmwood.records import Corpus, Ensemble, Forest
from elmwood.store import Store

TOPICS = (
    "the {0} sailed over the sea with its captain and crew toward the harbour",
    "def read_{0}(path): return open(path).read() if path else None",
    "le {0} mange une pomme dans le jardin de la maison avec plaisir",
)
TEXT = "the captain sailed. def path(open): return read. le jardin, la pomme — naïve 海 猫 the sea"


class House:
    """A store with a partition of three topics, a seed, and experts: two adapters and a full one."""

    def __init__(self, folder):
        text = folder / "text"
        text.mkdir()
        rng = np.random.default_rng(0)
        for n in range(60):
            some = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(6)]
            (text / f"{n}.txt").write_text(" ".join(TOPICS[n % 3].format(word) for word in some))
        self.store = Store(folder / "store")
        self.partition = partition(build([str(text)], self.store), self.store, domains=3)
        self.seed = tiny_seed(self.store)
        place = {"partition": self.partition.digest}
        self.experts = [lora_expert(self.seed, self.store, n, domain=n, **place) for n in range(2)]
        self.experts.append(full_expert(self.seed, self.store, 2, domain=2, **place))
        self.tokenizer = tokenizer(self.seed, self.store)
        self.tokens = [0, *self.tokenizer.encode(TEXT).ids]

    def forest(self, experts) -> Forest:
        return self.add(Forest(seed=self.seed.digest, partition=self.partition.digest, experts=[expert.digest for expert in experts]))

    def add(self, record):
        self.store.add(record)
        return record

    def ensemble(self, experts=None, **fields) -> Ensemble:
        return self.add(Ensemble(forest=self.forest(experts or self.experts).digest, **fields))

    def copies(self, expert, count=3):
        """The same weights under other digests, one in each domain."""
        return [self.add(expert.model_copy(update={"domain": n, "contributor": str(n)})) for n in range(count)]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("house"))


SETTINGS = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 2, "seed_distance": 0.4},
    {"top_k": 4, "seed_distance": 0.9, "router": "cbtm"},
    {"top_k": 3, "temperature": 1.0},
    {"top_k": 2, "router": "sparse", "seed_distance": 1.9},
    {"top_k": 2, "router": "posterior", "temperature": 1.0},
    {"top_k": 4, "router": "posterior", "temperature": 4.0, "seed_distance": 0.5},
]


@pytest.mark.parametrize("fields", SETTINGS)
def test_reading_on_equals_scoring(fields, house):
    lm = open_model(house.ensemble(**fields), house.store)
    tokens_T, text, met = house.tokens, lm.start(), set()
    loglik_T = lm.score([tokens_T])[0]
    for t, token in enumerate(tokens_T[:-1]):
        logp_V, text = lm.extend([token], text)
        torch.testing.assert_close(logp_V[tokens_T[t + 1]], loglik_T[t + 1], atol=1e-5, rtol=1e-5)
        assert len(text.spoke) <= fields["top_k"]
        assert sum(text.spoke.values()) == pytest.approx(1)
        met.add(frozenset(text.spoke))
    if fields["top_k"] < 3 and fields.get("router") != "posterior":
        assert len(met) > 1, "the active experts should have changed on the way"


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
    assert set(text.spoke.values()) == {0.25}
    assert text.spoke.keys() == {*(domain.name for domain in house.partition.domains), "seed"}


@pytest.mark.parametrize("seed_distance", [None, 0.5])
def test_the_posterior_weighs_by_what_each_said(seed_distance, house):
    """The live ensemble, read at once or in pieces, is what its formula makes of the experts' own columns."""
    lm = open_model(house.ensemble(router="posterior", top_k=4, temperature=1.0, seed_distance=seed_distance), house.store)
    members = [*lm.experts.experts, *([] if seed_distance is None else [house.seed])]
    loglik_TE = np.stack([open_model(member, house.store).score([house.tokens])[0].numpy() for member in members], 1)
    prior_E = np.exp([0, 0, 0] if seed_distance is None else [0, 0, 0, -seed_distance])
    weight_TE = gate(posterior_scores(loglik_TE, prior_E=prior_E), 1.0, 4)
    expected_T = torch.from_numpy(np.log((weight_TE * np.exp(loglik_TE.astype(np.float64))).sum(1))).float()
    expected_T[0] = 0
    torch.testing.assert_close(lm.score([house.tokens])[0], expected_T, atol=1e-5, rtol=1e-5)
    text, read = lm.start(), 0
    for size in (1, 5, 1, 1, 3):
        logp_V, text = lm.extend(house.tokens[read : read + size], text)
        read += size
        torch.testing.assert_close(logp_V[house.tokens[read]], expected_T[read], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(list(text.spoke.values()), weight_TE[read][weight_TE[read] > 0], atol=1e-4)


def test_old_experts_serve_a_revised_partition_until_new_ones_come(house):
    revised = split(house.partition, 1, house.store)
    old = house.add(Forest(seed=house.seed.digest, partition=revised.digest, experts=[expert.digest for expert in house.experts]))
    lm = open_model(house.add(Ensemble(forest=old.digest, top_k=2)), house.store)
    served = dict(zip((expert.domain for expert in lm.experts.experts), lm.gate.places_E, strict=True))
    assert served == {0: (0,), 1: (1, 3), 2: (2,)}
    dist2_TK = token_distances(lm.gate.embedder, centroids(revised, house.store), house.tokens, lm.gate.spelled)
    weight_TE = gate(-nearest_place(dist2_TK, lm.gate.places_E), 0.1, 2)
    np.testing.assert_allclose(lm.gate.tokens(house.tokens), weight_TE, atol=1e-6)
    assert "".join(step.text for step in generate(lm, house.tokenizer, "the sea", max_tokens=4))
    assert set(lm.names) == {*(domain.name for domain in house.partition.domains), "seed"}
    comparison, found = compare_models([old], ["old"], house.store, partition=None, length=64, documents=None, workers=1)
    rows = {row.name: row for row in comparison.rows}
    assert {len(row) for row in comparison.routing} == {5}
    assert len(rows["oracle routing"].domains) == 4
    np.testing.assert_allclose(np.sum([row for row in comparison.routing if any(row)], 1), 1)
    (live,) = compare_models([found], ["live"], house.store, partition=None, length=64, documents=None, workers=1)[0].rows
    assert live.bits_per_byte == pytest.approx(rows[comparison.chosen].bits_per_byte, abs=1e-4)
    part = lora_expert(house.seed, house.store, 7, domain=3, partition=revised.digest)
    both = house.add(old.model_copy(update={"experts": tuple(sorted((*old.experts, part.digest)))}))
    lm = open_model(house.add(Ensemble(forest=both.digest, top_k=1)), house.store)
    assert dict(zip((expert.digest for expert in lm.experts.experts), lm.gate.places_E, strict=True))[part.digest] == (3,)
    assert lm.score([house.tokens]).isfinite().all()
    rest = lora_expert(house.seed, house.store, 8, domain=1, partition=revised.digest)
    full = house.add(both.model_copy(update={"experts": tuple(sorted((*both.experts, rest.digest)))}))
    with pytest.raises(ForeignExpert, match="experts of its own by now"):
        open_model(house.add(Ensemble(forest=full.digest)), house.store)


def test_a_partition_embedded_by_its_seed_routes_live(house):
    corpus = house.store.load(house.partition.corpus, Corpus)
    model = Model(house.seed.digest, seed_states(house.seed.digest, house.store))
    embedder = fit_embedder(corpus, house.store, "seed", model=model)
    divided = partition(corpus, house.store, domains=3, embedder=embedder, means=Means(open_model=seed_states))
    experts = [house.add(expert.model_copy(update={"partition": divided.digest})) for expert in house.experts]
    forest = house.add(Forest(seed=house.seed.digest, partition=divided.digest, experts=[expert.digest for expert in experts]))
    lm = open_model(house.add(Ensemble(forest=forest.digest, top_k=1)), house.store)
    own = [next(document.text for document in documents(domain.train, house.store)) for domain in divided.domains]
    for text in own:
        state = lm.start()
        lm.extend([0, *house.tokenizer.encode(text).ids[:60]], state)
        near_N, _ = assign(divided, house.store, [house.tokenizer.decode(state.tokens[1:])], seed_states)
        assert state.spoke == {divided.domains[near_N[0]].name: 1.0}
    assert lm.score([house.tokens]).isfinite().all()
    with pytest.raises(BadInput, match="nothing here opens it"):
        assign(divided, house.store, own)


def test_only_experts_with_weight_are_run(house, monkeypatch):
    lm = open_model(house.ensemble(top_k=1), house.store)
    asked = []
    score = lm.experts.score
    monkeypatch.setattr(lm.experts, "score", lambda e, tokens_BT: asked.append((e, len(tokens_BT))) or score(e, tokens_BT))
    row = [0, *house.tokenizer.encode("sea sailed captain crew harbour " * 5).ids][:30]
    lm.score([row, row])
    assert sum(count for _, count in asked) <= 4  # one expert for empty prefixes, one for the topic


def test_text_far_from_every_domain_is_left_to_the_seed(house):
    lm, seed = open_model(house.ensemble(top_k=1, seed_distance=0.0), house.store), open_model(house.seed, house.store)
    torch.testing.assert_close(lm.score([house.tokens]), seed.score([house.tokens]))
    assert lm.extend(house.tokens, lm.start())[1].spoke == {"seed": 1.0}


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
    with pytest.raises(BadInput, match="oracle"):
        EnsembleLM(house.ensemble(router="oracle"), house.store)


# ---- text


def test_the_same_settings_write_the_same_text(house):
    lm = open_model(house.ensemble(top_k=2), house.store)

    def write(**fields):
        return list(generate(lm, house.tokenizer, "the sea", max_tokens=12, **fields))

    assert write(rng_seed=1) == write(rng_seed=1)
    assert write(rng_seed=1) != write(rng_seed=2)
    assert write(temperature=0) == write(temperature=0, rng_seed=5) == write(top_p=1e-9)
    assert all(sum(step.weights.values()) == pytest.approx(1) for step in write())


def test_greedy_text_is_what_scoring_likes_best(house):
    lm = open_model(house.ensemble(top_k=2), house.store)
    prompt = [0, *house.tokenizer.encode("la pomme").ids]
    steps = list(generate(lm, house.tokenizer, "la pomme", max_tokens=6, temperature=0))
    loglik_T = lm.score([[*prompt, *(step.token for step in steps)]])[0, len(prompt) :]
    torch.testing.assert_close(loglik_T, torch.tensor([step.logprob for step in steps]), atol=1e-5, rtol=1e-5)


class Parrot:
    """An LM that says given tokens, whatever it has read."""

    context, vocabulary, separator, stops = 64, SHAPE.vocabulary, 0, frozenset([0])

    def __init__(self, says):
        self.says = says

    def score(self, tokens_BT):
        raise NotImplementedError

    def start(self):
        return self

    def extend(self, tokens_T, cache):
        self.spoke = {"parrot": 1.0}
        logp_V = torch.full((SHAPE.vocabulary,), -50.0)
        logp_V[self.says.pop(0)] = 0
        return logp_V, self


def test_pieces_are_whole_characters_and_join_to_the_text(house):
    said = "naïve — 海猫 ok"
    ids = house.tokenizer.encode(said).ids
    assert any(len(house.tokenizer.encode(letter).ids) > 1 for letter in said)
    steps = list(generate(Parrot([*ids, 0, 5]), house.tokenizer, "", max_tokens=99))
    assert "".join(step.text for step in steps) == said
    assert [step.token for step in steps] == [*ids, 0]
    assert not any("\ufffd" in step.text for step in steps)
    unfinished = house.tokenizer.encode("€").ids[:1]
    assert [step.text for step in generate(Parrot(unfinished), house.tokenizer, "", max_tokens=1)] == ["\ufffd"]
    assert next(generate(Parrot([SHAPE.vocabulary - 1]), house.tokenizer, "", max_tokens=1)).text == ""  # a row no token uses


def test_text_ends_where_the_context_does(house):
    prompt = "".join(house.tokenizer.id_to_token(5) for _ in range(60))
    assert len(list(generate(Parrot([7] * 99), house.tokenizer, prompt, max_tokens=99))) == 64 - 61
    for wrong, complaint in (({"prompt": prompt * 2}, "reads 64"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p")):
        with pytest.raises(BadInput, match=complaint):
            next(generate(Parrot([7]), house.tokenizer, **({"prompt": ""} | wrong)))


# ---- weights mixed for each prompt


@pytest.fixture(scope="module")
def adapters(house):
    place = {"partition": house.partition.digest}
    return [*house.experts[:2], lora_expert(house.seed, house.store, 5, domain=2, settings={"r": 2, "lora_alpha": 3}, **place)]


def test_weights_of_a_prompt_are_a_static_merge_of_its_own(house, adapters):
    lm = open_model(house.ensemble(adapters, mixing="weights", top_k=2, temperature=0.5), house.store)
    prompt, rest = house.tokens[:20], house.tokens[20:26]
    logp_V, text = lm.extend(prompt, lm.start())
    assert len(text.spoke) == 2
    members = {expert.digest: everywhere(w) for expert, w in zip(lm.experts.experts, text.weight_E, strict=True) if w}
    (merged,) = merge_adapters(house.seed, members, [("concat", {})], house.store)
    static = open_model(merged, house.store)
    expected_V, other = static.extend(prompt, static.start())
    for token in rest:
        torch.testing.assert_close(logp_V, expected_V, atol=1e-5, rtol=1e-5)
        (logp_V, text), (expected_V, other) = lm.extend([token], text), static.extend([token], other)
    assert text.spoke == lm.extend(prompt, lm.start())[1].spoke, "the weights are the prompt's, whatever comes after it"


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


def test_weights_mixed_of_copies_are_the_expert_and_only_adapters_are_mixed(house):
    alone = open_model(house.experts[0], house.store)
    lm = open_model(house.ensemble(house.copies(house.experts[0]), mixing="weights", top_k=3, temperature=1.0), house.store)
    torch.testing.assert_close(lm.score([house.tokens]), alone.score([house.tokens]), atol=1e-5, rtol=1e-5)
    lone = open_model(house.ensemble(house.copies(house.experts[0]), mixing="weights", top_k=1, seed_distance=0.0), house.store)
    torch.testing.assert_close(lone.score([house.tokens]), open_model(house.seed, house.store).score([house.tokens]))
    with pytest.raises(BadInput, match="only LoRA adapters"):
        open_model(house.ensemble(mixing="weights"), house.store)
    with pytest.raises(BadInput, match="runs every expert"):
        open_model(house.ensemble(mixing="weights", router="posterior"), house.store)
    assert house.ensemble(mixing="outputs").digest == house.ensemble().digest
