"""Finds images in two splits: near-duplicates by perceptual hash, within a dataset and across datasets.

A build makes the test split first, then validate, then train, and leaves out each study with a near-duplicate in
another split: in those made before, or in the datasets that --apart-from names. Datasets whose official splits share
images (ReaderOptions.shares_images), and --duplicates=report, keep such studies, and the build reports their number.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from radhpc.core.errors import UserError
from radhpc.core.manifest import FINGERPRINTS, Manifest, SampleIndex
from radhpc.core.sample import SPLITS, Split
from radhpc.storage.store import Store
from shards.images.perceptual_hash import LIMIT, near

BUILD_ORDER: tuple[Split, ...] = ("test", "validate", "train")  # in which a build makes the splits
ALL_PAIRS = tuple((split, other) for split in SPLITS for other in SPLITS)
DIFFERENT_SPLITS = tuple((split, other) for split, other in ALL_PAIRS if split != other)
REASON = "near-duplicate of an image in another split"


class SplitOverlap(NamedTuple):
    """The number of images of one split that nearly repeat an image of another."""

    split: Split
    other: Split  # of the other dataset, or of the same
    images: int
    total: int  # images in the split


@dataclass(frozen=True)
class ImageHashes:
    """Perceptual hashes of the images of a dataset, or of some of them."""

    fingerprint: npt.NDArray[np.uint8]  # (n, 32)
    split: npt.NDArray[np.uint8]  # (n,) position in radhpc.core.sample.SPLITS
    key: npt.NDArray[np.bytes_]  # (n,) of their samples

    def of(self, splits: Iterable[Split]) -> "ImageHashes":
        """Return the images of the given splits."""
        kept = np.isin(self.split, [SPLITS.index(split) for split in splits])
        return ImageHashes(self.fingerprint[kept], self.split[kept], self.key[kept])


def load(url: str) -> ImageHashes:
    """Load the hashes of finished shards. Raises UserError."""
    store = Store(url)
    manifest = Manifest.load(store)
    return hashes_of(store, manifest, manifest.load_index(store))


def hashes_of(store: Store, manifest: Manifest, index: SampleIndex) -> ImageHashes:
    """Load the hashes of shards whose index is loaded already. Raises UserError."""
    if manifest.fingerprints is None:
        raise UserError(f"{store.url}: has no {FINGERPRINTS}; build it again")
    fingerprints = manifest.load_fingerprints(store)
    images = np.repeat(np.arange(len(index)), np.diff(index.first) - 1)  # one member of each sample is its description
    if len(images) != len(fingerprints):
        raise UserError(f"{store.url}/{FINGERPRINTS}: {len(fingerprints)} images, but the index has {len(images)}")
    return ImageHashes(fingerprints, index.split[images], index.key[images])


def join(parts: Iterable[ImageHashes]) -> ImageHashes:
    """Concatenate the images of all parts."""
    parts = list(parts)
    empty = ImageHashes(np.zeros((0, 32), np.uint8), np.zeros(0, np.uint8), np.zeros(0, "S1"))
    return ImageHashes(*(np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in vars(empty)))


def save(path: Path, images: ImageHashes) -> None:
    """Write the images that one split must not repeat, for the build's workers."""
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **vars(images))


class ExcludedImages:
    """The images that the split under construction must not repeat."""

    def __init__(self, path: Path) -> None:
        self._images = join([])
        if path.exists():
            with np.load(path, allow_pickle=False) as columns:
                self._images = ImageHashes(**{name: columns[name] for name in columns.files})

    def find(self, fingerprints: Sequence[bytes]) -> str | None:
        """Return "KEY in SPLIT" of the first sample of another split that one of these images repeats, or None."""
        hashes = np.frombuffer(b"".join(fingerprints), np.uint8).reshape(-1, 32)
        pairs = near(hashes, self._images.fingerprint, LIMIT)
        if not len(pairs):
            return None
        first = min(int(other) for _, other in pairs)
        return f"{self._images.key[first].decode()} in {SPLITS[self._images.split[first]]}"


def leaks(images: ImageHashes) -> Iterator[str]:
    """Yield a message for each split with near-duplicates of images of a split that is built before it."""
    before = [(split, other) for number, split in enumerate(BUILD_ORDER) for other in BUILD_ORDER[:number]]
    for split, other, count, total in overlaps(images, images, before):
        yield f"{count} of {total} images in {split} are near-duplicates of images in {other}"


def overlaps(
    ours: ImageHashes, theirs: ImageHashes, pairs: Iterable[tuple[Split, Split]] = ALL_PAIRS
) -> Iterator[SplitOverlap]:
    """Compare each image of our split with each image of their split, for the given pairs of splits."""
    for split, other in pairs:
        hashes, counts = np.unique(ours.of([split]).fingerprint, axis=0, return_counts=True)
        others = np.unique(theirs.of([other]).fingerprint, axis=0)
        if len(hashes) and len(others):
            repeated = np.unique(near(hashes, others, LIMIT)[:, 0])
            if len(repeated):
                yield SplitOverlap(split, other, int(counts[repeated].sum()), int(counts.sum()))
