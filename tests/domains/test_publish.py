"""A partition without its text: published, received, used, and verified."""

import hashlib
import shutil
from collections import Counter

import numpy as np
import pyarrow.dataset
import pytest
import safetensors.numpy
from topics import TOPICS, build_corpus, export_partition, some_texts

from elmwood.corpus.read import Document
from elmwood.domains.partition import add, assign, heirs, split
from elmwood.domains.publish import FAR, quantiles, receive, survey, text_files
from elmwood.errors import BadInput, BadRecord, Damaged
from elmwood.records import canonical
from elmwood.store import Store, lineage
from elmwood.store.verify import verify


def test_a_partition_is_used_offline_without_its_text(made, tmp_path):
    store, _, first = made
    theirs = Store(tmp_path / "theirs")
    folder = export_partition(first, store, tmp_path / "out")
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
    with pytest.raises(Damaged, match="does not match the record"):
        receive(folder, Store(tmp_path / "third"))
    with pytest.raises(BadInput, match=r"no elmwood\.json"):
        receive(tmp_path, theirs)


def test_the_text_is_one_parquet_data_set(made, tmp_path):
    store, corpus, first = made
    table = pyarrow.dataset.dataset(store.folder(text_files(first, store)), format="parquet", partitioning="hive").to_table()
    assert table.num_rows == corpus.documents
    held = Counter(
        domain for split, domain in zip(table["split"].to_pylist(), table["domain"].to_pylist(), strict=True) if split == "holdout"
    )
    assert [held[number] for number in range(3)] == [sum(shard.documents for shard in domain.holdout) for domain in first.domains]
    theirs = Store(tmp_path / "theirs")
    receive(export_partition(first, store, tmp_path / "out"), theirs)
    with pytest.raises(BadInput, match="stayed with their owner"):
        text_files(first, theirs)


def test_a_received_partition_is_whole_without_its_text_and_its_own_store_is_not(made, tmp_path):
    store, _, first = made
    parted = split(first, 1, store)
    theirs = Store(tmp_path / "theirs")
    received = receive(export_partition(parted, store, tmp_path / "out"), theirs)
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


@pytest.mark.parametrize("wrong", ["nan", "shape"])
def test_centroids_that_are_not_finite_or_too_few_are_refused(made, tmp_path, wrong):
    store, _, first = made
    folder = export_partition(first, store, tmp_path / "out")
    tensors = safetensors.numpy.load_file(folder / "centroids.safetensors")
    tensors["centroids"] = np.full_like(tensors["centroids"], np.nan) if wrong == "nan" else tensors["centroids"][:-1]
    data = safetensors.numpy.save(tensors)
    (folder / "centroids.safetensors").write_bytes(data)
    (folder / "elmwood.json").write_bytes(canonical(first.model_copy(update={"centroids": f"sha256:{hashlib.sha256(data).hexdigest()}"})))
    with pytest.raises(BadRecord, match="do not fit"):
        receive(folder, Store(tmp_path / "theirs"))
