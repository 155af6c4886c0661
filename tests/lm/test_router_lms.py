"""Router LMs as an embedder: what each says of the beginning of a text (arXiv:2410.03529)."""

import json

import numpy as np
import pytest
from tiny_models import full_expert, tiny_seed

from elmwood.domains import embed
from elmwood.domains.dense import save_router_lms
from elmwood.domains.distances import PrefixDistances, distances, prefix_distances
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadRecord
from elmwood.lm.files import tokenizer
from elmwood.store import Store

TEXT = "the cat sat on the mat and sailed over the sea, déjà vu"


@pytest.fixture(scope="module")
def routers(tmp_path_factory):
    """A store, a seed, three full experts of it, and their embedder."""
    store = Store(tmp_path_factory.mktemp("routers"))
    seed = tiny_seed(store)
    experts = [full_expert(seed, store, rng_seed) for rng_seed in (1, 2, 3)]
    return store, seed, experts, save_router_lms([seed.files | expert.files for expert in experts], store)


def test_the_nearest_domain_is_that_of_the_likeliest_model(routers):
    """An oracle: log p of the same tokens as the LM interface gives it."""
    store, seed, experts, saved = routers
    fitted, eye_KK = embed.load(saved, store), np.eye(3, dtype=np.float32)
    tokens = tokenizer(seed, store).encode(TEXT).ids
    said_TK = np.stack([open_model(expert, store).score([[seed.separator, *tokens]])[0].numpy()[1:] for expert in experts], 1)
    ((given_WK, end_W),) = fitted.model.encode([TEXT])
    np.testing.assert_allclose(given_WK, said_TK, atol=1e-4)
    so_far_TK = np.cumsum(said_TK, 0)
    near_PK = prefix_distances(fitted, eye_KK, TEXT, end_W)
    np.testing.assert_array_equal(near_PK.argmin(1), so_far_TK.argmax(1))
    unit_TK = so_far_TK / np.linalg.norm(so_far_TK, axis=1, keepdims=True)
    np.testing.assert_allclose(near_PK, 2 - 2 * unit_TK, atol=1e-5)
    walk = PrefixDistances(fitted, eye_KK)
    np.testing.assert_allclose([walk.push(TEXT.encode())], distances(fitted, eye_KK, [TEXT]), atol=1e-5)


def test_text_past_the_context_changes_nothing(routers):
    store, seed, _, saved = routers
    fitted = embed.load(saved, store)
    long = " ".join([TEXT] * 9)
    ((score_WK, end_W),) = fitted.model.encode([long])
    assert len(score_WK) == seed.context - 1
    np.testing.assert_allclose(fitted.embed([long]), fitted.embed([long + " and more of it"]), atol=1e-6)
    assert end_W[-1] < len(long)
    assert not fitted.embed([""]).any()  # nothing is known of no text


def test_files_of_no_router_lm_are_refused(routers):
    store, _, _, saved = routers
    stray = store.put(b"{}")
    listed = {"model/0/config.json": stray, "model/2/config.json": stray}
    for files, why in ((listed, "without gaps"), ({"model/config.json": stray}, "its files are model/<number>")):
        name = store.put(json.dumps(files).encode())
        about = store.put(json.dumps({"name": "routers", "model": name}).encode())
        with pytest.raises(BadRecord, match=why):
            embed.load(saved.model_copy(update={"files": saved.files | {"embedder.json": about}}), store)
