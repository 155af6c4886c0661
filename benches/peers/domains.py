"""Speed of clustering, embedding and routing against their peers: ratios within the run, one thread.

    python -m benches.peers.domains                    all of the following except assign, each line with the ratio that is `wanted`
    python -m benches.peers.domains cluster [N K]      against the auction of the published balanced k-means, and scikit-learn's KMeans
    python -m benches.peers.domains assign [N K]       one balanced assignment against scipy's exact one
    python -m benches.peers.domains prefix             routing at every position against embedding every prefix
    python -m benches.peers.domains embed [CORPUS]     tf-idf embedding and assignment against HashingVectorizer
    python -m benches.peers.domains search             exact search among 10,000 centroids

CORPUS is the sample unless files or folders are given.
"""

from time import perf_counter

from benches.domains import labelled, median_seconds, objective, topics  # first: it sets the number of threads

# isort: split
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from benches.common import parser, say
from elmwood.domains import cluster, distances, embed
from elmwood.domains.words import complete_words

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


# ---- benches


def bench_cluster(n: int = 20000, k: int = 16) -> None:
    for rng_seed in range(3):
        x_ND = topics(n, np.random.default_rng(rng_seed))
        balanced, plain = (cluster.kmeans(x_ND, k, balanced=balanced, rng_seed=rng_seed) for balanced in (True, False))
        ours = median_seconds(lambda x=x_ND, s=rng_seed: cluster.kmeans(x, k, rng_seed=s))
        ours_plain = median_seconds(lambda x=x_ND, s=rng_seed: cluster.kmeans(x, k, balanced=False, rng_seed=s))
        theirs = median_seconds(lambda x=x_ND, s=rng_seed: KMeans(k, n_init=1, random_state=s).fit(x))
        inertia = KMeans(k, n_init=1, random_state=rng_seed).fit(x_ND).inertia_ / n
        started = perf_counter()
        label_N, iterations = auction_kmeans(x_ND, k, np.random.default_rng(rng_seed))
        slow = perf_counter() - started
        sizes = {"ours": [min(balanced.sizes), max(balanced.sizes)], "auction": np.bincount(label_N)[[0, -1]].tolist()}
        say(
            "cluster", n=n, k=k, seconds=ours, auction_seconds=slow, auction_iterations=iterations, faster=slow / ours,
            wanted="faster >= 20", sizes=sizes,
        )  # fmt: skip
        say("cluster", n=n, k=k, objective=objective(x_ND, balanced.label_N), auction_objective=objective(x_ND, label_N), wanted="<=")
        say("cluster", n=n, k=k, peer="KMeans", seconds=ours, peer_seconds=theirs, times_peer=ours / theirs, wanted="times_peer <= 3")
        say("cluster, plain", n=n, k=k, seconds=ours_plain, peer_seconds=theirs, objective=plain.objective, peer_objective=inertia)


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
        ours = median_seconds(lambda cost_KN=cost_KN: cluster.assign_balanced(cost_KN))
        cost = float(cost_KN[label_N, np.arange(size)].sum(dtype=np.float64))
        best = float(cost_KN[slots[rows], columns].sum(dtype=np.float64))
        say("assign", n=size, k=k, cost_over_exact=cost / best - 1, seconds=ours, exact_seconds=exact, faster=exact / ours)


def bench_prefix() -> None:
    texts, _ = labelled([])
    fitted = embed.fit("tfidf", texts)
    centroid_KD = cluster.kmeans(fitted.embed(texts), 16).centroid_KD
    text = "\n".join(texts[:8])[: 4 * 2048]
    pieces = [text[at : at + 4].encode() for at in range(0, len(text), 4)]  # 2,048 tokens of four characters
    ours = median_seconds(lambda: distances.token_distances(fitted, centroid_KD, range(len(pieces)), pieces), 15)
    cuts = range(0, len(text), 4)
    every = median_seconds(lambda: [distances.distances(fitted, centroid_KD, [complete_words(text[:cut])]) for cut in cuts])
    batch = median_seconds(lambda: distances.distances(fitted, centroid_KD, [complete_words(text[:cut]) for cut in cuts]))
    pipeline = make_pipeline(TfidfVectorizer(stop_words="english"), TruncatedSVD(100, random_state=0), Normalizer()).fit(texts)
    some = list(cuts)[::32]
    scikit = median_seconds(lambda: [pipeline.transform([text[:cut]]) for cut in some], 1) * len(cuts) / len(some)
    say(
        "prefix",
        tokens=len(pieces),
        seconds=ours,
        peer="scikit-learn's pipeline on every prefix",
        peer_seconds=scikit,
        faster=scikit / ours,
    )
    say(
        "prefix",
        tokens=len(pieces),
        seconds=ours,
        peer="our embed on every prefix",
        peer_seconds=every,
        faster=every / ours,
        wanted="faster >= 500",
    )
    say("prefix", tokens=len(pieces), seconds=ours, peer="our embed, all prefixes at once", peer_seconds=batch, faster=batch / ours)
    walk = distances.PrefixDistances(fitted, centroid_KD)
    say(
        "prefix",
        way="growing text",
        microseconds_per_token=median_seconds(lambda: [walk.push(piece) for piece in pieces], 1) / len(pieces) * 1e6,
    )


def bench_embed(*sources: str) -> None:
    texts, _ = labelled(list(sources))
    size = sum(len(text.encode()) for text in texts) / 1e6
    started = perf_counter()
    fitted = embed.fit("tfidf", texts)
    say("embed", way="fit", seconds=perf_counter() - started, mb=size, documents=len(texts))
    centroid_KD = cluster.kmeans(fitted.embed(texts), 16).centroid_KD
    vectorizer = HashingVectorizer()
    ways = (lambda: distances.distances(fitted, centroid_KD, texts).argmin(1), lambda: vectorizer.transform(texts))
    pairs = [tuple(median_seconds(way, 1) for way in ways) for _ in range(5)]
    ours, theirs = np.median(np.array(pairs), 0)
    share = float(np.median([peer / own for own, peer in pairs]))
    say(
        "embed", mb_per_second=size / ours, documents_per_second=len(texts) / ours, peer_mb_per_second=size / theirs, of_peer=share,
        wanted="of_peer >= 0.8",
    )  # fmt: skip
    words = median_seconds(lambda: [fitted.lexicon.rows(text) for text in texts])
    counts = median_seconds(lambda: [embed._counts(fitted, group) for group in embed._groups(texts)]) - words
    x_ND = fitted.embed(texts)
    near = median_seconds(lambda: cluster.squared_distances(x_ND, centroid_KD).argmin(1))
    say(
        "embed",
        words_share=words / ours,
        count_share=counts / ours,
        vectors_share=(ours - words - counts - near) / ours,
        assign_share=near / ours,
    )


def bench_search() -> None:
    x_KD = topics(10000, np.random.default_rng(0))
    took = median_seconds(lambda: cluster.squared_distances(x_KD[:1], x_KD).argmin(1), 201)
    say("search", domains=10000, way="exact, synthetic centroids", microseconds=took * 1e6, wanted="microseconds < 1000")


WAYS = {"cluster": bench_cluster, "assign": bench_assign, "prefix": bench_prefix, "embed": bench_embed, "search": bench_search}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", nargs="?", choices=["speed", *WAYS], default="speed")
    options.add_argument("rest", nargs="*", help="N and K, or the corpus")
    asked = options.parse_args()
    given = [int(word) if word.isdigit() else word for word in asked.rest]
    for what in [name for name in WAYS if name != "assign"] if asked.what == "speed" else [asked.what]:
        WAYS[what](*given)  # type: ignore[operator]


if __name__ == "__main__":
    main()
