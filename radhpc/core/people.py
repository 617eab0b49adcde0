"""Compare the patients of several datasets: no patient may be in two splits, whichever dataset each split is of.

    datasets = [DatasetPatients.load(Store("/data/mimic")), DatasetPatients.load(Store("/data/vqa"))]
    refuse_shared_patients(datasets)                  # UserError: 3 of 40 patients in train in test there
    warning = describe_incomparable(combinations(datasets, 2))  # None, or why some of them cannot be compared

Patients are salted hashes in a namespace (`people` of the manifest): two datasets of one hospital have one namespace,
while patient 7 of one hospital is not patient 7 of another. Hashes of different namespaces, or of different salts,
never agree, so that nothing can be said about such a pair. The manifest holds a digest of the salt, which tells equal
salts, and nothing else.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest, ManifestStore, SampleIndex
from radhpc.core.sample import SPLITS, Split

# Public archives of different hospitals: they share no patients, so there is nothing to warn about.
APART = frozenset({"mimic", "padchest", "chexpert", "chestxray14", "openi"})


@dataclass(frozen=True)
class DatasetPatients:
    """One dataset of a comparison."""

    url: str
    manifest: Manifest
    index: SampleIndex

    @classmethod
    def load(cls, store: ManifestStore) -> Self:
        """Read the manifest and the index of a dataset or a subset. Raises UserError."""
        manifest = Manifest.load(store)
        return cls(
            store.url if store.subset is None else f"{store.url}#{store.subset}", manifest, manifest.load_index(store)
        )

    @property
    def people(self) -> str:
        """The namespace of its patients; manifests of format 1 have none but the dataset's name."""
        return self.manifest.people or self.manifest.dataset

    @property
    def namespaces(self) -> set[str]:
        """The namespaces that its patients have hashes in."""
        return {self.people} if self.index.person is None else {self.people, self.manifest.dataset}

    @property
    def salt(self) -> str | None:
        """The digest of the salt of its hashes, or None where the manifest does not tell."""
        digest = self.manifest.build.get("salt")
        return digest if isinstance(digest, str) else None


class SharedPatients(NamedTuple):
    """The number of patients of one split of a dataset who are in another split, of the same dataset or another."""

    split: Split
    other: Split
    patients: int
    total: int  # patients in the split


class _Splits(NamedTuple):
    """The splits of each patient."""

    patient: npt.NDArray[np.bytes_]  # (n,) ascending
    mask: npt.NDArray[np.uint8]  # (n,) bit i: the patient is in SPLITS[i]


def shared_patients(ours: SampleIndex, theirs: SampleIndex) -> Iterator[SharedPatients]:
    """Yield the numbers of patients of each split who are in another split of the other dataset.

    Equal hashes are the same patient, whatever the manifests say: both the hashes in the namespace and those that
    decided the splits are compared, which differ where an archive's namespace is not its name.
    """
    columns = [(ours.people, theirs.people)]
    if ours.person is not None or theirs.person is not None:
        columns.append((ours.patient, theirs.patient))
    sides = [(_splits_of(our, ours.split), _splits_of(their, theirs.split)) for our, their in columns]
    for (place, split), (other_place, other) in itertools.permutations(enumerate(SPLITS), 2):
        counts = []
        for our, their in sides:
            in_split = (our.mask >> place & 1).astype(bool)
            in_other = (their.mask >> other_place & 1).astype(bool)
            common = np.intersect1d(our.patient[in_split], their.patient[in_other], assume_unique=True)
            counts.append((len(common), int(in_split.sum())))
        patients, total = max(counts)
        if patients:
            yield SharedPatients(split, other, patients, total)


def _splits_of(patients: npt.NDArray[np.bytes_], split: npt.NDArray[np.uint8]) -> _Splits:
    unique, inverse = np.unique(patients, return_inverse=True)
    mask = np.zeros(len(unique), np.uint8)
    np.bitwise_or.at(mask, inverse, np.left_shift(1, split).astype(np.uint8))
    return _Splits(unique, mask)


def refuse_shared_patients(datasets: Sequence[DatasetPatients]) -> None:
    """Refuse a patient in two splits, across all the datasets. Raises UserError."""
    for ours, theirs in itertools.combinations_with_replacement(datasets, 2):
        shared = list(shared_patients(ours.index, theirs.index))
        if not shared:
            continue
        if ours is theirs:
            first = shared[0]
            raise UserError(
                f"{ours.url}: {_count(first.patients)} in {first.split} and in {first.other}; a patient may be in one "
                "split only: 'radhpc verify' names them"
            )
        listed = ", ".join(f"{part.patients} of {part.total} in {part.split} are in {part.other}" for part in shared)
        raise UserError(
            f"{ours.url}: patients who are in another split in {theirs.url}: {listed} there; a patient may be in one "
            "split only: build one of the two with --apart-from the other"
        )


def describe_incomparable(pairs: Iterable[tuple[DatasetPatients, DatasetPatients]]) -> str | None:
    """Return why the patients of some pairs of datasets cannot be compared, in one line, or None where all can."""
    reasons = []
    for ours, theirs in pairs:
        if {ours.people, theirs.people} <= APART and ours.people != theirs.people:
            continue
        if not ours.namespaces & theirs.namespaces:
            reasons.append(
                f"{ours.url} (people={ours.people}) and {theirs.url} (people={theirs.people}) have other namespaces; "
                "if their patients are of one hospital, build both with the same people=NAME"
            )
        elif ours.salt != theirs.salt or ours.salt is None:
            reasons.append(
                f"{ours.url} and {theirs.url} (people={ours.people}) have hashes of other salts, or of salts that are "
                "not known; build both with one salt (RADHPC_SALT_FILE)"
            )
    if not reasons:
        return None
    more = f"; and {len(reasons) - 1} more pairs" if len(reasons) > 1 else ""
    return f"patients cannot be compared, and may be in two splits unseen: {reasons[0]}{more}"


def _count(patients: int) -> str:
    return f"{patients} patient is" if patients == 1 else f"{patients} patients are"
