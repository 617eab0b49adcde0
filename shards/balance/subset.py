"""Balances a training split: writes a subset of finished shards that repeats fewer reports, beside their manifest.

    result = balance("/data/padchest", BalanceSettings(cap="50%"), lambda done, total, phase: None)
    result.url                  # "/data/padchest#balanced": what a recipe names in `shards`
    result.kept, result.dropped, result.clusters, result.noise, result.labels["Edema"]      # (before, after)

    /data/padchest/balanced.json, balanced.npz    the manifest and the index of the subset
    /data/padchest/balanced.png                   the clusters, what was kept of them, and the labels before and after

Most reports of a chest archive say that nothing is wrong, in few words: 59 of 100 PadChest reports are word for word
those of another study. Reports are clustered by their text and their labels, and each cluster keeps at most `cap`
studies. Three kinds of study always stay: those that are like no other (the noise of HDBSCAN), those with a rare
label, and all of validate and test, so that scores on the subset and on the whole can be compared.

Report -> TF-IDF of words and pairs of words -> truncated SVD (Deerwester et al., 1990), or vectors of the user's own
-> concatenated with the weighted labels -> HDBSCAN (Campello et al., 2013). Reports with equal text and labels are
one point. Of more than `fit` points, `fit` are clustered, and each other point joins the cluster of its nearest
neighbour if it lies no farther from it than that cluster's own points lie from theirs; else it is noise. HDBSCAN does
not weigh points by their studies: a noise point of at least `min_cluster_size` studies becomes a cluster of its own.

The same shards and settings give the same bytes, on one machine with one set of versions: linear algebra runs in one
thread, and features are rounded.
"""

import importlib.metadata
import json
import time
from dataclasses import asdict

import numpy as np

from radhpc.core import formats
from radhpc.core.errors import UserError
from radhpc.core.manifest import FileEntry, Manifest, SampleIndex, sha256
from radhpc.core.sample import SPLITS
from radhpc.storage.store import Store
from shards.balance import picture
from shards.balance.clusters import (
    describe_largest,
    distinct_points,
    extract_terms,
    features_of,
    find_clusters,
    number_by_size,
    without_shared_terms,
)
from shards.balance.selection import NOISE, points_to_draw, select
from shards.balance.settings import BalanceResult, BalanceSettings
from shards.balance.studies import BalanceProgress, load_embeddings, read_studies, studies_with_label

DEFAULTS = BalanceSettings()
VERSIONED = ("numpy", "scipy", "scikit-learn")  # their versions may change the clusters


def balance(
    url: str, settings: BalanceSettings = DEFAULTS, progress: BalanceProgress = lambda done, total, phase: None
) -> BalanceResult:
    """Write a subset of the shards at `url`, beside their manifest.

    Raises UserError for a subset, for shards without training samples, and for settings that do not fit the data.
    """
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
    studies = read_studies(store, manifest, index, rows, settings.vocabulary, progress)
    vectors = None if settings.embeddings is None else load_embeddings(settings.embeddings, index.key[rows])
    with threadpool_limits(1):
        point, first = distinct_points(studies, vectors, settings.label_weight > 0)
        weight = np.bincount(point)
        terms = extract_terms([studies.texts[n] for n in studies.text[first]])
        features = features_of(studies, first, terms, None if vectors is None else vectors[first], settings)
        progress(0, 1, f"clustering {min(len(first), settings.fit)} of {len(first)} distinct reports")
        has_text = np.array([bool(text) for text in studies.texts])[studies.text[first]]
        unlike = np.zeros(len(first), bool)  # points that no other point is like
        if vectors is None:
            unlike = has_text & without_shared_terms(terms, len(first))
        clusters = number_by_size(find_clusters(features, weight, unlike, settings), weight)
        progress(1, 1, "clustering")
        cluster = clusters[point]
        has_label = studies_with_label(studies)
        names = sorted(has_label)
        rare = tuple(name for name in names if 0 < has_label[name].sum() < settings.rare * len(rows))
        sizes = np.bincount(cluster[cluster >= 0])
        cap = settings.cap_for([int(size) for size in sizes])
        always = np.any([has_label[name] for name in rare], axis=0) if rare else np.zeros(len(rows), bool)
        kept = select(index.key[rows], cluster, always, cap, settings.seed)
        before, after = np.bincount(point), np.bincount(point, weights=kept).astype(np.int64)
        largest = describe_largest(terms, clusters, before, after)
        progress(0, 1, "drawing")
        labels = {name: (int(has_label[name].sum()), int((has_label[name] & kept).sum())) for name in names}
        shown = points_to_draw(before, picture.POINTS, settings.seed)
        drawing = picture.draw(
            features[shown], clusters[shown], before[shown], after[shown],
            [(summary.terms, summary.samples, summary.kept) for summary in largest], labels, len(rows),
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
    subset_rows = np.sort(np.concatenate([rows[kept], np.flatnonzero(index.split != SPLITS.index("train"))]))
    subset, data = _subset_manifest(manifest, index.take(subset_rows), settings, result)
    store.write(result.picture, drawing)
    store.write(subset.index.name, data)
    store.write(f"{settings.name}.json", subset.to_bytes())  # last: the files that it names exist by now
    progress(1, 1, "drawing")
    store.close()
    return result


def _subset_manifest(
    manifest: Manifest, index: SampleIndex, settings: BalanceSettings, result: BalanceResult
) -> tuple[Manifest, bytes]:
    """Return the manifest of the subset and the bytes of its index."""
    data = index.to_bytes()
    recorded = {**asdict(settings), "embeddings": None}
    if settings.embeddings is not None:
        recorded["embeddings"] = sha256(settings.embeddings.read_bytes())
    outcome = {key: value for key, value in asdict(result).items() if key not in ("url", "seconds")}
    recipe = {
        **manifest.build,
        "balance": {
            "settings": recorded,
            "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
            "outcome": json.loads(json.dumps(outcome)),
        },
    }
    patients = {split: len(np.unique(index.patient[index.of_split(split)])) for split in SPLITS}
    skipped = {**manifest.skipped, f"{settings.name}: above the cap of a cluster": result.dropped}
    return manifest.model_copy(
        update={
            "format": formats.MANIFEST,
            "samples": len(index),
            "splits": {split: len(index.of_split(split)) for split in SPLITS},
            "patients": patients,
            "index": FileEntry(name=f"{settings.name}.npz", size=len(data), sha256=sha256(data)),
            "build": recipe,
            "build_hash": sha256(json.dumps(recipe, sort_keys=True).encode()),
            "skipped": skipped,
            "fingerprints": None,  # a row for each image of the whole index
            "subset_of": manifest.hash,
        }
    ), data
