"""Name the namespace of a dataset's patients, and leave out those who are in another split of other datasets.

    namespace("mimic_cxr_jpg", "mimic_cxr_jpg", None)     # "mimic": that of the family of archives
    namespace("image_text", "vqa", None)                  # "vqa"; people=mimic says whose patients they are

The readers of one hospital's archives have one namespace, so that their patients can be compared; the hashes that name
patients in the shards and decide their splits stay those of the dataset's name, unless people=NAME is given. Then both
are of that namespace, and datasets without official splits put a patient into the same one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from radhpc.core.people import DatasetPatients, shared_patients
from radhpc.core.sample import SPLITS, Split, salted_hash
from radhpc.storage.store import Store

# The public archives, by reader. image_text and the readers of other packages have their dataset's name.
FAMILIES = {
    "chestxray14": "chestxray14", "chexpert": "chexpert", "chexpert_plus": "chexpert", "mimic_cxr": "mimic",
    "mimic_cxr_jpg": "mimic", "openi": "openi", "padchest": "padchest", "pathvqa": "pathvqa", "roco_v2": "roco_v2",
    "slake": "slake", "vqa_rad": "vqa_rad",
}  # fmt: skip
# The forms in which tables name a family's patients, and the form of its readers.
_FORMS = {
    "mimic": (re.compile(r"[pP]?(\d{8})"), r"\1"),  # p10000032 is a folder's name, 10000032 a column's
    "chexpert": (re.compile(r"(?:patient)?(\d{5})"), r"patient\1"),
    "chestxray14": (re.compile(r"0*(\d+)"), r"\1"),  # 00000001_000.png is of patient 1
}
REASON = "patient who is in another split of a dataset to be apart from"


def namespace(dataset: str, name: str, people: str | None) -> str:
    """Return the namespace of the patients of a reader's dataset; `people` as the user gave it."""
    return people or FAMILIES.get(dataset, name)


def canonical(people: str, patient: str) -> str:
    """Return a raw identifier in the form that the readers of its family give it."""
    if people not in _FORMS:
        return patient
    pattern, form = _FORMS[people]
    match = pattern.fullmatch(patient.strip())
    return match.expand(form) if match else patient


@dataclass(frozen=True)
class Pseudonyms:
    """The salted hashes that stand for the identifiers of a dataset."""

    name: str  # of the dataset
    people: str  # the namespace of its patients
    chosen: bool  # by people=NAME: then it decides the splits, too
    salt: bytes

    def study(self, raw: str) -> str:
        return salted_hash(self.salt, self.name, "study", raw)

    def skipped(self, raw: str) -> str:
        """Return the hash of the name of a study that is left out."""
        return salted_hash(self.salt, self.name, "skipped", raw)

    def patient(self, raw: str) -> str:
        """Return the hash that stands in the shards and decides the split."""
        return self.person(raw) if self.chosen else salted_hash(self.salt, self.name, "patient", raw)

    def person(self, raw: str) -> str:
        """Return the hash that patients of several datasets are compared by."""
        return salted_hash(self.salt, self.people, "patient", canonical(self.people, raw))


class ExcludedPatients:
    """The patients whom the split under construction must not hold."""

    def __init__(self, path: Path) -> None:
        self._patients: frozenset[bytes] = frozenset()
        if path.exists():
            with np.load(path, allow_pickle=False) as columns:
                self._patients = frozenset(columns["patient"].tolist())

    def holds(self, *hashes: str) -> bool:
        """Return whether a patient is one of them, by any of these hashes."""
        return any(value.encode() in self._patients for value in hashes)


def save_excluded(path: Path, split: Split, apart: Sequence[DatasetPatients]) -> None:
    """Write the patients of the other splits of the datasets to be apart from, for the build's workers."""
    columns = [np.zeros(0, "S1")]
    for dataset in apart:
        elsewhere = dataset.index.split != SPLITS.index(split)
        columns += [dataset.index.people[elsewhere], dataset.index.patient[elsewhere]]
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, patient=np.unique(np.concatenate(columns)))


def load(url: str) -> DatasetPatients:
    """Load the patients of finished shards. Raises UserError."""
    return DatasetPatients.load(Store(url))


def overlaps(ours: DatasetPatients, theirs: DatasetPatients) -> Iterator[str]:
    """Yield a message for each split with patients who are in another split of the other dataset."""
    for part in shared_patients(ours.index, theirs.index):
        yield f"{part.patients} of {part.total} patients in {part.split} are in {part.other} of {theirs.url}"
