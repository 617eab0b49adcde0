"""Parses paths, projections and labels of CheXpert and CheXpert Plus, and finds their images.

    CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg

Only the path names the patient. On the disk the first folder may have another name or be missing, the file may
be a .png or .dcm, and the four archives of the full-size release are four folders, three of which hold patients of
the training set without a folder `train`.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from radhpc.core.errors import UserError
from radhpc.core.sample import CHEXPERT, Split
from shards import splits
from shards.datasets.helpers.images import entries, files, folders_with
from shards.datasets.reader import ReaderOptions, UnusableRecord
from shards.tabular import cells

SUFFIXES = (".jpg", ".png", ".dcm")  # in the order of preference, where a folder has several
PATIENT = re.compile(r"patient\d+")
PATH = re.compile(
    r"(?:(?P<prefix>.+)/)?(?P<split>train|valid|test)/(?P<patient>patient\d+)/(?P<study>study\d+)/(?P<image>[^/\0]+\.[a-z]+)"
)
Labels = tuple[int | None, ...]  # in the order of CHEXPERT: a tuple, for there are many rows
VALUES: dict[object, int | None] = {
    "1.0": 1, "0.0": 0, "-1.0": -1, "": None, "1": 1, "0": 0, "-1": -1, 1: 1, 0: 0, -1: -1, None: None,
}  # fmt: skip
SIDES = {"frontal": "Frontal", "lateral": "L"}


class ImageOptions(ReaderOptions):
    """The option of both readers."""

    images: str | None = Field(None, description="the folder of the images in --raw, where it holds several sets")


@dataclass(frozen=True)
class ImagePath:
    """A path of the tables, parsed."""

    prefix: str | None
    split: str  # the folder: train, valid or test
    patient: str
    study: str  # of this patient: study1, study2, ...
    image: str

    @property
    def key(self) -> str:
        """The identifier of the study, unique in the dataset."""
        return f"{self.patient}/{self.study}"


def parse_path(text: str) -> ImagePath:
    """Parse a path of the tables. Raises UnusableRecord."""
    match = PATH.fullmatch(text.strip())
    if not match:
        raise UnusableRecord("path without a patient and a study")
    return ImagePath(**match.groupdict())


def official_split(where: ImagePath) -> Split:
    """Return the split that the path's folder names."""
    return splits.WORDS[where.split]


def parse_labels(values: Mapping[str, object]) -> Labels:
    """Parse the fourteen labels of a row, in CheXpert's order; a missing column is None. Raises UnusableRecord."""
    row = [values.get(name) for name in CHEXPERT]
    try:
        return tuple([VALUES[value] for value in row])  # nearly all rows: there are many
    except (KeyError, TypeError):
        pass
    try:
        return tuple([None if cells.is_empty(value) else VALUES[str(value).strip()] for value in row])
    except KeyError:
        raise UnusableRecord("a label other than 1, 0, -1 and empty") from None


def projection(side: str, position: str, image: str) -> str | None:
    """Return AP, PA, LL or RL from the table, else L for a lateral view and Frontal for any other known one.

    `side` is Frontal or Lateral, or empty where the table has no such column: then the file's name decides.
    """
    if not cells.is_empty(position):
        return position.strip().upper()
    return SIDES.get(cells.known(side).lower() or image.rpartition(".")[0].rpartition("_")[2])


@dataclass(frozen=True)
class ImageRoot:
    """A folder whose entries are patients' folders, and the kind of images in them."""

    folder: Path
    suffix: str


class ImageFinder:
    """Find the file of a path by its folder's name alone, unless several folders hold patients of one split."""

    def __init__(self, folder: Path, chosen: str | None, example: ImagePath | None) -> None:
        """Look for the patients below `folder`, or below its subfolder `chosen`. Raises UserError."""
        if chosen is not None and not (folder / chosen).is_dir():
            raise UserError(f"images={chosen}: no such folder in {folder}")
        start = folder / chosen if chosen else folder
        sibling = folder.parent / example.prefix if example and example.prefix else None
        roots = _find_roots(start)
        if not roots and not chosen and sibling and sibling.is_dir():
            roots = _find_roots(sibling)
        if not roots:
            raise UserError(f"{start}: no images there; looked for folders such as train/patient00001/study1")
        named: dict[str, list[ImageRoot]] = {}
        for root in roots:
            named.setdefault(root.folder.name if root.folder.name in splits.WORDS else "", []).append(root)
        for split, several in named.items():
            if len(several) > 1 and (split or len({root.suffix for root in several}) > 1):
                shown = ", ".join(str(root.folder.relative_to(start)) for root in several)
                raise UserError(f"{start}: several sets of images: {shown}; choose with images=FOLDER")
        self._named, self._last, self._start = named, roots[0], start

    @property
    def dicom(self) -> bool:
        """Return whether the images are DICOM files."""
        return self._last.suffix == ".dcm"

    def path(self, where: ImagePath) -> Path:
        """Return the expected path of an image; a missing file is noticed when it is opened."""
        root = self._root(where)
        folder = root.folder if root else self._start / where.split
        suffix = root.suffix if root else self._last.suffix
        return folder.joinpath(where.patient, where.study, where.image.rpartition(".")[0] + suffix)

    def _root(self, where: ImagePath) -> ImageRoot | None:
        if where.split in self._named:
            return self._named[where.split][0]
        roots = self._named.get("", [])
        if len(roots) <= 1:
            return roots[0] if roots else None
        for root in itertools.chain((self._last,), roots):  # rows come patient by patient: mostly the last one again
            if root in roots and (root.folder / where.patient).is_dir():
                self._last = root
                return root
        return None


def _find_roots(folder: Path) -> list[ImageRoot]:
    return [
        ImageRoot(path, suffix) for path in folders_with(folder, PATIENT, of_folders=True) if (suffix := _suffix(path))
    ]


def _suffix(folder: Path) -> str | None:
    """Return the suffix of a folder's images: of its first patient, or of any other if the first has none."""
    first = folder / min(patient.name for patient in _patients(folder))
    for patient in itertools.chain((first,), _patients(folder)):
        kinds = {path.suffix.lower() for path in files(patient, SUFFIXES)}
        if kinds:
            return next(suffix for suffix in SUFFIXES if suffix in kinds)
    return None


def _patients(folder: Path) -> Iterator[Path]:
    return (folder / entry.name for entry in entries(folder) if PATIENT.fullmatch(entry.name) and entry.is_dir())
