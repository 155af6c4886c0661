"""Names for domains: the terms that tell one from the others.

Shapes: N documents, K domains, V terms.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer

from elmwood.domains.words import words

Ints = NDArray[np.integer]
TERMS = 10


def top_terms(texts: Sequence[str], label_N: Ints, k: int) -> list[tuple[str, ...]]:
    """The most telling words of each domain: log-odds of the share of documents with the word, against all other
    domains, with an informative Dirichlet prior, over its standard deviation (Monroe et al. 2008)."""
    vectorizer = CountVectorizer(analyzer=lambda text: {word.lower() for word in words(text)})
    x_NV = vectorizer.fit_transform(texts)
    vocabulary = vectorizer.get_feature_names_out()
    inside_KV = np.array([np.asarray(x_NV[np.flatnonzero(label_N == domain)].sum(0)).ravel() for domain in range(k)], np.float64)
    documents_K = np.bincount(label_N, minlength=k)[:, None]
    prior_V = inside_KV.sum(0) / max(len(texts), 1)
    outside_KV = inside_KV.sum(0) - inside_KV
    odds_in = np.log((inside_KV + prior_V) / (documents_K + 1 - inside_KV))
    odds_out = np.log((outside_KV + prior_V) / (len(texts) - documents_K + 1 - outside_KV))
    z_KV = (odds_in - odds_out) / np.sqrt(1 / (inside_KV + prior_V) + 1 / (outside_KV + prior_V))
    return [tuple(str(vocabulary[v]) for v in np.argsort(-z_V, kind="stable")[:TERMS]) for z_V in z_KV]


def names(terms: Sequence[Sequence[str]]) -> list[str]:
    """A name for each domain: its three top terms, and a number where two domains share them."""
    made: list[str] = []
    for place, found in enumerate(terms):
        name = "-".join(found[:3]) or f"domain-{place}"
        made.append(f"{name}-{place}" if name in made else name)
    return made
