"""Clusters of like reports: TF-IDF or the user's vectors, concatenated with the labels, then HDBSCAN.

point, first = distinct_points(studies, None, labels=True)
terms = extract_terms([studies.texts[n] for n in studies.text[first]])
features = features_of(studies, first, terms, None, settings)           # (points, dimensions)
clusters = number_by_size(find_clusters(features, weight, own, settings), weight)   # (points,), -1 is noise
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.balance.selection import NOISE, sample_positions
from shards.balance.settings import BalanceSettings, ClusterSummary
from shards.balance.studies import Ints, TrainingStudies

Floats = npt.NDArray[np.float64]

DIMENSIONS = 64  # of the reports' vectors and of the labels' vectors at most
TERMS = 50_000  # words and pairs of words at most
DECIMALS = 5  # of a feature


def distinct_points(
    studies: TrainingStudies, vectors: npt.NDArray[np.float32] | None, labels: bool
) -> tuple[Ints, Ints]:
    """Return (point of each study, first study of each point).

    Studies with equal reports are one point; with `labels`, their labels must be equal, too.
    """
    content = studies.text
    if vectors is not None:
        seen: dict[bytes, int] = {}
        content = np.array([seen.setdefault(vector.tobytes(), len(seen)) for vector in vectors])
    pairs = content * len(studies.labels) + studies.label if labels else content
    _, first, point = np.unique(pairs, return_index=True, return_inverse=True)
    return point, first


@dataclass(frozen=True)
class Terms:
    """TF-IDF weights of the terms of each point."""

    names: list[str]
    weights: Any  # scipy.sparse (points, terms), rows of length 1 or 0


def extract_terms(texts: list[str]) -> Terms | None:
    """Return the TF-IDF of words and pairs of words, or None where no word occurs twice."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]

    often = max(2, len(texts) // 10_000)  # reports: a word of only one says nothing about likeness, but may be a name
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=often, max_features=TERMS, dtype=np.float32
    )
    try:
        weights = vectorizer.fit_transform(texts)
    except ValueError:  # no word at all, or none so frequent
        return None
    return Terms(vectorizer.get_feature_names_out().tolist(), weights)


def without_shared_terms(terms: Terms | None, points: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the reports that share no word with another: their vectors are zero, but not alike."""
    return np.ones(points, bool) if terms is None else np.diff(terms.weights.indptr) == 0


def features_of(
    studies: TrainingStudies,
    first: Ints,
    terms: Terms | None,
    vectors: npt.NDArray[np.float32] | None,
    settings: BalanceSettings,
) -> Floats:
    """Return (points, dimensions): the report's vector of length 1, then the labels' of length `label_weight`."""
    from sklearn.preprocessing import normalize  # type: ignore[import-untyped]

    parts: list[Floats] = []
    report = vectors if vectors is not None else terms.weights if terms is not None else None
    if report is not None:
        parts.append(normalize(_reduce(report)))
    names = {name: n for n, name in enumerate(sorted({name for labels in studies.labels for name, _ in labels}))}
    if names and settings.label_weight:
        sets = np.zeros((len(studies.labels), len(names)), np.float32)
        for number, labels in enumerate(studies.labels):
            for name, value in labels:
                sets[number, names[name]] = 1 if value == 1 else 0.5  # uncertain
        parts.append(settings.label_weight * _reduce(normalize(sets)[studies.label[first]]))
    if not parts:
        return np.zeros((len(first), 1))
    return np.asarray(np.round(np.hstack(parts), DECIMALS), np.float64)


def _reduce(matrix: Any) -> Floats:
    """Reduce to at most DIMENSIONS columns by a truncated SVD."""
    from sklearn.decomposition import TruncatedSVD  # type: ignore[import-untyped]

    dimensions = min(DIMENSIONS, min(matrix.shape) - 1)
    if matrix.shape[1] <= DIMENSIONS or dimensions < 1:
        return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, np.float64)
    return np.asarray(TruncatedSVD(dimensions, random_state=0).fit_transform(matrix), np.float64)


def find_clusters(features: Floats, weight: Ints, unlike: npt.NDArray[np.bool_], settings: BalanceSettings) -> Ints:
    """Return (points,): the number of the cluster, or NOISE; points marked in `unlike` are never compared."""
    from sklearn.cluster import HDBSCAN  # type: ignore[import-untyped]

    clusters = np.full(len(features), NOISE, np.int64)
    comparable = np.flatnonzero(~unlike)
    fitted = sample_positions(comparable, settings.fit, settings.seed)
    if len(fitted) > max(settings.min_cluster_size, settings.min_samples):
        clusters[fitted] = HDBSCAN(
            min_cluster_size=settings.min_cluster_size,
            min_samples=settings.min_samples,
            cluster_selection_method="leaf",  # the default may take half of an archive for one cluster
            algorithm="kd_tree",  # memory in proportion to the points, not to their square
            n_jobs=1,
            copy=True,
        ).fit_predict(features[fitted])
        rest = np.setdiff1d(comparable, fitted)
        if len(rest) and clusters.max() >= 0:
            clusters[rest] = _assign_to_nearest(features[fitted], clusters[fitted], features[rest])
    frequent = np.flatnonzero((clusters == NOISE) & (weight >= settings.min_cluster_size))
    clusters[frequent] = clusters.max() + 1 + np.arange(len(frequent))
    return clusters


def _assign_to_nearest(fitted: Floats, clusters: Ints, rest: Floats) -> Ints:
    """Return the cluster of the nearest fitted point, or NOISE if its points lie closer together."""
    from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]

    radius = np.zeros(clusters.max() + 1)
    for number in range(len(radius)):
        own = fitted[clusters == number]
        distances, _ = NearestNeighbors(n_neighbors=2, algorithm="kd_tree", n_jobs=1).fit(own).kneighbors(own)
        radius[number] = distances[:, 1].max()
    neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute", n_jobs=1).fit(fitted)
    distance, position = neighbours.kneighbors(rest)
    near = clusters[position[:, 0]]
    return np.where((near >= 0) & (distance[:, 0] <= radius[near]), near, NOISE)


def number_by_size(clusters: Ints, weight: Ints) -> Ints:
    """Renumber the clusters by their studies: 0 has the most."""
    if clusters.max() < 0:
        return clusters
    inside = clusters >= 0
    sizes = np.bincount(clusters[inside], weights=weight[inside])
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return np.where(inside, rank[clusters], NOISE)


def describe_largest(
    terms: Terms | None, clusters: Ints, before: Ints, after: Ints, count: int = 12
) -> tuple[ClusterSummary, ...]:
    """Summarize the largest clusters by the terms that are heavier in their reports than in all reports."""
    summaries = []
    for number in range(min(count, int(clusters.max()) + 1)):
        own = np.flatnonzero(clusters == number)
        words = ""
        if terms is not None:
            share = before[own] / before[own].sum()
            more = terms.weights[own].T @ share - terms.weights.T @ (before / before.sum())
            words = ", ".join(_heaviest_terms(terms.names, more))
        summaries.append(ClusterSummary(words, int(before[own].sum()), int(after[own].sum())))
    return tuple(summaries)


def _heaviest_terms(names: list[str], weights: Floats, count: int = 3) -> list[str]:
    """Return the heaviest terms, without English stop words, none of which contains a word of another."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    stop_words = ENGLISH_STOP_WORDS - {"no", "not", "without"}
    chosen: list[str] = []
    for number in np.argsort(-weights, kind="stable")[:200]:
        words = set(names[number].split())
        telling = not words & stop_words and words != {"no"}
        if telling and weights[number] > 0 and not any(words & set(other.split()) for other in chosen):
            chosen.append(names[number])
        if len(chosen) == count:
            break
    return chosen
