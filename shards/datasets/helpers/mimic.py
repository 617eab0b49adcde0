"""Reads both editions of MIMIC-CXR: tables joined by study, projections, partial downloads.

    mimic-cxr-jpg/2.1.0/                                mimic-cxr/2.1.0/
      files/p10/p10000032/s50414267/02aa804e-....jpg      files/p10/p10000032/s50414267/02aa804e-....dcm
      mimic-cxr-2.0.0-metadata.csv.gz                     cxr-record-list.csv.gz
      mimic-cxr-2.0.0-split.csv.gz                        mimic-cxr-reports.zip
      mimic-cxr-2.0.0-chexpert.csv.gz, -negbio.csv.gz
      mimic-cxr-2.1.0-test-set-labeled.csv

The rows of all tables lie on the disk, grouped by study; only the columns named here are read, and dates and times are
none of them. Reports are read by several threads: a parallel file system answers each open late, but many at a time.
"""

import functools
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from radhpc.core.errors import UserError
from radhpc.core.sample import CHEXPERT, Split
from shards import splits
from shards.datasets import reader
from shards.datasets.helpers import mimic_reports, mimic_sections
from shards.datasets.helpers.mimic_reports import VERSIONS
from shards.datasets.reader import DatasetWarning, RawStudy, UnusableRecord, unusable_study
from shards.tabular import cells, external_sort, identifiers, table

IDENTIFIERS = ("study_id", "subject_id")
VOCABULARIES = {"chexpert": "chexpert", "negbio": "negbio", "radiologist": "test-set-labeled"}  # and its table
RENAMED = {"Airspace Opacity": "Lung Opacity"}  # what the radiologists' table calls it
VIEWS = ("PA", "AP", "LATERAL", "LL")  # come first, in this order
FRONTAL = ("PA", "AP")  # alone or followed by more words: "AP AXIAL", "PA LLD"
THREADS = 16  # that read reports
BATCH = 512  # studies whose reports are read ahead


class MimicOptions(reader.ReaderOptions):
    """The options of the readers of both editions."""

    views: Literal["all", "frontal"] = Field("all", description="all, or frontal: PA and AP alone")
    require: Literal["any", "findings", "impression"] = Field(
        "any", description="studies with any text, or only those with findings, or with an impression"
    )
    subset: str | None = Field(
        None,
        pattern=r"^p\d{1,8}(,p\d{1,8})*$",
        description="the part that was downloaded, by the starts of patients' folders, such as p10,p11",
    )
    reports: Path | None = Field(None, description="the folder of reports, or mimic-cxr-reports.zip itself")
    split: Path | None = Field(
        None, description="mimic-cxr-2.0.0-split.csv, where it lies elsewhere; tables beside it are read as well"
    )


@dataclass(frozen=True)
class Edition:
    """The differences between the two editions."""

    images: str  # the kind of the table that lists all images
    names: tuple[str, ...]  # of that table
    suffix: str  # of an image
    complete: bool  # has tables of projections, splits and labels of its own


def table_names(table: str) -> tuple[str, ...]:
    """Return the file names of a table in all versions."""
    return tuple(f"mimic-cxr-{version}-{table}.csv" for version in VERSIONS)


def read_edition(raw: Path | None, options: MimicOptions, edition: Edition) -> Iterator[RawStudy]:
    """Yield the studies of an edition. Raises UserError where a table, the images or the reports are not found."""
    images = table.locate(raw, edition.names, "table of images of MIMIC-CXR")
    tables = _tables(images, options, edition)
    archive = _Archive(images.parent, options, edition, frozenset(tables))
    rows = chain.from_iterable(_rows(path, kind, archive) for kind, path in tables.items())
    studies = archive.choose(external_sort.grouped(rows))
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(studies, BATCH)):
            for study in pool.map(archive.add_report, batch):
                if study.fault or options.require == "any" or getattr(study.report, options.require):
                    yield study
                else:
                    archive.counts["require"] += 1
    _warn_of_counts(archive)


def _tables(images: Path, options: MimicOptions, edition: Edition) -> dict[str, Path]:
    """Find the tables by kind, that of images first. Raises UserError where a required one is missing."""
    if options.split and not options.split.is_file():
        raise UserError(f"split={options.split}: no such file; expected {table_names('split')[-1]} (also .gz)")
    folders = [images.parent, *([options.split.parent] if options.split else [])]

    def find(table_name: str) -> Path | None:
        return next((path for folder in folders if (path := table.find_one(folder, table_names(table_name)))), None)

    tables = {edition.images: images}
    places = {"metadata": find("metadata"), "split": options.split or find("split")}
    places |= {vocabulary: find(name) for vocabulary, name in VOCABULARIES.items()}
    for kind, path in places.items():
        if path:
            tables.setdefault(kind, path)
    if edition.complete and "split" not in tables:
        raise UserError(
            f"--raw {images.parent}: no {table_names('split')[-1]} (also .gz); put it there or give split=FILE"
        )
    if options.views != "all" and "metadata" not in tables:
        raise UserError(
            f"views={options.views}: the projections are in {table_names('metadata')[-1]} of MIMIC-CXR-JPG; put it "
            f"into {images.parent}, or beside the table that split=FILE names"
        )
    return tables


def _rows(path: Path, kind: str, archive: "_Archive") -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield (study_id, (kind, value)), row by row; a row that cannot be used is a study of its own."""
    for record in table.stream(path, _columns(path, kind)):
        values = {name: cells.known(value) for name, value in record.values.items()}
        try:
            if record.fault:
                raise UnusableRecord(record.fault)
            values |= {name: identifiers.identifier(values[name]) for name in IDENTIFIERS if name in values}
            if not all(values[name].isdecimal() for name in IDENTIFIERS if name in values):
                raise UnusableRecord("study_id or subject_id that is no number")
            if "subject_id" not in values or archive.has(values["subject_id"], kind):
                yield values["study_id"], (kind, _value(kind, values))
        except UnusableRecord as fault:
            yield f"{path.name} {record.where}", ("fault", str(fault))


def _columns(path: Path, kind: str) -> tuple[str, ...]:
    if kind not in VOCABULARIES:
        more = {"records": ("dicom_id",), "metadata": ("dicom_id", "ViewPosition"), "split": ("split",)}
        return ("study_id", "subject_id", *more[kind])
    labels = [name for name in table.read(path).columns if RENAMED.get(name, name) in CHEXPERT]
    return ("study_id", *(() if kind == "radiologist" else ("subject_id",)), *labels)


def _value(kind: str, values: dict[str, str]) -> Any:
    """Return labels, or (subject_id, split), or (subject_id, dicom_id, projection). Raises UnusableRecord."""
    if kind in VOCABULARIES:
        return {RENAMED.get(name, name): _label(word) for name, word in values.items() if not name.endswith("_id")}
    if kind == "split":
        return values["subject_id"], values["split"]
    if not re.fullmatch(r"[\w.-]+", values["dicom_id"]):
        raise UnusableRecord("dicom_id that names no file")
    return values["subject_id"], values["dicom_id"], values.get("ViewPosition") or None


@functools.cache  # these few numbers are written in few ways
def _label(word: str) -> int | None:
    try:
        return {1.0: 1, 0.0: 0, -1.0: -1}[float(word)] if word else None
    except (ValueError, KeyError):
        raise UnusableRecord("a label other than 1, 0, -1 and empty") from None


class _Archive:
    """The studies of an edition on this disk, and a count of what its user should know."""

    def __init__(self, folder: Path, options: MimicOptions, edition: Edition, kinds: frozenset[str]) -> None:
        self.options, self.edition, self.kinds = options, edition, kinds
        self.files = folder / "files"
        if not self.files.is_dir():
            raise UserError(f"--raw {folder}: no folder 'files' there, which holds the images")
        self.groups = sorted(name for name in os.listdir(self.files) if re.fullmatch(r"p\d\d", name))
        self.starts = dict.fromkeys(options.subset.split(","), False) if options.subset else {}  # met or not
        self.counts: Counter[str] = Counter()
        self._reports = mimic_reports.find_reports(folder, options.reports)

    def has(self, subject: str, kind: str) -> bool:
        """Return whether a patient belongs to the part that was downloaded."""
        starts = [start for start in self.starts if f"p{subject}".startswith(start)]
        self.starts.update(dict.fromkeys(starts, True))
        inside = bool(starts) or not self.starts
        self.counts["outside"] += kind == self.edition.images and not inside
        return inside

    def choose(self, groups: Iterator[tuple[str, list[tuple[str, Any]]]]) -> Iterator[RawStudy]:
        """Yield the studies that the options choose, without reports."""
        for study, rows in groups:
            values: dict[str, list[Any]] = {}
            for kind, value in rows:
                values.setdefault(kind, []).append(value)
            if "fault" in values:
                yield unusable_study(study, values["fault"][0])
            elif self.edition.images in values or "split" in values:  # else a table of labels alone names it
                study_found = self._study(study, values)
                self.counts["studies"] += 1
                if study_found.views or study_found.fault:
                    self.counts.update(f"no {kind}" for kind in self.kinds - values.keys())
                    yield study_found
                else:
                    self.counts["views"] += 1

    def _study(self, study: str, values: dict[str, list[Any]]) -> RawStudy:
        """Return a study of the tables; without views where the options select none of its images."""
        images, rows = values.get(self.edition.images, []), values.get("split", [])
        subjects = {subject for subject, *_ in [*images, *rows]}
        subject = min(subjects)
        place = f"p{subject[:2]}/p{subject}/s{study}"
        try:
            if not images:
                raise UnusableRecord("study without a row in the table of images")
            if len(subjects) > 1:
                raise UnusableRecord("rows of one study of different patients")
            split = _split({word for _, word in rows}) if "split" in self.kinds else None
        except UnusableRecord as fault:
            return RawStudy(study=study, patient=subject, views=(), name=place, fault=str(fault))
        projections = {dicom: view for _, dicom, view in values.get("metadata", [])}
        views = sorted(((dicom, projections.get(dicom)) for dicom in {dicom for _, dicom, _ in images}), key=_rank)
        return RawStudy(
            study=study,
            patient=subject,
            views=tuple(
                (self.files / place / f"{dicom}{self.edition.suffix}", view)
                for dicom, view in views
                if self.options.views == "all" or (view and view.split()[0] in FRONTAL)
            ),
            name=place,
            split=split,
            labels={kind: values[kind][0] for kind in VOCABULARIES if kind in values},
        )

    def add_report(self, study: RawStudy) -> RawStudy:
        """Return the study with its report, or with the reason why it cannot be used. Safe in threads."""
        if study.fault:
            return study
        try:
            if not (self.files / study.name).is_dir():
                raise UnusableRecord(self._why_missing(study.name))
            text = self._reports.text(f"{study.name}.txt")
            if not text.strip():
                raise UnusableRecord("empty text")
            report = mimic_sections.parse_report(text, study.study)
            if not report.text():
                raise UnusableRecord("no findings, impression or last paragraph")
            return replace(study, report=report)
        except UnusableRecord as fault:
            return replace(study, fault=str(fault))

    def _why_missing(self, place: str) -> str:
        if place[:3] in self.groups:
            return "missing image folder"
        return f"missing image folder; if only a part was downloaded, name it: subset={','.join(self.groups) or 'p10'}"


def _rank(view: tuple[str, str | None]) -> tuple[int, str]:
    """Return a sort key: PA, AP, lateral, other views, those without a projection; then by dicom_id."""
    dicom, projection = view
    return VIEWS.index(projection) if projection in VIEWS else len(VIEWS) + (projection is None), dicom


def _split(words: set[str]) -> Split:
    """Return the split of a study from all its rows. Raises UnusableRecord."""
    if not words:
        raise UnusableRecord("study without a row in the table of splits")
    if len(words) > 1:
        raise UnusableRecord("rows of one study in different splits")
    try:
        return splits.parse(words.pop())
    except UserError:
        raise UnusableRecord("unknown split") from None


def _warn_of_counts(archive: _Archive) -> None:
    """Warn of everything the user should know. Raises UserError for a part of the archive without patients."""
    options, counts = archive.options, archive.counts
    if missed := [start for start, met in archive.starts.items() if not met]:
        raise UserError(
            f"subset={options.subset}: no patient of the tables begins with {', '.join(missed)}; folders found are "
            f"{', '.join(archive.groups) or 'none'}"
        )
    messages = [
        (counts["outside"], f"images lie outside of subset={options.subset} and were not looked for"),
        (counts["views"], f"studies have no image that views={options.views} allows and were left out"),
        (counts["require"], f"studies have no {options.require} and were left out, as require= says"),
        *((counts[f"no {kind}"], f"studies have no labels of {kind}") for kind in ("chexpert", "negbio")),
    ]
    lines = [f"{count} {message}" for count, message in messages if count]
    if "split" not in archive.kinds:
        lines.append(
            f"no {table_names('split')[-1]} beside the images: patients are split by their hashes, and scores do not "
            "compare with published ones; give split=FILE of MIMIC-CXR-JPG"
        )
    if "metadata" not in archive.kinds:
        lines.append(
            f"no {table_names('metadata')[-1]} beside the images: no projections; views stand in the order of names"
        )
    if archive.edition.complete:
        lines += [
            f"no {table_names(VOCABULARIES[kind])[-1]}: studies have no labels of {kind}"
            for kind in ("chexpert", "negbio")
            if kind not in archive.kinds
        ]
    for line in lines:
        warnings.warn(line, DatasetWarning, stacklevel=2)
