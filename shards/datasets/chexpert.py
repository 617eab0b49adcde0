"""CheXpert (Irvin et al., AAAI 2019, arXiv:1901.07031): frontal and lateral radiographs with 14 labels, no reports.

    train.csv  valid.csv  [test.csv]     Path, Sex, Age, Frontal/Lateral, AP/PA, No Finding, ... Support Devices
    train/patient00001/study1/view1_frontal.jpg

In --raw lie the tables, or one folder that holds them. The images lie anywhere below, also in the four folders of
the full-size release (`CheXpert-v1.0 batch 1 (validate & csv)` to `batch 4 (train 3)`, then --raw holds all four).
The split is that of the table. The test set's labels may also be CheXlocalize's test_labels.csv, which has no views
but those in the file names. Sex and age are not read. The labels are those of the study, the same on all of its views.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from radhpc.core.errors import UserError
from radhpc.core.sample import CHEXPERT, Split
from shards.datasets.helpers import chexpert, labels as _labels
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import external_sort, table

SYNTHETIC = False

TABLES: dict[Split, tuple[str, ...]] = {
    "train": ("train.csv",),
    "validate": ("valid.csv", "val_labels.csv"),
    "test": ("test.csv", "test_labels.csv"),
}
SIDE, POSITION = "Frontal/Lateral", "AP/PA"
CheXpertRow = tuple[Split, str, str | None, chexpert.Labels]  # a row: split, path, projection, labels


class CheXpertOptions(chexpert.ImageOptions, _labels.LabelOptions):
    """chexpert: radiographs with 14 labels."""

    train: str = Field(
        "train.csv",
        description="the table of the training set: train.csv, or train_cheXbert.csv or train_visualCheXbert.csv",
    )


OPTIONS = CheXpertOptions


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies of all tables. Raises UserError for a table or a folder that cannot be read."""
    assert isinstance(options, CheXpertOptions)
    tables = find_tables(raw, options.train)
    assert raw is not None
    folder = raw.parent if raw.is_file() else raw
    _labels.warn_of_empty_reports("CheXpert", options)
    for split, names in TABLES.items():
        if split not in tables:
            warnings.warn(
                f"{tables['train'].parent.name}: no {names[0]}, so the split '{split}' is empty",
                DatasetWarning,
                stacklevel=2,
            )
    images = chexpert.ImageFinder(folder, options.images, _example(tables["train"]))
    for _, items in external_sort.grouped(_rows(tables)):
        yield items[0] if isinstance(items[0], RawStudy) else _study(items, images, options)


def find_tables(raw: Path | None, train: str) -> dict[Split, Path]:
    """Find the tables of the splits; that of the training set must be present. Raises UserError."""
    description = "CheXpert's tables"
    if raw is not None and raw.is_dir() and not table.find_one(raw, (train,)):
        folders = sorted(path for path in raw.iterdir() if path.is_dir())
        holding = [folder for folder in folders if table.find_one(folder, (train,))]
        if len(holding) > 1:
            raise UserError(f"--raw {raw}: {train} is in {', '.join(path.name for path in holding)}; give one of them")
        train_table = table.locate(holding[0] if holding else raw, (train,), description)
    else:
        train_table = table.locate(raw, (train,), description)
    others = {split: table.find_one(train_table.parent, names) for split, names in TABLES.items() if split != "train"}
    return {"train": train_table, **{split: path for split, path in others.items() if path}}


def _rows(tables: dict[Split, Path]) -> Iterator[tuple[str, CheXpertRow | RawStudy]]:
    """Yield (key of a study, its row); a row that cannot be used is a study of its own."""
    for split, path in tables.items():
        for record in _records(path):
            values = record.values
            try:
                if record.fault:
                    raise UnusableRecord(record.fault)
                place = chexpert.parse_path(values["Path"])
                view = chexpert.projection(values.get(SIDE, ""), values.get(POSITION, ""), place.image)
                yield f"{split}/{place.key}", (split, values["Path"], view, chexpert.parse_labels(values))
            except UnusableRecord as fault:
                name = f"{path.name} {record.where}"
                yield name, unusable_study(name, fault)


def _records(path: Path) -> Iterator[table.Record]:
    present = table.read(path).columns
    optional = [name for name in (SIDE, POSITION) if name in present]
    return table.stream(path, ("Path", *CHEXPERT, *optional))


def _example(path: Path) -> chexpert.ImagePath | None:
    """Return the first valid path of a table, or None."""
    for record in table.stream(path, ("Path",)):
        try:
            return chexpert.parse_path(record.values.get("Path", ""))
        except UnusableRecord:
            continue
    return None


def _study(items: list[CheXpertRow], images: chexpert.ImageFinder, options: CheXpertOptions) -> RawStudy:
    """Combine the rows of one study: the views of all, the labels of the first."""
    split, path, _, first = items[0]
    place = chexpert.parse_path(path)
    labels = dict(zip(CHEXPERT, first, strict=True))
    return RawStudy(
        study=place.key,
        patient=place.patient,
        views=tuple((images.path(chexpert.parse_path(path)), view) for _, path, view, _ in items),
        name=f"{place.split}/{place.key}",
        split=split,
        report=_labels.report(labels, options),
        labels={"chexpert": labels},
        fault="rows of one study with different labels" if any(item[3] != first for item in items) else None,
    )
