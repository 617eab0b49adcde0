"""NIH ChestX-ray14 (Wang et al., CVPR 2017, arXiv:1705.02315): 112,120 frontal radiographs, 14 labels, no reports.

    Data_Entry_2017_v2020.csv         Image Index, Finding Labels, Follow-up #, Patient ID, ..., View Position, ...
    train_val_list.txt  test_list.txt                   the official split, one image a line
    images_001/images/00000001_000.png ... images_012/images/, or all of them in one folder

The header has commas inside brackets, `OriginalImage[Width,Height]`, so it is split into 11 columns, like the rows. Age
and sex are not read. The official split has no validation set: a share of the patients of train_val_list.txt is held
out for it, those whose SHA-256 lies in the first `validate_share` of its range. Labels were mined from reports that
were never published: 0 means that no finding was mentioned.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import Field

from radhpc.core.errors import UserError, first_line
from radhpc.core.sample import CHEXPERT, Split
from shards import raw_files, splits
from shards.datasets.helpers import labels as _labels
from shards.datasets.helpers.images import files, folders_with
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, unusable_study
from shards.tabular import cells, external_sort, identifiers, table

SYNTHETIC = False

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
BOXES = "BBox_List_2017.csv"
LISTS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}
COLUMNS = ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "View Position")
MAX_LIST = 1 << 26  # bytes of a list of images: the real ones have less than two million
IMAGE = re.compile(r"\d{8}_\d{3}\.png")
NAMES = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia", _labels.NO_FINDING,
)  # fmt: skip
# CheXpert's name: ours, any of which makes it present. Infiltration has no counterpart there.
SHARED: dict[str, tuple[str, ...]] = {
    **{
        name: (name,)
        for name in ("No Finding", "Cardiomegaly", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax")
    },
    "Pleural Effusion": ("Effusion",),
    "Lung Lesion": ("Nodule", "Mass"),
}


class ChestXray14Options(_labels.LabelOptions):
    """chestxray14: frontal radiographs with 14 labels."""

    validate_share: float = Field(
        0.1, ge=0, lt=1, description="share of the patients in train_val_list.txt that validate: 0 to below 1"
    )


OPTIONS = ChestXray14Options


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield one study for each row. Raises UserError for a table, a list or a folder that cannot be read."""
    assert isinstance(options, ChestXray14Options)
    path = table.locate(raw, TABLES, "ChestX-ray14's table")
    folder = path.parent
    find = find_images(folder)
    lists = find_lists(folder)
    _labels.warn_of_empty_reports("ChestX-ray14", options)
    _warn_of_split(folder, lists, options)
    _warn_of_boxes(folder)
    for record in table.stream(path, COLUMNS):
        yield _study(record, f"{path.name} {record.where}", find, lists, options)


def find_images(folder: Path) -> Callable[[str], Path | None]:
    """Return a function from an image's name to its file, or None for a missing one. Raises UserError without images.

    In a single folder the file is not looked up: it is found missing when it is opened.
    """
    holding = folders_with(folder, IMAGE)
    if not holding:
        raise UserError(f"{folder}: no images there; looked for files such as images_001/images/00000001_000.png")
    if len(holding) == 1:
        return holding[0].joinpath
    index = external_sort.Lookup((path.name, path) for place in holding for path in files(place, (".png",), depth=0))
    return index.get


def find_lists(folder: Path) -> external_sort.Lookup | None:
    """Map each image to the official list that names it. None without any list. Raises UserError."""
    paths = {name: folder / file for name, file in LISTS.items()}
    present = [path for path in paths.values() if path.is_file()]
    if not present:
        return None
    if len(present) == 1:
        missing = next(path.name for path in paths.values() if path not in present)
        raise UserError(f"{folder}: {present[0].name} is there, {missing} is not; the official split needs both")
    lists = external_sort.Lookup((image, name) for name, path in paths.items() for image in _lines(path))
    if lists.repeated:
        raise UserError(f"{folder}: {lists.repeated} images are listed twice in {' and '.join(LISTS.values())}")
    return lists


def held_out(patient: str, share: float) -> bool:
    """Return whether a patient of the official training set validates.

    Patient numbers are public, so the hash needs no salt.
    """
    return splits.position(hashlib.sha256(f"chestxray14 validate {patient}".encode()).hexdigest()) < share


def _lines(path: Path) -> Iterator[str]:
    try:
        text = raw_files.read(path, MAX_LIST).decode("utf-8-sig")
        yield from filter(None, map(str.strip, text.splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def _study(
    record: table.Record,
    where: str,
    find: Callable[[str], Path | None],
    lists: external_sort.Lookup | None,
    options: ChestXray14Options,
) -> RawStudy:
    if record.fault:
        return unusable_study(where, record.fault)
    image, findings, follow_up, patient, view = (cells.known(record.values[name]) for name in COLUMNS)
    patient, follow_up = map(identifiers.identifier, (patient, follow_up))
    present = {name.strip() for name in findings.split("|")}
    if not IMAGE.fullmatch(image):
        return unusable_study(where, "unknown form of image name")
    if not patient.isdecimal():
        return unusable_study(where, "patient that is no number")
    patient = str(int(patient))  # image names have leading zeros, and some copies of the table too
    if not present <= set(NAMES):
        return unusable_study(where, "unknown label")
    if _labels.NO_FINDING in present and len(present) > 1:
        return unusable_study(where, "findings beside No Finding")
    listed = lists.get(image) if lists is not None else None
    if lists is not None and not listed:
        return unusable_study(image, "in neither official list")
    path = find(image)
    if path is None:
        return unusable_study(image, "missing image file")
    labels: dict[str, int | None] = {name: int(name in present) for name in NAMES}
    return RawStudy(
        study=f"{patient}/{follow_up}",
        patient=patient,
        views=((path, view or None),),
        name=image,
        split=_split(listed, patient, options) if listed else None,
        report=_labels.report(labels, options, absent=False),
        labels={"chestxray14": labels, "chexpert": _chexpert(present)},
    )


def _split(listed: str, patient: str, options: ChestXray14Options) -> Split:
    if listed == "test":
        return "test"
    return "validate" if held_out(patient, options.validate_share) else "train"


def _chexpert(present: set[str]) -> dict[str, int | None]:
    return {name: int(bool(present & set(SHARED[name]))) if name in SHARED else None for name in CHEXPERT}


def _warn_of_split(folder: Path, lists: external_sort.Lookup | None, options: ChestXray14Options) -> None:
    if lists is not None:
        text = (
            f"the official split has no validation set: {options.validate_share:.0%} of the patients in "
            f"{LISTS['train_val']} validate (validate_share)"
        )
    else:
        text = f"{folder.name}: no {' and '.join(LISTS.values())}, so patients are split by their hash, not officially"
    warnings.warn(text, DatasetWarning, stacklevel=3)


def _warn_of_boxes(folder: Path) -> None:
    path = table.find_one(folder, (BOXES,))
    if path:
        count = sum(1 for _ in table.stream(path, ("Image Index",)))
        warnings.warn(f"{path.name}: its {count} boxes are not carried into the shards", DatasetWarning, stacklevel=3)
