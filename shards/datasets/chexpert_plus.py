"""CheXpert Plus (Chambon et al., 2024, arXiv:2405.19538): CheXpert's radiographs with their reports.

    df_chexpert_plus_240401.csv      one row for each image; the report's sections have columns of their own
    PNG/train/patient00001/study1/view1_frontal.png           or .jpg, or .dcm; in a folder of any name in --raw
    chexbert_labels/impression_fixed.json                     one object a line: path_to_image and the 14 labels

Read are the paths, the view, the patient, the split, the report and its findings and impression: dates, age, sex, race
and all the rest stay in the table. Where findings and impression are both empty the full report is taken, without
the text after its impression (a code, an accession number). Patients, images and splits are those of CheXpert.

The table was de-identified image by image, so the rows of one study may carry different made-up dates: the text of its
first frontal image is taken, and such studies are counted.
"""

import io
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from radhpc.core.errors import UserError, first_line
from radhpc.core.sample import CHEXPERT, Report, Split
from shards import raw_files, splits
from shards.datasets.helpers import chexpert
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import cells, external_sort, identifiers, table
from shards.tabular.lines import LongLine, lines_of
from shards.text import sections

SYNTHETIC = False

TABLE = "df_chexpert_plus_240401.csv"
REQUIRED = ("path_to_image", "deid_patient_id", "report", "section_findings", "section_impression", "split")
OPTIONAL = ("path_to_dcm", "frontal_lateral", "ap_pa")
LATERAL = ("L", "LL", "RL", "LATERAL")  # projections
LABEL_FOLDERS = ("chexbert_labels", "labels", "label", ".")
USUAL_LABELS = "impression"
# Behind the impression a report ends with a summary code, the accession number and a note on its dates.
TAIL = re.compile(r"^[^\S\n]*(?:end of impression|summary|accession number)[^\S\n]*:", re.IGNORECASE | re.MULTILINE)


class CheXpertPlusOptions(chexpert.ImageOptions):
    """chexpert_plus: CheXpert's radiographs with their reports."""

    labels: Literal["report", "findings", "impression", "none"] | None = Field(
        None,
        description="the part of the report whose labels are taken, from chexbert_labels/PART_fixed.json: report, "
        "findings, impression or none; impression where nothing is said",
    )


OPTIONS = CheXpertPlusOptions


@dataclass(frozen=True)
class CheXpertPlusRow:
    """One row of the table: one view of a study."""

    place: chexpert.ImagePath
    patient: str
    split: Split
    path: Path
    projection: str | None
    report: Report


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies. Raises UserError for a table or a folder that cannot be read."""
    assert isinstance(options, CheXpertPlusOptions)
    path = table.locate(raw, (TABLE,), "CheXpert Plus's table")
    folder = path.parent
    images = chexpert.ImageFinder(folder, options.images, None)
    labels = find_labels(folder, options)
    different = studies = 0
    for _, items in external_sort.grouped(_rows(path, images)):
        if isinstance(items[0], RawStudy):
            yield items[0]
            continue
        studies += 1
        different += any(item.report != items[0].report for item in items)
        yield _study(items, labels)
    if different:
        warnings.warn(
            f"{path.name}: {different} of {studies} studies have rows with different texts, as the table was "
            "de-identified image by image; each has the text of its first frontal image",
            DatasetWarning,
            stacklevel=2,
        )


def find_labels(folder: Path, options: CheXpertPlusOptions) -> external_sort.Lookup | None:
    """Map each study to its labels; None where the archive has none. Raises UserError if requested ones are missing."""
    if options.labels == "none":
        return None
    name = f"{options.labels or USUAL_LABELS}_fixed.json"
    for below in LABEL_FOLDERS:
        if (folder / below / name).is_file():
            return external_sort.Lookup(_labels(folder / below / name))
    if options.labels:
        raise UserError(f"labels={options.labels}: no {name} in {folder} or its folder {LABEL_FOLDERS[0]}")
    warnings.warn(
        f"{folder.name}: no {LABEL_FOLDERS[0]}/{name}, so the samples have no labels", DatasetWarning, stacklevel=3
    )
    return None


def _labels(path: Path) -> Iterator[tuple[str, chexpert.Labels]]:
    number = 0
    try:
        with raw_files.open_table(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
            for line in lines_of(lines):
                number += 1
                if isinstance(line, LongLine):
                    raise ValueError("a line without end")
                if line.strip():
                    values = json.loads(line, parse_constant=lambda name: None)  # NaN
                    yield chexpert.parse_path(values["path_to_image"]).key, chexpert.parse_labels(values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: line {number}: no object with path_to_image and the 14 labels ({first_line(error)})"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({raw_files.reason(error)})") from error


def _rows(path: Path, images: chexpert.ImageFinder) -> Iterator[tuple[str, CheXpertPlusRow | RawStudy]]:
    """Yield (key of a study, its row); a row that cannot be used is a study of its own."""
    present = table.read(path).columns
    for record in table.stream(path, (*REQUIRED, *(name for name in OPTIONAL if name in present))):
        where = f"{path.name} {record.where}"
        try:
            item = _parse_row(record, images)
            yield f"{item.split}/{item.place.key}", item
        except UnusableRecord as fault:
            yield where, unusable_study(where, fault)


def _parse_row(record: table.Record, images: chexpert.ImageFinder) -> CheXpertPlusRow:
    """Parse one row. Raises UnusableRecord."""
    if record.fault:
        raise UnusableRecord(record.fault)
    values = {name: cells.known(value) for name, value in record.values.items()}
    place = chexpert.parse_path(values["path_to_image"])
    if not values["deid_patient_id"]:
        raise UnusableRecord("empty patient")
    try:
        split = splits.parse(values["split"]) if values["split"] else chexpert.official_split(place)
    except UserError:
        raise UnusableRecord("unknown split") from None
    source = chexpert.parse_path(values["path_to_dcm"]) if images.dicom and values.get("path_to_dcm") else place
    return CheXpertPlusRow(
        place=place,
        patient=identifiers.identifier(values["deid_patient_id"]),
        split=split,
        path=images.path(source),
        projection=chexpert.projection(values.get("frontal_lateral", ""), values.get("ap_pa", ""), place.image),
        report=_report(values["report"], values["section_findings"], values["section_impression"]),
    )


def _report(text: str, findings: str, impression: str) -> Report:
    if findings or impression:
        return Report(findings=findings or None, impression=impression or None)
    tail = TAIL.search(text)
    return sections.split(text[: tail.start()] if tail else text)


def _study(items: list[CheXpertPlusRow], labels: external_sort.Lookup | None) -> RawStudy:
    with_text = [item for item in items if item.report.text()]
    first = min(with_text or items, key=lambda item: item.projection in LATERAL)  # the first one that is frontal
    fault = gap = None
    if any(item.patient != first.patient for item in items):
        fault = "rows of one study with different patients"
    elif not first.report.text():
        gap = "empty text"
    known = labels.get(first.place.key) if labels is not None else None
    return RawStudy(
        study=first.place.key,
        patient=first.patient,
        views=tuple((item.path, item.projection) for item in items),
        name=f"{first.place.split}/{first.place.key}",
        split=first.split,
        report=first.report,
        labels={"chexpert": dict(zip(CHEXPERT, known, strict=True))} if known else {},
        fault=fault,
        gap=gap,
    )
