"""Thins what a training split says over and over: a subset of the same shards, beside their manifest.

    result = balance("/data/padchest", Settings(cap="50%"), lambda done, total, what: None)
    result.url                  # "/data/padchest#balanced": what a recipe names in `shards`
    result.kept, result.dropped, result.clusters, result.noise, result.labels["Edema"]      # (before, after)

    /data/padchest/balanced.json, balanced.npz    the manifest and the index of the subset
    /data/padchest/balanced.png                   the clusters, what was kept of them, and the labels before and after

Most reports of a chest archive say that nothing is wrong, in few words: 59 of 100 PadChest reports are word for word
those of another study. Reports are clustered by what they say and by their labels, and of each cluster only so many
studies stay. Three kinds of study always stay: those that are like no other (the noise of HDBSCAN), those with a rare
label, and all of validate and test, so that scores on the subset and on the whole compare.

Report -> TF-IDF of words and pairs of words -> truncated SVD (Deerwester et al., 1990), or vectors of the user's own
-> beside them the weighted labels -> HDBSCAN (Campello et al., 2013). Reports with equal text and labels are one
point. Above `fit` points, as many of them are clustered, and each of the others joins the cluster of its nearest
neighbour if it lies no farther from it than that cluster's own points lie from theirs; else it is noise. A point of
as many studies as make a cluster is one, whatever HDBSCAN, which does not count them, says of it.

The same shards and settings give the same bytes, on one machine with one set of versions: linear algebra runs in one
thread, and features are rounded.
"""

import hashlib
import importlib.metadata
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from awscrt.checksums import crc32c
from pydantic import ValidationError

from radhpc.core.errors import UserError, first_line, nearest
from radhpc.core.manifest import INDEX, MANIFEST, File, Index, Manifest, sha256
from radhpc.core.sample import SPLITS, Sample
from radhpc.storage.store import Store

__all__ = ["BalanceResult", "Settings", "balance"]

Progress = Callable[[int, int, str], None]  # (done, in all, what is being done)
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DIMENSIONS = 64  # of the reports' vectors and of the labels' vectors at most
TERMS = 50_000  # words and pairs of words at most
DECIMALS = 5  # of a feature
NOISE = -1
THREADS, CHUNK = 8, 512  # readers, and descriptions that are under way: an object store is slow to answer
VERSIONED = ("numpy", "scipy", "scikit-learn")  # their versions may change the clusters


@dataclass(frozen=True)
class Settings:
    """How to balance. Raises UserError for a value that cannot be."""

    name: str = "balanced"  # of the subset: what follows the # in its URL
    cap: int | str = "50%"  # studies of a cluster that stay: a count, or the quantile of the clusters' sizes
    rare: float = 0.01  # a label that fewer than this share of the training studies have is rare, and they stay
    vocabulary: str | None = None  # of the labels; default: chexpert, unless another labels twice as many studies
    label_weight: float = 0.5  # length of the labels' vector beside the report's, which has length 1
    embeddings: Path | None = None  # .npz of the user's own vectors: key (n,) and vector (n, d); instead of TF-IDF
    min_cluster_size: int = 10  # of HDBSCAN: distinct reports that make a cluster
    min_samples: int = 3  # of HDBSCAN: neighbours that make a place dense; more give more noise
    fit: int = 20_000  # distinct reports that are clustered; time grows with the square
    seed: int = 0  # of what is kept of a cluster, and of the points that are clustered

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.name) or f"{self.name}.json" == MANIFEST:
            raise UserError(f"name: '{self.name}'; allowed are lower-case letters, digits, - and _, but not 'manifest'")
        if f"{self.name}.npz" == INDEX:
            raise UserError(f"name: '{self.name}' is the file of the whole index; allowed is another name")
        for key, least in (("min_cluster_size", 2), ("min_samples", 1), ("fit", 2), ("seed", 0)):
            if getattr(self, key) < least:
                raise UserError(f"{key}: {getattr(self, key)}; allowed are whole numbers from {least}")
        if not 0 <= self.rare <= 1:
            raise UserError(f"rare: {self.rare}; allowed is a share of the studies from 0 to 1, such as 0.01")
        if not 0 <= self.label_weight < float("inf"):
            raise UserError(f"label_weight: {self.label_weight}; allowed are numbers from 0")
        self.largest([1])

    def largest(self, sizes: "list[int]") -> int:
        """How many studies of a cluster stay, where the clusters have so many."""
        text = str(self.cap).strip()
        if re.fullmatch(r"[1-9]\d*", text):
            return int(text)
        if (share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)) and float(share[1]) <= 100:
            return int(np.quantile(sizes, float(share[1]) / 100, method="lower")) if sizes else 0
        raise UserError(f"cap: '{self.cap}'; allowed are a count such as 200 or a quantile of the sizes such as 50%")


@dataclass(frozen=True)
class Cluster:
    """One cluster: the words that tell it from the rest, and its training studies."""

    terms: str
    samples: int
    kept: int


@dataclass(frozen=True)
class BalanceResult:
    """What was kept; counts are training studies."""

    url: str  # of the subset
    kept: int
    dropped: int
    clusters: int
    noise: int  # studies that are like no other
    rare: tuple[str, ...]  # labels
    cap: int  # studies of a cluster
    labels: dict[str, tuple[int, int]]  # with the label: before, after
    largest: tuple[Cluster, ...]
    picture: str  # file beside the shards
    seconds: float = field(compare=False)


@dataclass
class _Studies:
    """The training studies, as far as they are needed: reports and sets of labels once each, and who has which."""

    texts: list[str]
    text: Ints  # (n,)
    labels: list[tuple[tuple[str, int], ...]]  # distinct sets of (name, 1 or -1)
    label: Ints  # (n,)


def balance(
    url: str, settings: Settings = Settings(), progress: Progress = lambda done, total, what: None
) -> BalanceResult:
    """Write a subset of the shards at `url`, beside their manifest. Raises UserError."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    started = time.monotonic()
    store = Store(url)
    if store.subset is not None:
        raise UserError(f"{url}: is a subset; allowed is the folder of all samples, {store.url}")
    manifest = Manifest.load(store)
    index = manifest.load_index(store)
    rows = index.of_split("train")
    if not len(rows):
        raise UserError(f"{url}: no sample of split 'train' to balance; it has {manifest.splits}")
    studies = _read(store, manifest, index, rows, settings.vocabulary, progress)
    vectors = None if settings.embeddings is None else _embeddings(settings.embeddings, index.key[rows])
    with threadpool_limits(1):
        point, first = _points(studies, vectors, settings.label_weight > 0)
        weight = np.bincount(point)
        terms = _terms([studies.texts[n] for n in studies.text[first]])
        features = _features(studies, first, terms, None if vectors is None else vectors[first], settings)
        progress(0, 1, f"clustering {min(len(first), settings.fit)} of {len(first)} distinct reports")
        said = np.array([bool(text) for text in studies.texts])[studies.text[first]]
        own = np.zeros(len(first), bool) if vectors is not None else said & _wordless(terms, len(first))
        clusters = _by_size(_clusters(features, weight, own, settings), weight)
        progress(1, 1, "clustering")
        cluster = clusters[point]
        has = _has(studies)
        names = sorted(has)
        rare = tuple(name for name in names if 0 < has[name].sum() < settings.rare * len(rows))
        sizes = np.bincount(cluster[cluster >= 0])
        cap = settings.largest([int(size) for size in sizes])
        always = np.any([has[name] for name in rare], axis=0) if rare else np.zeros(len(rows), bool)
        kept = _choose(index.key[rows], cluster, always, cap, settings.seed)
        before, after = np.bincount(point), np.bincount(point, weights=kept).astype(np.int64)
        largest = _described(terms, clusters, before, after)
        from shards import cluster_picture

        progress(0, 1, "drawing")
        labels = {name: (int(has[name].sum()), int((has[name] & kept).sum())) for name in names}
        shown = _shown(before, cluster_picture.POINTS, settings.seed)
        picture = cluster_picture.draw(
            features[shown], clusters[shown], before[shown], after[shown],
            [(described.terms, described.samples, described.kept) for described in largest], labels, len(rows),
            f"{manifest.dataset}: {int(kept.sum()):,} of {len(rows):,} training studies kept",
        )  # fmt: skip
    result = BalanceResult(
        url=f"{store.url}#{settings.name}",
        kept=int(kept.sum()),
        dropped=int((~kept).sum()),
        clusters=len(sizes),
        noise=int((cluster == NOISE).sum()),
        rare=rare,
        cap=cap,
        labels=labels,
        largest=largest,
        picture=f"{settings.name}.png",
        seconds=time.monotonic() - started,
    )
    everything = np.sort(np.concatenate([rows[kept], np.flatnonzero(index.split != SPLITS.index("train"))]))
    subset, data = _assemble(manifest, index.take(everything), settings, result)
    store.write(result.picture, picture)
    store.write(subset.index.name, data)
    store.write(f"{settings.name}.json", subset.to_bytes())  # last: what it names is there
    progress(1, 1, "drawing")
    store.close()
    return result


# What is read


def _read(
    store: Store, manifest: Manifest, index: Index, rows: Ints, wanted: str | None, progress: Progress
) -> _Studies:
    """Read the descriptions, no image. The labels are those of one vocabulary."""
    texts: dict[str, int] = {}
    text = np.zeros(len(rows), np.int64)
    labels: dict[str, dict[tuple[tuple[str, int], ...], int]] = {}  # vocabulary -> distinct sets -> number
    label: dict[str, Ints] = {}
    said: Counter[str] = Counter()  # studies that a vocabulary says something of
    for place, sample in enumerate(_samples(store, manifest, index, rows)):
        report = _said(sample)
        text[place] = texts.setdefault(report, len(texts))
        for vocabulary, values in sample.labels.items():
            present = tuple(sorted((name, value) for name, value in values.items() if value in (1, -1)))
            sets = labels.setdefault(vocabulary, {(): 0})
            label.setdefault(vocabulary, np.zeros(len(rows), np.int64))[place] = sets.setdefault(present, len(sets))
            said[vocabulary] += any(value is not None for value in values.values())
        if place % CHUNK == 0 or place == len(rows) - 1:
            progress(place + 1, len(rows), "reading reports")
    if wanted is not None and wanted not in labels:
        allowed = ", ".join(sorted(labels)) or "none, as the samples have no labels"
        raise UserError(f"vocabulary: '{wanted}'{nearest(wanted, labels)}; allowed are {allowed}")
    if not any(texts) and not any(said.values()):
        raise UserError(f"{store.url}: neither reports nor labels to cluster by")
    most = max(sorted(labels), key=lambda vocabulary: said[vocabulary], default=None)
    chosen = wanted or ("chexpert" if most and 2 * said["chexpert"] >= said[most] > 0 else most)
    if chosen is None:
        return _Studies(list(texts), text, [()], np.zeros(len(rows), np.int64))
    return _Studies(list(texts), text, list(labels[chosen]), label[chosen])


def _said(sample: Sample) -> str:
    """The text that is learnt, without the headings that all reports have."""
    sections = (sample.report.findings, sample.report.impression, sample.report.other)
    return "\n".join(filter(None, (sample.question, sample.answer) if sample.question else sections))


def _samples(store: Store, manifest: Manifest, index: Index, rows: Ints) -> Iterator[Sample]:
    def load(row: int) -> Sample:
        key = index.key[row].decode()
        for member in index.members(row):
            if member.name == f"{key}.json":
                shard = manifest.shards[member.shard].name
                try:
                    data = store.read_range(shard, member.offset, member.length)
                    if crc32c(data) == member.crc32c:
                        return Sample.model_validate_json(data)
                    fault = "checksum differs from the index's"
                except (FileNotFoundError, ValidationError) as error:
                    fault = first_line(error)
                raise UserError(f"{store.url}/{shard}: {member.name}: {fault}; 'radhpc verify' names every fault")
        raise UserError(f"{store.url}: {key}: no description; 'radhpc verify' names every fault")

    with ThreadPoolExecutor(THREADS, thread_name_prefix="balance") as pool:
        for start in range(0, len(rows), CHUNK):
            yield from pool.map(load, rows[start : start + CHUNK].tolist())


def _embeddings(path: Path, keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.float32]:
    """The user's vectors, in the order of the keys."""
    try:
        with np.load(path, allow_pickle=False) as columns:
            given, vectors = columns["key"].astype("S").tolist(), np.asarray(columns["vector"], np.float32)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"embeddings: {path}: {first_line(error)}; allowed is a .npz of key and vector") from error
    if vectors.ndim != 2 or len(given) != len(vectors) or not np.isfinite(vectors).all():
        raise UserError(
            f"embeddings: {path}: {len(given)} keys, vector {vectors.shape}; allowed is one finite row each"
        )
    place = {key: number for number, key in enumerate(given)}
    missing = [key for key in keys.tolist() if key not in place]
    if missing:
        raise UserError(f"embeddings: {path}: no vector of {missing[0].decode()}, nor of {len(missing) - 1} others")
    return vectors[[place[key] for key in keys.tolist()]]


# What is clustered


def _points(studies: _Studies, vectors: npt.NDArray[np.float32] | None, labels: bool) -> tuple[Ints, Ints]:
    """(the point of each study, the first study of each point): one for equal reports, with equal `labels` if asked."""
    content = studies.text
    if vectors is not None:
        seen: dict[bytes, int] = {}
        content = np.array([seen.setdefault(vector.tobytes(), len(seen)) for vector in vectors])
    pairs = content * len(studies.labels) + studies.label if labels else content
    _, first, point = np.unique(pairs, return_index=True, return_inverse=True)
    return point, first


@dataclass(frozen=True)
class _Terms:
    names: list[str]
    weights: Any  # scipy.sparse (points, terms), rows of length 1 or 0


def _terms(texts: list[str]) -> _Terms | None:
    """TF-IDF of words and pairs of words. None where no word is there twice."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]

    often = max(2, len(texts) // 10_000)  # reports: a word of one alone tells nothing of likeness, but may be a name
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=often, max_features=TERMS, dtype=np.float32
    )
    try:
        weights = vectorizer.fit_transform(texts)
    except ValueError:  # no word at all, or none that often
        return None
    return _Terms(vectorizer.get_feature_names_out().tolist(), weights)


def _wordless(terms: _Terms | None, points: int) -> npt.NDArray[np.bool_]:
    """Which reports have no word of another: their vectors are zero, which does not make them alike."""
    return np.ones(points, bool) if terms is None else np.diff(terms.weights.indptr) == 0


def _features(
    studies: _Studies,
    first: Ints,
    terms: _Terms | None,
    vectors: npt.NDArray[np.float32] | None,
    settings: Settings,
) -> Floats:
    """(points, dimensions): the report's vector of length 1, then the labels' of length `label_weight`."""
    from sklearn.preprocessing import normalize  # type: ignore[import-untyped]

    parts: list[Floats] = []
    report = vectors if vectors is not None else terms.weights if terms is not None else None
    if report is not None:
        parts.append(normalize(_reduced(report)))
    names = {name: n for n, name in enumerate(sorted({name for labels in studies.labels for name, _ in labels}))}
    if names and settings.label_weight:
        sets = np.zeros((len(studies.labels), len(names)), np.float32)
        for number, labels in enumerate(studies.labels):
            for name, value in labels:
                sets[number, names[name]] = 1 if value == 1 else 0.5  # uncertain
        parts.append(settings.label_weight * _reduced(normalize(sets)[studies.label[first]]))
    if not parts:
        return np.zeros((len(first), 1))
    return np.asarray(np.round(np.hstack(parts), DECIMALS), np.float64)


def _reduced(matrix: Any) -> Floats:
    from sklearn.decomposition import TruncatedSVD  # type: ignore[import-untyped]

    dimensions = min(DIMENSIONS, min(matrix.shape) - 1)
    if matrix.shape[1] <= DIMENSIONS or dimensions < 1:
        return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, np.float64)
    return np.asarray(TruncatedSVD(dimensions, random_state=0).fit_transform(matrix), np.float64)


def _clusters(features: Floats, weight: Ints, own: npt.NDArray[np.bool_], settings: Settings) -> Ints:
    """(points,): the number of the cluster, or NOISE, as of the points of `own` words."""
    from sklearn.cluster import HDBSCAN  # type: ignore[import-untyped]

    clusters = np.full(len(features), NOISE, np.int64)
    likened = np.flatnonzero(~own)
    fitted = _spread(likened, settings.fit, settings.seed)
    if len(fitted) > max(settings.min_cluster_size, settings.min_samples):
        clusters[fitted] = HDBSCAN(
            min_cluster_size=settings.min_cluster_size,
            min_samples=settings.min_samples,
            cluster_selection_method="leaf",  # the default may take half of an archive for one cluster
            algorithm="kd_tree",  # memory in proportion to the points, not to their square
            n_jobs=1,
            copy=True,
        ).fit_predict(features[fitted])
        rest = np.setdiff1d(likened, fitted)
        if len(rest) and clusters.max() >= 0:
            clusters[rest] = _nearest(features[fitted], clusters[fitted], features[rest])
    alone = np.flatnonzero((clusters == NOISE) & (weight >= settings.min_cluster_size))
    clusters[alone] = clusters.max() + 1 + np.arange(len(alone))
    return clusters


def _nearest(fitted: Floats, clusters: Ints, rest: Floats) -> Ints:
    """The cluster of the nearest fitted point, where that is no farther than points of the cluster are apart."""
    from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]

    radius = np.zeros(clusters.max() + 1)
    for number in range(len(radius)):
        own = fitted[clusters == number]
        apart, _ = NearestNeighbors(n_neighbors=2, algorithm="kd_tree", n_jobs=1).fit(own).kneighbors(own)
        radius[number] = apart[:, 1].max()
    found = NearestNeighbors(n_neighbors=1, algorithm="brute", n_jobs=1).fit(fitted)
    distance, place = found.kneighbors(rest)
    near = clusters[place[:, 0]]
    return np.where((near >= 0) & (distance[:, 0] <= radius[near]), near, NOISE)


def _by_size(clusters: Ints, weight: Ints) -> Ints:
    """Numbered anew, so that 0 has most studies."""
    if clusters.max() < 0:
        return clusters
    inside = clusters >= 0
    sizes = np.bincount(clusters[inside], weights=weight[inside])
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return np.where(inside, rank[clusters], NOISE)


# What is kept


def _has(studies: _Studies) -> dict[str, npt.NDArray[np.bool_]]:
    """By label: which studies have it, uncertain ones left out."""
    names = {name for labels in studies.labels for name, value in labels if value == 1}
    return {name: np.array([(name, 1) in labels for labels in studies.labels], bool)[studies.label] for name in names}


def _choose(
    keys: npt.NDArray[np.bytes_], cluster: Ints, always: npt.NDArray[np.bool_], cap: int, seed: int
) -> npt.NDArray[np.bool_]:
    """All noise, all of `always`, and of each cluster up to `cap` studies, those of `always` first."""
    draw = np.array([_hash(seed, key) for key in keys.tolist()])
    order = np.lexsort((draw, ~always, cluster))
    starts = np.flatnonzero(np.diff(cluster[order], prepend=cluster[order][0] - 1))
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    kept = np.empty(len(keys), bool)
    kept[order] = place < cap
    return np.asarray(kept | always | (cluster == NOISE), bool)


def _hash(seed: int, key: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(b"%d/%b" % (seed, key), digest_size=8).digest(), "big"))


def _spread(places: Ints, count: int, seed: int) -> Ints:
    """So many of the places, ascending: always the same ones."""
    if len(places) <= count:
        return places
    draw = np.array([_hash(seed, b"%d" % place) for place in places.tolist()])
    return np.sort(places[np.argsort(draw, kind="stable")[:count]])


def _shown(weight: Ints, count: int, seed: int) -> Ints:
    """So many points for a picture: a third are those of most studies, as few points may stand for half of them."""
    heaviest = np.argsort(-weight, kind="stable")
    others = _spread(np.sort(heaviest[count // 3 :]), count - count // 3, seed)
    return np.sort(np.concatenate([heaviest[: count // 3], others]))


def _described(terms: _Terms | None, clusters: Ints, before: Ints, after: Ints, count: int = 12) -> tuple[Cluster, ...]:
    """The largest clusters, by the words that their reports have more of than all reports."""
    found = []
    for number in range(min(count, int(clusters.max()) + 1)):
        own = np.flatnonzero(clusters == number)
        words = ""
        if terms is not None:
            share = before[own] / before[own].sum()
            more = terms.weights[own].T @ share - terms.weights.T @ (before / before.sum())
            words = ", ".join(_best(terms.names, more))
        found.append(Cluster(words, int(before[own].sum()), int(after[own].sum())))
    return tuple(found)


def _best(names: list[str], weights: Floats, count: int = 3) -> list[str]:
    """The heaviest terms, without filling words (English), none of which holds a word of another."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # type: ignore[import-untyped]

    filling = ENGLISH_STOP_WORDS - {"no", "not", "without"}
    chosen: list[str] = []
    for number in np.argsort(-weights, kind="stable")[:200]:
        words = set(names[number].split())
        plain = not words & filling and words != {"no"}
        if plain and weights[number] > 0 and not any(words & set(other.split()) for other in chosen):
            chosen.append(names[number])
        if len(chosen) == count:
            break
    return chosen


def _assemble(manifest: Manifest, index: Index, settings: Settings, result: BalanceResult) -> tuple[Manifest, bytes]:
    data = index.to_bytes()
    given = {**asdict(settings), "embeddings": None}
    if settings.embeddings is not None:
        given["embeddings"] = sha256(settings.embeddings.read_bytes())
    outcome = {key: value for key, value in asdict(result).items() if key not in ("url", "seconds")}
    recipe = {
        **manifest.build,
        "balance": {
            "settings": given,
            "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
            "outcome": json.loads(json.dumps(outcome)),
        },
    }
    patients = {split: len(np.unique(index.patient[index.of_split(split)])) for split in SPLITS}
    skipped = {**manifest.skipped, f"{settings.name}: above the cap of a cluster": result.dropped}
    return manifest.model_copy(
        update={
            "samples": len(index),
            "splits": {split: len(index.of_split(split)) for split in SPLITS},
            "patients": patients,
            "index": File(name=f"{settings.name}.npz", size=len(data), sha256=sha256(data)),
            "build": recipe,
            "build_hash": sha256(json.dumps(recipe, sort_keys=True).encode()),
            "skipped": skipped,
            "fingerprints": None,  # a row for each image of the whole index
            "subset_of": manifest.hash,
        }
    ), data
