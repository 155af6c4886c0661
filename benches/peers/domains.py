"""Clustering, embedding and routing against their peers. One JSON line per measurement, ratios within the run.

    python -m benches.peers.domains speed              all that is wanted of speed, each line with `wanted`: cluster, prefix, embed, search
    python -m benches.peers.domains cluster [N K]      against the auction of the published balanced k-means, and scikit-learn's KMeans
    python -m benches.peers.domains assign [N K]       one balanced assignment against scipy's exact one
    python -m benches.peers.domains prefix             routing at every position against embedding every prefix
    python -m benches.peers.domains embed [CORPUS]     tf-idf embedding and assignment against HashingVectorizer
    python -m benches.peers.domains quality [CORPUS]   purity and NMI against known sources, by embedder of words
    python -m benches.peers.domains embedders CORPUS DOCUMENTS [seed:STORE:NAME] [sentence:FOLDER]   the same on so many documents, as many
                                                       of each source as there are, with neural embedders too
    python -m benches.peers.domains routing [CORPUS]   accuracy and time against the number of domains, 10 to 10,000: files or documents

CORPUS is the sample unless a folder of JSON lines with a `source` is given; for routing it is this Python's packages. All on one thread
(OMP_NUM_THREADS=1 is set here).
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from sklearn.metrics import normalized_mutual_info_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from elmwood.corpus.read import read
from elmwood.domains import cluster, dense, embed, route
from elmwood.domains.words import finished
from elmwood.lm.hidden_states import seed_states
from elmwood.records import Seed
from elmwood.store import Store

torch.set_num_threads(1)


def say(**measured: object) -> None:
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in measured.items()}), flush=True)


def timed(task: Callable[[], object], rounds: int = 3) -> float:
    """Median seconds."""
    took = []
    for _ in range(rounds):
        started = perf_counter()
        task()
        took.append(perf_counter() - started)
    return median(took)


def topics(n: int, rng: np.random.Generator, d: int = 100, count: int = 64) -> np.ndarray:
    """Unit vectors around topics whose sizes follow Zipf's law [N, D]."""
    share = 1 / np.arange(1, count + 1)
    x_ND = rng.normal(size=(count, d))[rng.choice(count, n, p=share / share.sum())] + 1.5 * rng.normal(size=(n, d))
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)


def labelled(sources: list[str]) -> tuple[list[str], list[str]]:
    """Texts and their sources."""
    rejected: Counter[str] = Counter()
    found = [document for source in sources or ["sample"] for document in read(source, rejected)]
    return [document.text for document in found], [document.meta["source"] for document in found]


# ---- the published balanced k-means: an auction, after its constants (cost squared Euclidean, increment (max - min) / 50
# and at least 1e-4, help for last round's winners for 100 rounds, 1,000 rounds at most, random start, 20 iterations)


def auction(score_KN: torch.Tensor) -> torch.Tensor:
    """Each domain bids for its n/k best documents, by how much they beat the next best; the highest bid holds a document."""
    k, n = score_KN.shape
    increment = max(float(score_KN.max() - score_KN.min()) / 50, 1e-4)
    value_KN, bid_KN, cost_N = score_KN.clone(), torch.zeros(k, n), torch.zeros(n)
    held = None
    for done in range(1001):
        best, places = value_KN.topk(n // k + 1, dim=1)
        bid_KN.zero_().scatter_(1, places[:, :-1], best[:, :-1] - best[:, -1:] + increment)
        if held is not None and done < 100:
            bid_KN.view(-1)[held] = increment
        wanted = (bid_KN > 0).any(0).nonzero()[:, 0]
        bids, winners = bid_KN[:, wanted].max(0)
        if len(wanted) == n:
            break
        cost_N[wanted] += bids
        value_KN = score_KN - cost_N
        held = winners * n + wanted
        value_KN.view(-1)[held] = score_KN.view(-1)[held]
    return torch.zeros(n, dtype=torch.long).index_copy_(0, wanted, winners)


def auction_kmeans(x_ND: np.ndarray, k: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Labels and iterations. As there, distances are sums over a tensor of all differences [N, K, D]."""
    x = torch.from_numpy(x_ND)
    centroid = x[torch.from_numpy(rng.choice(len(x), k, replace=False))]
    iterations, shift = 0, np.inf
    while iterations < 20 and shift**2 >= 1e-3:
        dist2 = ((x[:, None] - centroid[None]) ** 2).sum(-1)
        label = auction(-dist2.T.contiguous())
        new = torch.stack([x[label == domain].mean(0) for domain in range(k)])
        shift = float((new - centroid).norm(dim=1).sum())
        centroid, iterations = new, iterations + 1
    return label.numpy(), iterations


def objective(x_ND: np.ndarray, label_N: np.ndarray) -> float:
    """Mean squared distance to the mean of the own domain."""
    return float(sum(np.square(x_ND[label_N == label] - x_ND[label_N == label].mean(0)).sum() for label in np.unique(label_N)) / len(x_ND))


def bench_cluster(n: int = 20000, k: int = 16) -> None:
    for rng_seed in range(3):
        x_ND = topics(n, np.random.default_rng(rng_seed))
        balanced, plain = (cluster.kmeans(x_ND, k, balanced=balanced, rng_seed=rng_seed) for balanced in (True, False))
        ours = timed(lambda x=x_ND, s=rng_seed: cluster.kmeans(x, k, rng_seed=s))
        ours_plain = timed(lambda x=x_ND, s=rng_seed: cluster.kmeans(x, k, balanced=False, rng_seed=s))
        theirs = timed(lambda x=x_ND, s=rng_seed: KMeans(k, n_init=1, random_state=s).fit(x))
        inertia = KMeans(k, n_init=1, random_state=rng_seed).fit(x_ND).inertia_ / n
        started = perf_counter()
        label_N, iterations = auction_kmeans(x_ND, k, np.random.default_rng(rng_seed))
        slow = perf_counter() - started
        sizes = {"ours": [min(balanced.sizes), max(balanced.sizes)], "auction": np.bincount(label_N)[[0, -1]].tolist()}
        say(
            bench="cluster", n=n, k=k, seconds=ours, auction_seconds=slow, auction_iterations=iterations, faster=slow / ours,
            wanted="faster >= 20", sizes=sizes,
        )  # fmt: skip
        say(bench="cluster", n=n, k=k, objective=objective(x_ND, balanced.label_N), auction_objective=objective(x_ND, label_N), wanted="<=")
        say(bench="cluster", n=n, k=k, peer="KMeans", seconds=ours, peer_seconds=theirs, times_peer=ours / theirs, wanted="times_peer <= 3")
        say(bench="cluster, plain", n=n, k=k, seconds=ours_plain, peer_seconds=theirs, objective=plain.objective, peer_objective=inertia)


def bench_assign(n: int = 2000, k: int = 16) -> None:
    for size in (n, n + 3):
        x_ND = topics(size, np.random.default_rng(0))
        cost_KN = np.ascontiguousarray(cluster.squared_distances(x_ND, x_ND[:k]).T)
        slots = np.concatenate([np.repeat(np.arange(k), size // k), np.arange(k) if size % k else np.zeros(0, int)])
        padded = cost_KN[slots].astype(np.float64)
        padded[size // k * k :] += 1e4
        started = perf_counter()
        rows, columns = linear_sum_assignment(padded)
        exact = perf_counter() - started
        label_N, _ = cluster.assign_balanced(cost_KN)
        ours = timed(lambda cost_KN=cost_KN: cluster.assign_balanced(cost_KN))
        cost = float(cost_KN[label_N, np.arange(size)].sum(dtype=np.float64))
        best = float(cost_KN[slots[rows], columns].sum(dtype=np.float64))
        say(bench="assign", n=size, k=k, cost_over_exact=cost / best - 1, seconds=ours, exact_seconds=exact, faster=exact / ours)


# ---- text


def bench_prefix() -> None:
    texts, _ = labelled([])
    fitted = embed.fit("tfidf", texts)
    centroid_KD = cluster.kmeans(fitted.embed(texts), 16).centroid_KD
    text = "\n".join(texts[:8])[: 4 * 2048]
    pieces = [text[at : at + 4].encode() for at in range(0, len(text), 4)]  # 2,048 tokens of four characters
    ours = timed(lambda: route.token_distances(fitted, centroid_KD, range(len(pieces)), pieces), 15)
    cuts = range(0, len(text), 4)
    every = timed(lambda: [route.distances(fitted, centroid_KD, [finished(text[:cut])]) for cut in cuts])
    batch = timed(lambda: route.distances(fitted, centroid_KD, [finished(text[:cut]) for cut in cuts]))
    pipeline = make_pipeline(TfidfVectorizer(stop_words="english"), TruncatedSVD(100, random_state=0), Normalizer()).fit(texts)
    some = list(cuts)[::32]
    scikit = timed(lambda: [pipeline.transform([text[:cut]]) for cut in some], 1) * len(cuts) / len(some)
    say(
        bench="prefix",
        tokens=len(pieces),
        seconds=ours,
        peer="scikit-learn's pipeline on every prefix",
        peer_seconds=scikit,
        faster=scikit / ours,
    )
    say(
        bench="prefix",
        tokens=len(pieces),
        seconds=ours,
        peer="our embed on every prefix",
        peer_seconds=every,
        faster=every / ours,
        wanted="faster >= 500",
    )
    say(bench="prefix", tokens=len(pieces), seconds=ours, peer="our embed, all prefixes at once", peer_seconds=batch, faster=batch / ours)
    walk = route.Walk(fitted, centroid_KD)
    say(
        bench="prefix",
        way="growing text",
        microseconds_per_token=timed(lambda: [walk.push(piece) for piece in pieces], 1) / len(pieces) * 1e6,
    )


def bench_embed(*sources: str) -> None:
    texts, _ = labelled(list(sources))
    size = sum(len(text.encode()) for text in texts) / 1e6
    started = perf_counter()
    fitted = embed.fit("tfidf", texts)
    say(bench="embed", way="fit", seconds=perf_counter() - started, mb=size, documents=len(texts))
    centroid_KD = cluster.kmeans(fitted.embed(texts), 16).centroid_KD
    vectorizer = HashingVectorizer()
    pairs = [
        (timed(lambda: route.distances(fitted, centroid_KD, texts).argmin(1), 1), timed(lambda: vectorizer.transform(texts), 1))
        for _ in range(5)
    ]
    ours, theirs = np.median(np.array(pairs), 0)
    share = float(np.median([peer / own for own, peer in pairs]))
    say(
        bench="embed", mb_per_second=size / ours, documents_per_second=len(texts) / ours, peer_mb_per_second=size / theirs, of_peer=share,
        wanted="of_peer >= 0.8",
    )  # fmt: skip
    words = timed(lambda: [fitted.lexicon.rows(text) for text in texts])
    counts = timed(lambda: [embed._counts(fitted, group) for group in embed._groups(texts)]) - words
    x_ND = fitted.embed(texts)
    near = timed(lambda: cluster.squared_distances(x_ND, centroid_KD).argmin(1))
    say(
        bench="embed",
        words_share=words / ours,
        count_share=counts / ours,
        vectors_share=(ours - words - counts - near) / ours,
        assign_share=near / ours,
    )


def purity(known_N: np.ndarray, label_N: np.ndarray) -> float:
    return sum(np.bincount(known_N[label_N == label]).max() for label in np.unique(label_N)) / len(label_N)


def bench_quality(*sources: str) -> None:
    texts, names = labelled(list(sources))
    pipeline = make_pipeline(TfidfVectorizer(stop_words="english"), TruncatedSVD(100, random_state=0), Normalizer())
    embedded = {"scikit-learn": pipeline.fit_transform(texts).astype(np.float32)}
    embedded |= {name: embed.fit(name, texts).embed(texts) for name in embed.EMBEDDERS}
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
    embedded = {name: embed.fit(name, texts).embed(texts) for name in embed.EMBEDDERS}
    with tempfile.TemporaryDirectory() as scratch:
        for word in models:
            kind, _, named = word.partition(":")
            if kind == "seed":
                folder, _, seed = named.partition(":")
                digest = Store(folder).load(seed, Seed).digest
                model = dense.Model(digest, seed_states(digest, Store(folder)))
            else:
                model = dense.sentence_model(named, Store(scratch))
            started = perf_counter()
            vectors = [list(model.encode(texts[first : first + dense.BATCH])) for first in range(0, len(texts), dense.BATCH)]
            took = perf_counter() - started
            say(bench="embedders", way=kind, documents_per_second=len(texts) / took)
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
            bench="quality", way=way, documents=len(names), k=k,
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


# ---- routing among many domains


def passages(source: str, length: int) -> Iterator[str]:
    """Texts long enough to be cut: documents of JSON lines, or files, below a folder."""
    for path in sorted(Path(source).rglob("*")):
        if path.suffix == ".jsonl":
            yield from (document.text for document in read(str(path), Counter()) if len(document.text) > length)
        elif path.suffix in {".py", ".pyi", ".h", ".hpp", ".js", ".md", ".rst", ".txt", ".json"} and path.stat().st_size > length:
            text = path.read_text(errors="ignore")
            if len(text) > length:
                yield text


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
        dense = (cluster.members(own, k) @ fitted.embed(parts)) / chunks
        sparse = route.Sparse.of((cluster.members(own, k) @ fitted.tfidf(parts)).tocsr())
        for length in (200, chunk):
            queries = [text[chunk * chunks :][:length] for text in mine[:1000]]
            for router, places in (("centroid", dense), ("sparse", sparse)):
                dist2_NK = route.distances(fitted, places, queries)
                own_N = dist2_NK[np.arange(len(queries)), np.arange(len(queries))]
                rank_N = (dist2_NK < own_N[:, None]).sum(1)
                one = timed(lambda fitted=fitted, places=places, q=queries[0]: route.distances(fitted, places, [q]), 51)
                x_1D = fitted.embed(queries[:1])
                search = (
                    timed(lambda places=places, x=x_1D: cluster.squared_distances(x, places).argmin(1), 51)
                    if router == "centroid"
                    else None
                )
                say(
                    bench="routing", domains=k, router=router, characters=length, top1=float((rank_N < 1).mean()),
                    top4=float((rank_N < 4).mean()), microseconds=one * 1e6, search_microseconds=search and search * 1e6,
                )  # fmt: skip

    bench_search()


def bench_search() -> None:
    x_KD = topics(10000, np.random.default_rng(0))
    took = timed(lambda: cluster.squared_distances(x_KD[:1], x_KD).argmin(1), 201)
    say(bench="search", domains=10000, way="exact, made-up centroids", microseconds=took * 1e6, wanted="microseconds < 1000")


def bench_speed() -> None:
    for bench in (bench_cluster, bench_prefix, bench_embed, bench_search):
        bench()


BENCHES = {
    "speed": bench_speed, "cluster": bench_cluster, "assign": bench_assign, "prefix": bench_prefix, "embed": bench_embed,
    "quality": bench_quality, "embedders": bench_embedders, "routing": bench_routing,
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(__doc__)
    BENCHES[sys.argv[1]](*(int(word) if word.isdigit() else word for word in sys.argv[2:]))  # type: ignore[operator]
