"""Branch, train, merge, repeat: a merge becomes the seed of the next round, and its lineage leads back to the first."""

import json

import pytest
import torch
from tiny_models import full_expert, lora_expert, tiny_seed

from elmwood.corpus.build import build
from elmwood.errors import BadInput, BadRecord, ForeignExpert
from elmwood.lm.load import load_model
from elmwood.records import Expert, Seed
from elmwood.store import Store, lineage
from elmwood.store.relations import check_relations
from elmwood.study.ancestry import forest
from elmwood.study.exporting import verify
from elmwood.study.merging import merge, state_add, state_finalize, state_make
from elmwood.study.page import show, summary
from elmwood.study.seeds import seed_from
from elmwood.study.training import train

TOKENS_BT = torch.tensor([[0, 70, 75, 80, 90, 71]])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_rounds_and_a_latecomer(home, method):
    short = {"method": method, "tokens": 256, "length": 32, "batch": 4, "workers": 1}
    first = train("domains", "seed", home, **short)
    merged = merge(first, home).record
    seed = seed_from(merged, home)
    second = train("domains", seed, home, domains="0,1", rng_seed=1, **short)
    small = forest("domains", second, home)
    late = train("domains", seed, home, domains=2, rng_seed=1, **short)
    grown = forest("domains", [*second, *late], home)
    assert set(grown.experts) == {*small.experts, late[0].digest}
    shown = str(show(grown, home))
    assert [line.split()[0] for line in shown.splitlines()][:3] == ["forest", "seed", "merged"]
    assert f"grown from {merged.digest[:8]}" in shown
    records = [record for _, record in lineage(home, grown.digest)]
    assert {record.digest for record in records if isinstance(record, Seed)} == {home.resolve("seed"), seed.digest}
    assert {record.digest for record in records if isinstance(record, Expert)} == {one.digest for one in (*first, *second, *late)}
    with pytest.raises(ForeignExpert, match="a forest has one seed"):
        forest("domains", [first[0], second[1]], home)
    assert not [one for one in verify(store=home) if not one.elsewhere]


@pytest.mark.parametrize("made", [full_expert, lora_expert])
def test_the_seed_of_the_next_round_says_what_the_merge_says(tmp_path, made):
    store = Store(tmp_path)
    seed = tiny_seed(store)
    experts = [made(seed, store, number).digest for number in (1, 2)]
    merged = merge(experts, store).record
    grown = seed_from(merged.digest, store, name="next")
    assert (grown.name, grown.grown_from, grown.corpus, grown.parameters) == ("next", merged.digest, seed.corpus, seed.parameters)
    assert set(grown.files) == set(seed.files)
    assert seed_from(merged, store, name="next").digest == grown.digest
    with torch.inference_mode():
        of_merge, of_seed = (load_model(one, store, branch)(TOKENS_BT).logits for one, branch in ((seed, merged), (grown, None)))
    torch.testing.assert_close(of_seed, of_merge, atol=2e-4, rtol=1e-4)
    assert seed_from(experts[0], store).files.keys() == seed.files.keys()  # one alone; an adapter is folded
    assert load_model(grown, store, full_expert(grown, store, 3)).num_parameters() == seed.parameters  # what branches from it loads


def test_one_expert_alone_is_the_next_seed_of_one_long_branch(tmp_path):
    store = Store(tmp_path)
    expert = full_expert(tiny_seed(store), store, 1)
    grown = seed_from(expert, store)
    assert grown.files["model.safetensors"] == expert.files["model.safetensors"]
    assert summary(grown).endswith(f"grown from {expert.digest[:8]}")


def test_an_expert_that_comes_late_to_a_merge_is_in_its_seed_as_if_it_had_been_there(tmp_path):
    store = Store(tmp_path)
    seed = tiny_seed(store)
    *early, late = (full_expert(seed, store, number).digest for number in (1, 2, 3))
    total = state_make(early, store)
    after = seed_from(state_finalize(state_add([total.digest, state_make(late, store).digest], store).digest, store).record, store)
    assert after.digest == seed_from(merge([late, *early], store).record, store).digest
    assert after.digest != seed_from(state_finalize(total.digest, store).record, store).digest


def test_what_is_no_merge_and_no_expert_is_refused(tmp_path):
    store = Store(tmp_path)
    seed = tiny_seed(store)
    with pytest.raises(BadInput, match="is a seed: a seed grows from a merge or an expert"):
        seed_from(seed, store)
    expert = full_expert(seed, store, 1)
    grown = seed_from(expert, store)
    for wrong, words in ((seed, "is no merge and no expert"), (expert, "another architecture or vocabulary")):
        told = grown.model_copy(update={"grown_from": wrong.digest, "vocabulary": 321})
        with pytest.raises(BadRecord, match=words):
            check_relations(told, lambda digest: store.read(digest) if store.has(digest) else None)


def test_a_seed_opens_where_what_it_grew_from_stayed_away(tmp_path):
    store, away = Store(tmp_path / "here"), Store(tmp_path / "away")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"a text of its own, {number}"}) + "\n" for number in range(9)))
    corpora = [build([str(tmp_path / "text.jsonl")], one).digest for one in (store, away)]  # both have the text, one the experts
    seed = tiny_seed(store).model_copy(update={"corpus": corpora[0]})
    store.add(seed)
    expert = full_expert(seed, store, 1)
    grown = seed_from(expert, store)
    for digest in grown.files.values():
        away.put(store.get(digest))
    away.add(grown)
    assert [record.digest for _, record in lineage(away, grown.digest)] == [grown.digest, corpora[1]]
    assert load_model(grown, away).num_parameters() == grown.parameters
    assert not [one for one in verify(store=away) if not one.elsewhere]
    store.path(expert.digest).unlink()
    assert any(expert.digest in one.where for one in verify(store=store) if not one.elsewhere)  # it was made there
