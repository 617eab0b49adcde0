"""Any table of images and texts: JSON, JSON lines, CSV or TSV, beside the images.

    [{"image": "images/1.png", "text": "Findings: ... Impression: ...", "patient": "7", "view": "PA"}, ...]

`image` is a path relative to the table, or a list of them. Rows of the same study are its views; where their texts
differ, the first one counts, and a warning says how many studies these are. Columns are found by the letters of their
usual names (PatientID is patient_id) or named by options: `image=COLUMN text=COLUMN ...`. Columns that nobody names,
dates and names among them, are not read; those that look like patients, studies or splits are listed.

Encoding (UTF-8, UTF-16, Windows-1252) and delimiter are found, and said where they are unusual. Cells such as nan,
None, N/A and a dash are empty; lists may be JSON, or as pandas and numpy print them. A text that is a path is that of
the file, which must lie below the table's folder, or else the row is left out by name. Patients are compared in one
form: 7, 7.0 and "7 " are one, and so are P07 and p07; 7 and 007 are two, and a warning says so.

Splits come from a column; or from the names of folders or files: images in train/ and test/, a table in each of such
folders, or train.csv beside test.csv. split=none makes them from the patients instead.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import Field

from radhpc.core.errors import UserError
from radhpc.core.sample import Report, Split
from shards import splits
from shards.datasets.helpers import table_columns, table_labels
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import cells, external_sort, identifiers, split_tables, table, text_files
from shards.text import sections

SYNTHETIC = False


def _column(content: str) -> Any:
    return Field(None, description=f"the column of {content}")


class ImageTextOptions(ReaderOptions):
    """image_text: any table of images and texts."""

    table: str | None = Field(None, description="the file in the folder, where it holds several tables")
    delimiter: str | None = Field(None, description="the character between the columns of a CSV; \\t is a tab")
    encoding: str | None = Field(None, description="of the table and of text files, such as cp1250 or gb18030")
    image: str | None = _column("image paths")
    text: str | None = _column("whole reports or captions")
    findings: str | None = _column("findings, where sections have columns of their own")
    impression: str | None = _column("impressions, where sections have columns of their own")
    patient: str | None = _column("patients; without one each study counts as a patient")
    study: str | None = _column("studies; without one each row is a study")
    view: str | None = _column("projections: PA, AP, L, ...")
    split: str | None = _column("official splits: train, validate or test; none: made here, from the patients")
    question: str | None = _column("questions about the image")
    answer: str | None = _column("answers to them")
    labels: str | None = _column("labels: {name: 1, 0, -1 or null}, or the names of what is present")
    language: str | None = Field(None, description="the column of languages, or one code for all, such as es")


OPTIONS = ImageTextOptions


@dataclass(frozen=True)
class TableRow:
    """One row of the table, parsed."""

    views: tuple[tuple[Path, str | None], ...]
    patient: str
    study: str
    split: Split | None
    report: Report
    language: str
    labels: dict[str, dict[str, int | None]]
    question: str | None
    answer: str | None
    name: str

    @property
    def content(self) -> tuple[object, ...]:
        """All that rows of one study must have in common."""
        return self.report, self.language, self.labels, self.answer


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies of the table. Raises UserError for a table that cannot be read."""
    assert isinstance(options, ImageTextOptions)
    if raw is None:
        raise UserError("image_text: --raw is missing: the folder of the table, or the table itself")
    rows = split_tables.open_folder(raw, options.table, table.Form(options.delimiter, options.encoding))
    columns = table_columns.find_columns(rows, options.model_dump(include=set(table_columns.ALIASES)))
    for message in (*table_columns.unused_columns(rows, columns), *_without_patients(columns)):
        _warn(rows, message)
    parser = _RowParser(rows, columns, options)
    different = studies = 0
    for _, items in external_sort.grouped(parser.rows()):
        if isinstance(items[0], RawStudy):
            yield items[0]
            continue
        studies += 1
        different += any(item.content != items[0].content for item in items)
        yield _study(items)
    if different:
        _warn(
            rows,
            f"{different} of {studies} studies have rows with different texts or labels; each has those of its first "
            "row that has a text",
        )
    for message in parser.messages():
        _warn(rows, message)


def _warn(rows: table.Table, message: str) -> None:
    warnings.warn(f"{rows.path.name}: {message}", DatasetWarning, stacklevel=3)


def _without_patients(columns: dict[str, str]) -> Iterator[str]:
    if "patient" not in columns:
        yield (
            "no patient column, so each study counts as a patient of its own; if patients have several studies, name "
            "the column with patient=COLUMN"
        )


def _folder_split(path: str) -> Split | None:
    """Return the split that the folders of an image name, as those of Hugging Face's imagefolder do."""
    parts = re.split(r"[/\\]", path)[:-1]
    named = {splits.WORDS[part.lower()] for part in parts if part.lower() in splits.WORDS}
    return named.pop() if len(named) == 1 else None


class _RowParser:
    """Parses the rows of a table, and knows what there is to say about them."""

    def __init__(self, source: table.Table, columns: dict[str, str], options: ImageTextOptions) -> None:
        self.source, self.columns, self.options = source, columns, options
        self.patients, self.studies = identifiers.Identifiers(), identifiers.Identifiers()
        self.texts = text_files.TextFiles(source.path.parent, options.encoding)
        unknown = "split" not in columns and options.split != table_columns.NO_SPLIT
        self.folder_splits = unknown and self._several_splits()
        self.with_split = self.without_split = 0  # rows

    def _several_splits(self) -> bool:
        """Return whether the folders of the images name two splits or three."""
        named: set[Split | None] = set()
        for record in self.source.records:
            named |= {_folder_split(path) for path in re.split(r"[|,]", str(record.values.get(self.columns["image"])))}
            if len(named - {None}) > 1:
                return True
        return False

    def messages(self) -> Iterator[str]:
        """Yield what is to be said once all rows are read."""
        yield from self.patients.messages("patient")
        yield from self.studies.messages("study")
        if self.texts.count:
            yield f"{self.texts.count} texts are paths of text files, which were read"
        if self.folder_splits:
            yield "the splits are those that the images' folders name (others: split=COLUMN, or split=none)"
        if self.with_split and self.without_split:
            total = self.with_split + self.without_split
            yield f"{self.without_split} of {total} rows have no split, so theirs is made from the patients"

    def rows(self) -> Iterator[tuple[str, TableRow | RawStudy]]:
        """Yield (key of a study, its row), row by row; a row that cannot be used is a study of its own."""
        for number, record in enumerate(self.source.records):
            own_key = str(number)
            try:
                item = _parse_row(record, self)
            except UnusableRecord as fault:
                name = f"{self.source.path.name} {record.where}"
                yield own_key, unusable_study(name, fault)
                continue
            self.with_split += item.split is not None
            self.without_split += item.split is None
            study_key = "\x1f".join((item.patient, item.study, item.question or ""))
            yield study_key if "study" in self.columns else own_key, item


def _parse_row(record: table.Record, parser: _RowParser) -> TableRow:
    """Parse one row. Raises UnusableRecord."""
    if record.fault:
        raise UnusableRecord(record.fault)
    columns, options, folder = parser.columns, parser.options, record.folder or parser.source.path.parent

    def get(ours: str) -> Any:
        value = record.values.get(columns[ours]) if ours in columns else None
        return None if cells.is_empty(value) else value

    def text(ours: str) -> str | None:
        value = get(ours)
        if isinstance(cells.structure(value), (dict, list)):
            raise UnusableRecord(f"{ours} is no text")
        return cells.text(value) or None

    def prose(ours: str) -> str | None:
        content = text(ours)
        return None if content is None else parser.texts.resolve(content, folder) or None

    if "\0" in str(get("image")):
        raise UnusableRecord("image path with a zero byte")
    pairs = zip_longest(cells.strings(get("image")), cells.strings(get("view")), fillvalue="")
    views = [view for view in pairs if view[0]]
    # Two folders with a table each may hold images of the same name.
    place = folder.relative_to(parser.source.path.parent)
    images = [str(place / path) if place.parts else path for path, _ in views]
    if not images:
        raise UnusableRecord("no image named")
    patient = parser.patients(get("patient")) if text("patient") else ""
    if "patient" in columns and not patient:
        raise UnusableRecord("empty patient")
    question = prose("question")
    study = parser.studies(get("study"), within=patient) if text("study") else ""
    study = study or "\x1f".join([*images, question or ""])
    try:
        split = splits.parse(word) if (word := text("split")) else None
    except UserError:
        raise UnusableRecord("unknown split") from None
    if parser.folder_splits:
        split = _folder_split(images[0])
    code = options.language if options.language not in columns.values() else None
    return TableRow(
        views=tuple((folder / path, view or None) for path, view in views),
        patient=patient or (study if "study" in columns else "\x1f".join(images)),
        study=study,
        split=split,
        report=_report(prose("text"), prose("findings"), prose("impression"), options),
        language=text("language") or code or "en",
        labels=table_labels.parse_labels(get("labels"), record.values),
        question=question,
        answer=prose("answer"),
        name=f"{parser.source.path.parent.name}: {images[0]}",
    )


def _report(text: str | None, findings: str | None, impression: str | None, options: ImageTextOptions) -> Report:
    """Choose the report: section columns that an option names, else the text, else section columns found by name."""
    named = options.findings or options.impression
    if text and not named:
        return sections.split(text)
    return Report(findings=findings, impression=impression)


def _study(items: list[TableRow]) -> RawStudy:
    """Combine the rows of one study: the views of all, everything else of the first one that has a text."""
    first = next((item for item in items if item.report.text() or item.answer), items[0])
    fault = None
    if not first.report.text() and not first.answer:
        fault = "empty text"
    elif any(item.split != first.split for item in items):
        fault = "rows of one study in different splits"
    return RawStudy(
        study=f"{first.patient}\x1f{first.study}\x1f{first.question or ''}",
        patient=first.patient,
        views=tuple(view for item in items for view in item.views),
        name=first.name,
        split=first.split,
        report=first.report,
        language=first.language,
        labels=first.labels,
        question=first.question,
        answer=first.answer,
        fault=fault,
    )
