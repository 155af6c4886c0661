"""Quality of domains: purity against known sources, and how well a router finds one of up to 10,000 domains. One thread.

    python -m benches.quality.domains quality [CORPUS ...]   purity and NMI against the sources, by embedder of words
    python -m benches.quality.domains embedders CORPUS DOCUMENTS [seed:STORE:NAME] [sentence:FOLDER]
                                                             the same on equally many documents of each source, with neural embedders
    python -m benches.quality.domains routing [CORPUS]       accuracy and time against the number of domains, 10 to 10,000

CORPUS is the sample unless a folder of JSON lines with a `source` is given; for routing it is this Python's packages.
"""

import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from benches.domains import labelled, median_seconds, objective  # first: it sets the number of threads

# isort: split
import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import normalized_mutual_info_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from benches.common import parser, say, timed
from elmwood.corpus.read import read
from elmwood.domains import cluster, dense, distances, embed
from elmwood.lm.hidden_states import open_hidden_states
from elmwood.records import Seed
from elmwood.store import Store


def purity(known_N: np.ndarray, label_N: np.ndarray) -> float:
    return sum(np.bincount(known_N[label_N == label]).max() for label in np.unique(label_N)) / len(label_N)


def bench_quality(*sources: str) -> None:
    texts, names = labelled(list(sources))
    pipeline = make_pipeline(TfidfVectorizer(stop_words="english"), TruncatedSVD(100, random_state=0), Normalizer())
    embedded = {"scikit-learn": pipeline.fit_transform(texts).astype(np.float32)}
    embedded |= {name: embed.fit(name, texts).embed(texts) for name in embed.EMBEDDERS if embed.has_terms(name)}
    judge(embedded, names)


def bench_embedders(corpus: str, count: int, *models: str) -> None:
    texts, names = labelled([corpus])
    order = np.random.default_rng(0).permutation(len(texts))
    rank: Counter[str] = Counter()
    nth_N = np.zeros(len(texts), int)
    for n in order:
        nth_N[n] = rank[names[n]]
        rank[names[n]] += 1
    chosen = sorted(np.argsort(nth_N, kind="stable")[:count].tolist())  # the first of each source, then the second, ...
    texts, names = [texts[n] for n in chosen], [names[n] for n in chosen]
    embedded = {name: embed.fit(name, texts).embed(texts) for name in embed.EMBEDDERS if embed.has_terms(name)}
    with tempfile.TemporaryDirectory() as scratch:
        for word in models:
            kind, _, named = word.partition(":")
            if kind == "seed":
                folder, _, seed = named.partition(":")
                digest = Store(folder).load(seed, Seed).digest
                model = dense.Model(digest, open_hidden_states(digest, Store(folder)))
            else:
                model = dense.sentence_model(named, Store(scratch))
            batches = [texts[first : first + dense.BATCH] for first in range(0, len(texts), dense.BATCH)]
            vectors, took = timed(lambda model=model, batches=batches: [list(model.encode(batch)) for batch in batches])
            say("embedders", way=kind, documents_per_second=len(texts) / took)
            known = dict(zip(texts, chain.from_iterable(vectors), strict=True))  # so that fitting does not encode them again
            again = dense.Model(model.name, lambda asked, known=known: [known[text] for text in asked])
            embedded[kind] = embed.fit(kind, texts, model=again).embed(texts)
    judge(embedded, names)


def judge(embedded: dict[str, np.ndarray], names: list[str]) -> None:
    """Clusters of these vectors against the known sources, as many clusters as there are sources."""
    known_N = np.unique(names, return_inverse=True)[1]
    k = int(known_N.max()) + 1

    def score(way: str, x_ND: np.ndarray, cluster_it: Callable[[int], np.ndarray]) -> None:
        runs = [cluster_it(rng_seed) for rng_seed in range(3)]
        say(
            "quality", way=way, documents=len(names), k=k,
            purity=float(np.mean([purity(known_N, run) for run in runs])),
            nmi=float(np.mean([normalized_mutual_info_score(known_N, run) for run in runs])),
            objective=float(np.mean([objective(x_ND, run) for run in runs])),
            largest_over_smallest=float(np.mean([np.bincount(run).max() / np.bincount(run).min() for run in runs])),
        )  # fmt: skip

    for name, x_ND in embedded.items():
        score(f"{name}, balanced", x_ND, lambda s, x=x_ND: cluster.kmeans(x, k, rng_seed=s).label_N)
        score(f"{name}, plain", x_ND, lambda s, x=x_ND: cluster.kmeans(x, k, balanced=False, rng_seed=s).label_N)
        score(f"{name}, KMeans", x_ND, lambda s, x=x_ND: KMeans(k, n_init=1, random_state=s).fit(x).labels_)
        score(f"{name}, KMeans then balanced", x_ND, lambda s, x=x_ND: even(x, KMeans(k, n_init=1, random_state=s).fit(x).cluster_centers_))


def even(x_ND: np.ndarray, centroid_KD: np.ndarray) -> np.ndarray:
    """scikit-learn's centroids with balanced sizes."""
    return cluster.assign_balanced(np.ascontiguousarray(cluster.squared_distances(x_ND, centroid_KD).T))[0]


def passages(source: str, length: int) -> Iterator[str]:
    """Texts long enough to be cut: documents of JSON lines, or files, below a folder."""
    for path in sorted(Path(source).rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(source).parts):
            continue  # packages that a corpus was made of
        if path.suffix == ".jsonl":
            yield from (document.text for document in read(str(path), Counter()) if len(document.text) > length)
        elif path.suffix in {".py", ".pyi", ".h", ".hpp", ".js", ".md", ".rst", ".txt", ".json"} and path.stat().st_size > length:
            text = path.read_text(errors="ignore")
            if len(text) > length:
                yield text


LISTED = 32  # of a shortlist


def bench_routing(source: str = sysconfig.get_paths()["purelib"]) -> None:
    """A domain is one file, or one document: its centroid is of its first six passages, the query is the seventh, or how that begins."""
    chunk, chunks = 600, 6
    found = list(dict.fromkeys(text[: chunk * (chunks + 1)] for text in passages(source, chunk * (chunks + 1))))
    order = np.random.default_rng(0).permutation(len(found))
    for k in sorted({min(k, len(found)) for k in (10, 100, 300, 1000, 3000, 10000)}):
        mine = [found[place] for place in order[:k]]
        parts = [text[at : at + chunk] for text in mine for at in range(0, chunk * chunks, chunk)]
        fitted = embed.fit("tfidf", parts)
        own = np.repeat(np.arange(k), chunks)
        means = (cluster.members(own, k) @ fitted.embed(parts)) / chunks
        sparse = distances.Sparse.of((cluster.members(own, k) @ fitted.tfidf(parts)).tocsr())
        for length in (200, chunk):
            queries = [text[chunk * chunks :][:length] for text in mine[:1000]]
            near2 = {}
            for router, places in (("centroid", means), ("sparse", sparse)):
                near2[router] = dist2_NK = distances.distances(fitted, places, queries)
                rank_N = _ranks(dist2_NK)
                one = median_seconds(lambda fitted=fitted, places=places, q=queries[0]: distances.distances(fitted, places, [q]), 51)
                x_1D = fitted.embed(queries[:1])
                search = (
                    median_seconds(lambda places=places, x=x_1D: cluster.squared_distances(x, places).argmin(1), 51)
                    if router == "centroid"
                    else None
                )
                say(
                    "routing", domains=k, router=router, characters=length, **_shares(rank_N), microseconds=one * 1e6,
                    search_microseconds=search and search * 1e6,
                )  # fmt: skip
            rank_N = _ranks(near2["sparse"])
            listed_NK = near2["sparse"] <= np.partition(near2["sparse"], min(LISTED, k) - 1)[:, min(LISTED, k) - 1, None]
            for router, dist2_NK in (("centroid", near2["centroid"]), ("both", near2["centroid"] + near2["sparse"])):
                again_N = np.where(rank_N < LISTED, _ranks(np.where(listed_NK, dist2_NK, np.inf)), LISTED)
                say("routing", domains=k, router=f"sparse, {LISTED} of them by {router}", characters=length, **_shares(again_N))


def _ranks(dist2_NK: np.ndarray) -> np.ndarray:
    """How many domains are nearer than the own one, which has the query's number."""
    own_N = dist2_NK[np.arange(len(dist2_NK)), np.arange(len(dist2_NK))]
    return (dist2_NK < own_N[:, None]).sum(1)


def _shares(rank_N: np.ndarray) -> dict[str, float]:
    """Queries whose domain is among the first, and standard errors."""
    shares = {f"top{most}": float((rank_N < most).mean()) for most in (1, 4, LISTED)}
    return shares | {f"{name}_error": (share * (1 - share) / len(rank_N)) ** 0.5 for name, share in shares.items()}


WAYS = {"quality": bench_quality, "embedders": bench_embedders, "routing": bench_routing}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=WAYS)
    options.add_argument("rest", nargs="*", help="the corpus, and for embedders the number of documents and models")
    asked = options.parse_args()
    WAYS[asked.what](*(int(word) if word.isdigit() else word for word in asked.rest))  # type: ignore[operator]


if __name__ == "__main__":
    main()
