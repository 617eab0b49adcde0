"""PadChest: 160,861 chest radiographs of 67,625 patients, with stemmed Spanish reports (Bustos et al., 2020).

    PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv      one row for each image, plain or .gz
    0/120000000000000000000000000000000000001_ab12cd.png      <ImageDir>/<ImageID>: the zip files 0 to 50 and 54
    images/..., or the images beside the table                with or without the folders; a mixture will do

A study is a StudyID of one patient (one StudyID spans two). Its views stand in the order PA, AP, AP_horizontal, L,
COSTAL, then by name. Views whose projection is EXCLUDE or UNK, and the 21 images that nobody can read, are no views; a
study without views, labelled `exclude` by the dataset itself, or without a report is left out with its reason.

Reports have been stemmed, stripped of accents and lowered by the authors: language `es-stemmed`. They become the
findings: spaces are made single, and each sentence still ends with a full stop between spaces, as in
"cardiomegali moder . sin derram pleural ."

Labels stand in three vocabularies. `padchest`: the archive's own English names, 1 for each that is listed, `unchanged`
and `suboptimal study` among them; what is not listed is unsaid. `padchest-localizations`: the places, "loc right", the
same way. `chexpert`: the fourteen (padchest_facts.py). There is no official split.

PadChest-GR (Castro et al., 2024, arXiv:2411.05085) wrote the reports of 4,555 of these studies anew, as sentences in
English and Spanish. Its files lie beside the table:

    grounded_reports_20240819.json     [{"StudyID": "1200...", "ImageID": "1200..._ab12cd.png",
                                         "findings": [{"sentence_en": "...", "sentence_es": "...", "boxes": ...}]}]
    master_table.csv                   a row for each finding: StudyID, ..., split (train, validation or test)

With grounded=en or grounded=es these sentences, positive and negative in their order, are the findings of their
studies, in that language and in the official split; the other studies stay as they are. studies=grounded leaves them
out, and takes of each study the one frontal image that PadChest-GR is about and brings along. Boxes are not read.

The figures and traps were measured on the real table of 2019-02-01. The files of PadChest-GR are known from others'
descriptions of the release alone, never opened: hence keys that are absent are taken as empty.

Births, dates, accession numbers, machines and the sex are never read.
"""

import ast
import contextlib
import functools
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from radhpc.core.errors import UserError, nearest
from radhpc.core.sample import Report, Split
from shards.datasets.helpers import padchest_gr
from shards.datasets.helpers.padchest_facts import EXCLUDE, KNOWN, UNUSABLE, chexpert
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import cells, external_sort, identifiers, table

SYNTHETIC = False

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMNS = (
    "ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Pediatric", "Report", "MethodLabel", "Labels",
    "Localizations",
)  # fmt: skip
FOLDERS = ("images", ".", "Padchest_GR_files/PadChest_GR", "Padchest_GR_files")  # where images may lie
PROJECTIONS = ("PA", "AP", "AP_horizontal", "L", "COSTAL")  # in the order of a study's views
PLAIN_LIST = re.compile(r"\[(?:'[^',\"\\]*'(?:, (?=')|(?=\])))*\]")  # of names without commas and quotes
NO_FILE_NAME = re.compile("[/\\\\\0]")
SHOWN = 5  # names in a warning
NAMED = 100  # unknown labels that are counted separately


def _projections(value: Any) -> Any:
    chosen = tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else tuple(value)
    for word in chosen:
        if word not in PROJECTIONS:
            raise ValueError(f"'{word}' is unknown{nearest(word, PROJECTIONS)}; allowed are {', '.join(PROJECTIONS)}")
    return chosen


class PadChestOptions(ReaderOptions):
    """padchest: PadChest, with or without PadChest-GR."""

    projections: Annotated[tuple[str, ...], BeforeValidator(_projections)] = Field(
        ("PA", "AP", "AP_horizontal", "L"),
        description="views to keep, by commas; COSTAL, made to see ribs, is the one left out unless named",
    )
    labels: Literal["all", "physician"] = Field(
        "all", description="all; or physician: studies that a network labelled stay, but without labels"
    )
    reports: Literal["require", "keep"] = Field(
        "require", description="require; or keep: studies without a report stay where they have labels"
    )
    pediatric: Literal["keep", "drop"] = Field("keep", description="keep or drop the studies of children")
    grounded: Literal["no", "en", "es"] = Field(
        "no", description="no; or en, es: PadChest-GR's sentences in that language instead of the stemmed reports"
    )
    studies: Literal["all", "grounded"] = Field(
        "all", description="all; or grounded: those of PadChest-GR alone, each with its one frontal image"
    )


OPTIONS = PadChestOptions


class ImageColumns(NamedTuple):
    """The columns of one row that describe its image."""

    where: str
    folder: str
    name: str
    projection: str
    pediatric: bool


class StudyColumns(NamedTuple):
    """The columns of one row that describe its study, equal in all its rows."""

    report: str
    method: str
    labels: str
    localizations: str


class ListingCounts:
    """Counts of a listing, for the warnings at its end."""

    def __init__(self) -> None:
        self.pediatric = self.other_projections = self.not_grounded = self.unnamed = self.grounded = 0
        self.unknown: Counter[str] = Counter()

    def unknown_label(self, name: str) -> None:
        known = name in self.unknown or len(self.unknown) < NAMED
        self.unknown[name if known else "others"] += 1


class ArchiveExclusion(ValueError):
    """A study is complete, but PadChest itself excludes it or has nothing to learn from in it."""


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies of the table. Raises UserError for one that cannot be read, and for images still in zips."""
    assert isinstance(options, PadChestOptions)
    if options.studies == "grounded" and options.grounded == "no":
        raise UserError("padchest: studies=grounded needs a language of PadChest-GR: grounded=en or grounded=es")
    path = table.locate(raw, [TABLE], "table of PadChest")
    grounded = padchest_gr.read_grounded(path.parent, options.grounded)
    images = PadChestImages(path.parent)
    counts = ListingCounts()
    for _, rows in external_sort.grouped(_rows(path)):
        if isinstance(rows[0], RawStudy):
            yield rows[0]
        elif study := _study(rows, images, grounded, options, counts, path):
            yield study
    _warn_of_counts(counts, options, path, len(grounded) if grounded else 0)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key of a study, its row), row by row; a row that cannot be used is a study of its own."""
    for number, record in enumerate(table.stream(path, COLUMNS)):
        try:
            patient, study, image, text = _parse_row(record)
            # Plain tuples: named ones take twice as long to be sorted on the disk.
        except UnusableRecord as fault:
            yield str(number), unusable_study(f"{path.name} {record.where}", fault)
            continue
        yield f"{patient}\x1f{study}", (patient, study, tuple(image), tuple(text))


def _parse_row(record: table.Record) -> tuple[str, str, ImageColumns, StudyColumns]:
    """Return patient, study, and the columns of the image and of the study. Raises UnusableRecord."""
    values = record.values
    if record.fault:
        raise UnusableRecord(record.fault)
    patient, study = identifiers.identifier(values["PatientID"]), identifiers.identifier(values["StudyID"])
    if not patient or not study:
        raise UnusableRecord("no patient or no study named")
    name, folder = values["ImageID"], identifiers.identifier(values["ImageDir"])
    if cells.is_empty(name) or NO_FILE_NAME.search(name + folder):
        raise UnusableRecord("no image named")
    image = ImageColumns(record.where, folder, name, values["Projection"], values["Pediatric"] == "PED")
    text = StudyColumns(values["Report"], values["MethodLabel"], values["Labels"], values["Localizations"])
    return patient, study, image, text


class PadChestImages:
    """Find images: the folders that may hold those of an ImageDir are searched once.

    One folder with images is taken for all of them. Where several have some, each image is looked up.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shared = [folder for name in FOLDERS if _holds_images(folder := root / name)]
        self.by_directory: dict[str, list[Path]] = {}

    def find(self, directory: str, name: str) -> Path:
        """Return the path of an image, which may be missing. Raises UserError where its zip file is not unpacked."""
        folders = self.by_directory.get(directory)
        if folders is None:
            folders = self.by_directory[directory] = self._folders(directory, name)
        if len(folders) == 1:
            return folders[0] / name
        paths = [folder / name for folder in folders]
        return next((path for path in paths if path.is_file()), paths[0])

    def _folders(self, directory: str, name: str) -> list[Path]:
        own = [self.root / "images" / directory, self.root / directory] if directory else []
        folders = [folder for folder in own if _holds_images(folder)]
        zips = [folder.with_name(f"{directory}.zip") for folder in own]
        packed = next((path for path in zips if path.is_file()), None)
        if packed and not folders and not any((folder / name).is_file() for folder in self.shared):
            raise UserError(
                f"{packed}: the images are still packed; unpack each zip file in its folder, "
                f"as in `unzip {packed.name} -d {directory}`, and build again"
            )
        return [*folders, *self.shared] or [self.root / directory]


def _holds_images(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(".png") for entry in entries)
    except OSError:
        return False


def _study(
    rows: list[Any],
    images: PadChestImages,
    grounded: external_sort.Lookup | None,
    options: PadChestOptions,
    counts: ListingCounts,
    path: Path,
) -> RawStudy | None:
    """Return the study of these rows; None where the options leave it out."""
    patient, study = rows[0][:2]
    items = [ImageColumns(*row[2]) for row in rows]
    text = StudyColumns(*rows[0][3])
    language, sentences, split, image = _sentences(study, items, grounded, options.grounded)
    counts.grounded += sentences is not None
    if options.studies == "grounded" and image:
        items = [item for item in items if item.name == image]
    if options.pediatric == "drop" and any(item.pediatric for item in items):
        counts.pediatric += 1
        return None
    if options.studies == "grounded" and not sentences:
        counts.not_grounded += 1
        return None
    views = [item for item in items if item.projection in PROJECTIONS and item.name not in UNUSABLE]
    chosen = [item for item in views if item.projection in options.projections]
    chosen.sort(key=lambda item: (PROJECTIONS.index(item.projection), item.name))
    report = Report(findings=sentences or _report(text.report))
    labels: dict[str, dict[str, int | None]] = {}
    fault = gap = None
    try:
        names = _names(text.labels)
        if any(row[3] != rows[0][3] for row in rows):
            raise UnusableRecord("rows of one study with different texts or labels")
        if not views:
            raise ArchiveExclusion("no usable view")
        if EXCLUDE in names:
            raise ArchiveExclusion("marked exclude by the dataset")
        if not chosen:
            counts.other_projections += 1
            return None
        labels = _labels(names, _names(text.localizations), text, options, counts)
        if not report.findings and options.reports == "require":
            raise ArchiveExclusion("no report")
        if not report.findings and not labels:
            raise ArchiveExclusion("neither report nor labels")
    except UnusableRecord as error:
        fault = str(error)
    except ArchiveExclusion as error:
        gap = str(error)
    return RawStudy(
        study=f"{patient}\x1f{study}",
        patient=patient,
        views=tuple((images.find(item.folder, item.name), item.projection) for item in chosen),
        name=f"{path.name} {items[0].where}",
        split=split,
        report=report,
        language=language,
        labels=labels,
        fault=fault,
        gap=gap,
    )


def _report(text: str) -> str | None:
    """Return a report with single spaces; None where it is missing or has no word at all."""
    return " ".join(text.split()) if not cells.is_empty(text) and re.search(r"[^\W\d_]", text) else None


@functools.lru_cache(maxsize=4096)
def _names(text: str) -> tuple[str, ...]:
    """Parse a list of names in Python's syntax: stripped, each once. Raises UnusableRecord."""
    if cells.is_empty(text):
        return ()
    names: Any = None
    if PLAIN_LIST.fullmatch(text):  # all of the real ones, and four times as fast
        names = text[1:-1].replace("'", "").split(", ") if len(text) > 2 else []
    else:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            names = ast.literal_eval(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnusableRecord("labels or localizations that are no list of names")
    return tuple(dict.fromkeys(name.strip() for name in names))


def _labels(
    names: tuple[str, ...], places: tuple[str, ...], text: StudyColumns, options: PadChestOptions, counts: ListingCounts
) -> dict[str, dict[str, int | None]]:
    """Return labels by vocabulary, without empty vocabularies."""
    if options.labels == "physician" and text.method.strip() != "Physician":
        return {}
    counts.unnamed += "" in names
    for name in names:
        if name and name not in KNOWN:
            counts.unknown_label(name)
    present = {name: 1 for name in names if name}
    labels: dict[str, dict[str, int | None]] = {}
    if present:
        labels["chexpert"] = chexpert(present)
        labels["padchest"] = dict(present)
    if located := {place: 1 for place in places if place}:
        labels["padchest-localizations"] = dict(located)
    return labels


def _sentences(
    study: str, items: list[ImageColumns], grounded: external_sort.Lookup | None, language: str
) -> tuple[str, str | None, Split | None, str]:
    """Return (language, PadChest-GR's sentences, official split, its image) of a study that contains that image."""
    image, sentences, split = (grounded and grounded.get(study)) or ("", "", None)
    if image and image not in {item.name for item in items}:
        sentences, split = "", None
    return (language, sentences, split, image) if sentences else ("es-stemmed", None, split, "")


def _warn_of_counts(counts: ListingCounts, options: PadChestOptions, path: Path, grounded: int) -> None:
    """Warn of studies that an option left out, and of unknown labels."""
    kept = ",".join(options.projections)
    if counts.other_projections:
        _warn(f"padchest: {counts.other_projections} studies have views of other projections than {kept}: left out")
    if counts.pediatric:
        _warn(f"padchest: {counts.pediatric} studies of children are left out, as pediatric=drop asks")
    if counts.not_grounded:
        _warn(f"padchest: {counts.not_grounded} studies are not in PadChest-GR: left out, as studies=grounded asks")
    if options.grounded != "no" and counts.grounded < grounded:
        missing = f"{grounded - counts.grounded} of {grounded} studies of {padchest_gr.GROUNDED}"
        _warn(f"padchest: {missing} are not in {path.name}, or have no sentences in {options.grounded}")
    if counts.unnamed:
        _warn(f"padchest: {counts.unnamed} studies have an empty label, which says nothing: left out of their labels")
    if counts.unknown:
        shown = ", ".join(f"'{name}' ({count})" for name, count in counts.unknown.most_common(SHOWN))
        more = ", ..." if len(counts.unknown) > SHOWN else ""
        _warn(f"padchest: labels without a known meaning, kept in `padchest` alone (studies): {shown}{more}")


def _warn(text: str) -> None:
    warnings.warn(text, DatasetWarning, stacklevel=3)
