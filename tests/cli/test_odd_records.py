"""Records that are well-formed, and do not fit those they name: every verb that opens one says so in a line."""

import hashlib
import json
import math

import numpy as np
import pytest
import safetensors.numpy
from tiny_models import WORDS, lora_expert, tiny_seed

from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.errors import BadRecord
from elmwood.records import Comparison, Contribution, Ensemble, Forest, Gates, Merged, Mixture, Row, Share, State, Statistics
from elmwood.store import Store
from elmwood.store.verify import verify
from elmwood.study import page


@pytest.fixture(scope="module")
def good(store, seed):
    """Records that fit one another, by name."""
    path = store.root / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{WORDS} {n} " * 3}) + "\n" for n in range(40)))
    corpus = build([str(path)], store, holdout=0.4)
    division = divide(corpus, store, domains=1)
    expert = lora_expert(seed, store, 0, partition=division.digest, domain=0)
    made = {"corpus": corpus, "seed": seed, "p": division, "expert": expert}
    made["forest"] = Forest(seed=seed.digest, partition=division.digest, experts=(expert.digest,))
    for name, record in made.items():
        store.name(name, store.add(record))
    return made


def odd_records(good, store):
    """Name -> a record that does not fit, and what is said of it."""
    seed, division, expert, forest = (good[name] for name in ("seed", "p", "expert", "forest"))
    other = tiny_seed(store, 1)
    foreign = lora_expert(other, store, 0)
    four = store.put(safetensors.numpy.save({"centroids": np.zeros((4, division.embedder.dimension), np.float32)}))
    share = Contribution(expert=foreign.digest, weight=(Share(values=(1.0,)),), whole=False, reach=1)
    row = Row(name="r", bits_per_byte=1.0, standard_error=0.1, perplexity=2.0)
    mixture = {"seed": seed.digest, "experts": (expert.digest,), "files": {}}

    def changed(record, **fields):
        return record.model_copy(update=fields)

    odd = {
        "beyond": (changed(expert, domain=99), "domain 99"),
        "strange-partition": (changed(expert, partition=seed.digest), "no partition"),
        "strange-seed": (changed(expert, seed=division.digest), "no seed"),
        "separator": (changed(seed, separator=seed.vocabulary), "separator"),
        "no-domains": (changed(division, domains=(), fit_sizes=(), greedy_sizes=()), "no domains"),
        "sizes": (changed(division, fit_sizes=(1, 2, 3)), "fit_sizes"),
        "no-files": (changed(division, embedder=division.embedder.model_copy(update={"files": {}})), "no file"),
        "four": (changed(division, centroids=four), "centroids"),
        "nobody": (changed(forest, experts=()), "no experts"),
        "foreign": (changed(forest, experts=(expert.digest, foreign.digest)), "grew from seed"),
        "of-nothing": (Ensemble(forest=expert.digest), "no forest"),
        "too-many": (Mixture(forest=forest.digest, gates=Gates(top_k=5), **mixture), "5 of 1"),
        "other-forest": (Mixture(forest=changed(forest, seed=other.digest).digest, gates=Gates(top_k=1), **mixture), "of its forest"),
        "part": (State(seed=seed.digest, method="ties", settings={}, part=(5, 2), contributions=(), files={}), "part 5 of 2"),
        "sum": (State(seed=seed.digest, method="ties", settings={}, contributions=(share,), files={}), "grew from seed"),
        "merged": (Merged(seed=seed.digest, method="ties", settings={}, contributions=(share, share), files={}), "twice"),
        "statistics": (Statistics(expert=seed.digest, rows=1, tokens=1, fisher=1.0, files={}), "no expert"),
        "rows": (Comparison(forest=forest.digest, holdout="h", rows=()), "no rows"),
        "routing": (Comparison(forest=forest.digest, holdout="h", rows=(row,), routing=((1.0,) * 9,)), "numbers of experts"),
    }  # fmt: skip
    store.add(changed(forest, seed=other.digest))
    for name, (record, _) in odd.items():
        store.name(f"odd/{name}", store.add(record))
    return odd


VERBS = [
    ("show", "ODD"), ("chat", "ODD", "--prompt", "a", "--max-tokens", "1"), ("eval", "ODD", "--documents", "4"),
    ("eval", "expert", "--partition", "ODD", "--documents", "4"), ("export", "ODD", "OUT"), ("report", "ODD", "-o", "OUT"),
    ("merge", "ODD", "--method", "average"), ("mix", "ODD"), ("loads", "ODD"), ("table", "ODD"), ("compare", "ODD", "expert"),
    ("accept", "ODD", "forest"), ("accept", "expert", "ODD"), ("forest", "ODD", "expert"), ("forest", "p", "ODD"),
    ("train", "ODD", "--seed", "seed", "--tokens", "10"), ("train", "p", "--seed", "ODD", "--tokens", "10"),
    ("train", "ODD", "--method", "router"), ("statistics", "ODD"), ("split", "ODD", "0"), ("state", "make", "ODD", "--method", "ties"),
    ("state", "add", "ODD", "ODD"), ("state", "finalize", "ODD"), ("state", "remove", "ODD", "expert"), ("adopt", "OUT", "--seed", "ODD"),
    ("fit", "ODD"),
]  # fmt: skip


def test_every_verb_refuses_or_takes_every_odd_record(good, store, run, monkeypatch, tmp_path):
    odd = odd_records(good, store)
    monkeypatch.setenv("ELMWOOD_STORE", str(store.root))
    said: dict[str, list[str]] = {name: [] for name in odd}
    for name in odd:
        for number, verb in enumerate(VERBS):
            words = [{"ODD": f"odd/{name}", "OUT": str(tmp_path / f"{name}-{number}")}.get(word, word) for word in verb]
            code, err = run(*words)
            assert "Traceback" not in err
            assert code in (0, 1), (words, err)
            said[name] += [err] if code else []
    for name, (_, problem) in odd.items():
        assert any(problem in err for err in said[name]), (name, set(said[name]))
    found = {damage.where: damage.problem for damage in verify(store)}
    for name, (record, problem) in odd.items():
        if name not in ("no-files", "four"):  # of these the files do not fit
            assert problem in found[f"records/{record.digest}.json"]


def test_one_damaged_record_hides_no_other_name(seed, tmp_path, run):
    home = Store(tmp_path / "store")
    raw = json.dumps({**seed.model_dump(mode="json"), "context": 0}).encode()
    digest = hashlib.sha256(raw).hexdigest()
    home.name("good", home.add(seed))
    (home.root / "records" / f"{digest}.json").write_bytes(raw)
    (home.root / "refs" / "spoilt").write_text(digest)
    code, err = run("show", "--store", str(home.root))
    assert code == 0
    assert f"spoilt: records/{digest[:12]}" in err
    assert [line.name for line in page.show(store=home).lines] == ["good"]


def test_no_record_holds_a_number_that_is_none(store):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(BadRecord, match="not written"):
            store.add(Comparison(holdout="h", rows=(), fitted={"a": value}))
