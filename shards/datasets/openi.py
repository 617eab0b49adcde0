"""Open-i, the chest radiographs of Indiana University (Demner-Fushman et al., JAMIA 2016, doi:10.1093/jamia/ocv080).

    ecgen-radiology/1.xml ... 3999.xml                   3,955 reports: NLMCXR_reports.tgz, unpacked
    CXR1_1_IM-0001-3001.png                              7,470 images: NLMCXR_png.tgz (or NLMCXR_dcm.tgz), unpacked

or the same as tables, as a well-known copy has it:

    indiana_reports.csv  indiana_projections.csv  images/images_normalized/1_IM-0001-4001.dcm.png

All of it may lie anywhere below --raw. A report names its images, its sections (INDICATION and COMPARISON become
`other`; XXXX marks what was removed, and stays) and its terms: those that a person chose are the labels `openi`,
those that a program found are `openi-automatic`. Which projection an image shows is in no report: it comes from
indiana_projections.csv or nlmcxr_dicom_metadata.csv where these lie in --raw too.

Of the 3,955 reports 104 have no image and 25 more neither findings nor impression: they are left out by name.
"""

import re
import warnings
import xml.etree.ElementTree as plain
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from defusedxml import DefusedXmlException, ElementTree  # type: ignore[import-untyped]

from radhpc.core.errors import UserError
from radhpc.core.sample import Report
from shards import raw_files
from shards.datasets.helpers.images import files
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import cells, external_sort, identifiers, table

SYNTHETIC = False

REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
METADATA = "nlmcxr_dicom_metadata.csv"
SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")  # in the order of preference, where an image has several files
MAX_BYTES = 1 << 20  # of an XML: the largest of Open-i's has 8,967
OTHERS = ("INDICATION", "COMPARISON")
VIEWS = {"LATERAL": "L", "LARGE LATERAL": "L", "FRONTAL": "Frontal"}
Views = tuple[tuple[Path, str | None], ...]
ImageLookup = Callable[[str], tuple[Path | None, str | None]]  # an image's name -> its file, its projection
_SUFFIX = re.compile(r"(?:\.(?:dcm|png|jpe?g))+$", re.IGNORECASE)
_HEAD = re.compile(r"^(?:CXR)?(\d+)(?:_\d+)?_")
Value = TypeVar("Value")


class OpenIOptions(ReaderOptions):
    """openi: the chest radiographs of Indiana University, with reports."""


OPTIONS = OpenIOptions


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies, one for each report. Raises UserError where there are no reports or no images."""
    if raw is None:
        raise UserError("openi: --raw is missing: the folder of the reports and the images")
    if not raw.is_dir():
        raise UserError(f"--raw {raw}: no such folder; unpack NLMCXR_reports.tgz and NLMCXR_png.tgz into one")
    reports = sorted(files(raw, (".xml",)))
    tables = {path.name.removesuffix(".gz"): path for path in files(raw, (".csv", ".csv.gz"))}
    if not reports and REPORTS not in tables:
        raise UserError(f"--raw {raw}: no reports there; looked for ecgen-radiology/1.xml and {REPORTS}")
    warnings.warn(
        "Open-i does not say which reports are of the same patient: each counts as a patient of its own",
        DatasetWarning,
        stacklevel=2,
    )
    find = find_images(raw, _views(tables))
    yield from _from_xml(reports, find) if reports else _from_tables(tables, find)


def key(name: str) -> str:
    """Return what all names of one image share: CXR1_1_IM-0001-3001, 1_IM-0001-3001.dcm.png -> 1_IM-0001-3001."""
    return _HEAD.sub(r"\1_", _SUFFIX.sub("", name.strip().rpartition("/")[2]))


def find_images(raw: Path, views: external_sort.Lookup) -> ImageLookup:
    """Return a function from an image's name to its file and its projection. Raises UserError without any image."""
    index = external_sort.Lookup((_tagged(path), path) for path in files(raw, SUFFIXES))
    if not len(index):
        raise UserError(f"--raw {raw}: no images there; looked for files such as CXR1_1_IM-0001-3001.png")

    def find(name: str) -> tuple[Path | None, str | None]:
        image = key(name)
        return _first(index.get(f"{image}{suffix}") for suffix in SUFFIXES), views.get(image)

    return find


def _tagged(path: Path) -> str:
    return key(path.name) + path.suffix.lower()


def _first(values: Iterable[Value | None]) -> Value | None:
    return next((value for value in values if value is not None), None)


def _views(tables: dict[str, Path]) -> external_sort.Lookup:
    """Map images to projections, from the tables that have any; the DICOM headers' values override the copy's."""

    def rows() -> Iterator[tuple[str, str]]:
        for name, image, view in ((PROJECTIONS, "filename", "projection"), (METADATA, "imageid", "View Position")):
            if name in tables:
                for record in table.stream(tables[name], (image, view)):
                    projection = cells.known(record.values.get(view, "")).upper()
                    if projection and not record.fault:
                        yield key(record.values[image]), VIEWS.get(projection, projection)

    return external_sort.Lookup(rows())


def _from_xml(reports: list[Path], find: ImageLookup) -> Iterator[RawStudy]:
    for path in reports:
        name = f"{path.parent.name}/{path.name}"
        try:
            yield _study(parse(path), name, find)
        except UnusableRecord as fault:
            yield unusable_study(name, fault)


def parse(path: Path) -> "plain.Element":
    """Return the root of a report's XML, which is untrusted: no entities, a limited size. Raises UnusableRecord."""
    try:
        root: plain.Element = ElementTree.fromstring(raw_files.read(path, MAX_BYTES), forbid_dtd=True)
    except DefusedXmlException:
        raise UnusableRecord("XML with a document type of its own") from None
    except (plain.ParseError, LookupError, ValueError):
        raise UnusableRecord("broken XML") from None
    except raw_files.LargeFile:
        raise UnusableRecord("XML too large") from None
    except raw_files.RefusedFile as error:
        raise UnusableRecord(error.strerror or "unreadable XML file") from None
    except OSError:
        raise UnusableRecord("unreadable XML file") from None
    return root


def _study(root: "plain.Element", name: str, find: ImageLookup) -> RawStudy:
    """Parse one report's XML. Raises UnusableRecord."""
    identifier = root.find("uId")
    patient = (identifier.get("id") or "").strip() if identifier is not None else ""
    if not patient:
        raise UnusableRecord("report without a number")
    texts: dict[str, str] = {}
    for element in root.iter("AbstractText"):
        label = (element.get("Label") or "").strip().upper()
        texts[label] = f"{texts.get(label, '')} {_text(element)}".strip()
    return _assemble(
        patient,
        name,
        [image for element in root.iter("parentImage") if (image := (element.get("id") or "").strip())],
        find,
        texts,
        {
            "openi": [_text(element) for element in root.iter("major")],
            "openi-automatic": [_text(element) for element in root.iter("automatic")],
        },
    )


def _from_tables(tables: dict[str, Path], find: ImageLookup) -> Iterator[RawStudy]:
    if PROJECTIONS not in tables:
        raise UserError(f"{tables[REPORTS]}: {PROJECTIONS} is missing: it names the images")
    images = external_sort.Lookup(
        external_sort.grouped(
            (_identifier(record), cells.known(record.values["filename"]))
            for record in table.stream(tables[PROJECTIONS], ("uid", "filename"))
            if not record.fault
        )
    )
    columns = ("uid", "MeSH", "indication", "comparison", "findings", "impression")
    for record in table.stream(tables[REPORTS], columns):
        name = f"{REPORTS} {record.where}"
        uid = "" if record.fault else _identifier(record)
        if not uid:
            yield unusable_study(name, record.fault or "report without a number")
            continue
        texts = {column.upper(): _section(column, record.values[column]) for column in columns[2:]}
        terms = {"openi": cells.known(record.values["MeSH"]).split(";")}
        named = [image for image in images.get(uid, []) if image]
        yield _assemble(f"CXR{uid}", name, named, find, texts, terms)


def _identifier(record: table.Record) -> str:
    """Return the number of a report; empty where there is none."""
    try:
        return identifiers.identifier(record.values["uid"])
    except UnusableRecord:
        return ""


def _section(column: str, value: str) -> str:
    """Return a section's text. People say `None` of indications and comparisons, so there it is no missing value."""
    is_without = cells.is_missing if column.upper() in OTHERS else cells.is_empty
    return "" if is_without(value) else value.strip()


def _assemble(
    patient: str,
    name: str,
    images: list[str],
    find: ImageLookup,
    texts: dict[str, str],
    terms: dict[str, list[str]],
) -> RawStudy:
    """Return the study of a report in either form; `patient` is the report's own number, such as CXR1."""
    places = [find(image) for image in images]
    findings, impression = texts.get("FINDINGS") or None, texts.get("IMPRESSION") or None
    fault = gap = None
    if not images:
        gap = "no image named"
    elif not (findings or impression):
        gap = "neither findings nor impression"
    elif any(path is None for path, _ in places):
        fault = "missing image file"
    labels = {vocabulary: {word.strip(): 1 for word in words if word.strip()} for vocabulary, words in terms.items()}
    return RawStudy(
        study=patient,
        patient=patient,
        views=tuple((path, view) for path, view in places if path is not None),
        name=name,
        report=Report(
            findings=findings,
            impression=impression,
            other=" ".join(f"{label}: {texts[label]}" for label in OTHERS if texts.get(label)) or None,
        ),
        labels={vocabulary: dict(values) for vocabulary, values in labels.items() if values},
        fault=fault,
        gap=gap,
    )


def _text(element: "plain.Element") -> str:
    """Return all text of an element with single spaces."""
    return " ".join("".join(element.itertext()).split())
