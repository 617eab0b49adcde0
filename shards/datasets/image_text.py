"""Any table of images and texts: JSON, JSON lines, CSV or TSV, beside the images.

    [{"image": "images/1.png", "text": "Findings: ... Impression: ...", "patient": "7", "view": "PA"}, ...]

`image` is a path relative to the table, or a list of them. Rows of the same study are its views. Columns are
found by their usual names (ALIASES) or named by options: `image=COLUMN text=COLUMN ...`. Columns that nobody
names, dates and names among them, are not read.
"""

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import Field

from radhpc.core.errors import UserError, nearest
from radhpc.core.sample import CHEXPERT, Report, Split
from shards import splits
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import external_sort, table
from shards.text import sections

SYNTHETIC = False

ALIASES: dict[str, tuple[str, ...]] = {
    "image": ("image", "images", "image_path", "image_paths", "path", "file", "file_name", "filename"),
    "text": ("text", "report", "caption"),
    "findings": ("findings",),
    "impression": ("impression",),
    "patient": ("patient", "patient_id", "subject_id"),
    "study": ("study", "study_id"),
    "view": ("view", "view_position", "projection"),
    "split": ("split",),
    "question": ("question",),
    "answer": ("answer",),
    "labels": ("labels",),
    "language": ("language",),
}
VOCABULARY = "own"  # of labels that name none


def _column(content: str) -> Any:
    return Field(None, description=f"the column of {content}")


class ImageTextOptions(ReaderOptions):
    """image_text: any table of images and texts."""

    table: str | None = Field(None, description="the file in the folder, where it holds several tables")
    delimiter: str | None = Field(None, description="the character between the columns of a CSV; \\t is a tab")
    image: str | None = _column("image paths")
    text: str | None = _column("whole reports or captions")
    findings: str | None = _column("findings, where sections have columns of their own")
    impression: str | None = _column("impressions, where sections have columns of their own")
    patient: str | None = _column("patients; without one each study counts as a patient")
    study: str | None = _column("studies; without one each row is a study")
    view: str | None = _column("projections: PA, AP, L, ...")
    split: str | None = _column("official splits: train, validate or test")
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


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies of the table. Raises UserError for a table that cannot be read."""
    assert isinstance(options, ImageTextOptions)
    if raw is None:
        raise UserError("image_text: --raw is missing: the folder of the table, or the table itself")
    rows = table.read(table.find(raw, options.table), options.delimiter)
    columns = find_columns(rows, options)
    if "patient" not in columns:
        warnings.warn(
            f"{rows.path.name}: no patient column, so each study counts as a patient of its own; if patients have "
            "several studies, name the column with patient=COLUMN",
            DatasetWarning,
            stacklevel=2,
        )
    for _, items in external_sort.grouped(_rows(rows, columns, options)):
        yield items[0] if isinstance(items[0], RawStudy) else _study(items)


def _rows(
    source: table.Table, columns: dict[str, str], options: ImageTextOptions
) -> Iterator[tuple[str, TableRow | RawStudy]]:
    """Yield (key of a study, its row), row by row; a row that cannot be used is a study of its own."""
    for number, record in enumerate(source.records):
        own_key = str(number)
        try:
            item = _parse_row(record, columns, options, source.path.parent)
        except UnusableRecord as fault:
            name = f"{source.path.name} {record.where}"
            yield own_key, unusable_study(name, fault)
            continue
        study_key = "\x1f".join((item.patient, item.study, item.question or ""))
        yield study_key if "study" in columns else own_key, item


def find_columns(rows: table.Table, options: ImageTextOptions) -> dict[str, str]:
    """Map the names of ALIASES to the table's columns. Raises UserError that lists the columns found and expected."""
    by_name = {name.strip().lower(): name for name in reversed(rows.columns)}
    columns = {}
    for ours, aliases in ALIASES.items():
        chosen = getattr(options, ours)
        if chosen is not None and (ours != "language" or chosen in rows.columns):
            if chosen not in rows.columns:
                raise UserError(
                    f"{ours}={chosen}: no such column in {rows.path}{nearest(chosen, rows.columns)}; "
                    f"found are {', '.join(rows.columns)}"
                )
            columns[ours] = chosen
        elif theirs := next((by_name[alias] for alias in aliases if alias in by_name), None):
            columns[ours] = theirs
    has_text = (
        "text" in columns
        or "findings" in columns
        or "impression" in columns
        or {"question", "answer"} <= columns.keys()
    )
    if "image" not in columns or not has_text:
        lacking = [name for name, present in (("image", "image" in columns), ("text", has_text)) if not present]
        raise UserError(
            f"{rows.path}: no column for {' and '.join(lacking)}; found are {', '.join(rows.columns) or 'none'}; "
            f"expected {' or '.join(ALIASES['image'])} and {' or '.join(ALIASES['text'])} "
            "(or name them: image=COLUMN text=COLUMN)"
        )
    return columns


def _parse_row(record: table.Record, columns: dict[str, str], options: ImageTextOptions, folder: Path) -> TableRow:
    """Parse one row. Raises UnusableRecord."""
    if record.fault:
        raise UnusableRecord(record.fault)

    def get(ours: str) -> Any:
        value = record.values.get(columns[ours]) if ours in columns else None
        return None if isinstance(value, float) and math.isnan(value) else value

    def text(ours: str) -> str | None:
        value = get(ours)
        if isinstance(value, (dict, list)):
            raise UnusableRecord(f"{ours} is no text")
        return _text(value) or None

    views = [view for view in zip_longest(_strings(get("image")), _strings(get("view")), fillvalue="") if view[0]]
    images = [path for path, _ in views]
    if not images:
        raise UnusableRecord("no image named")
    if any("\0" in path for path in images):
        raise UnusableRecord("image path with a zero byte")
    if "patient" in columns and not text("patient"):
        raise UnusableRecord("empty patient")
    question = text("question")
    study = text("study") or "\x1f".join([*images, question or ""])
    try:
        split = splits.parse(word) if (word := text("split")) else None
    except UserError:
        raise UnusableRecord("unknown split") from None
    code = options.language if options.language not in columns.values() else None
    return TableRow(
        views=tuple((folder / path, view or None) for path, view in views),
        patient=text("patient") or (study if "study" in columns else "\x1f".join(images)),
        study=study,
        split=split,
        report=_report(text("text"), text("findings"), text("impression"), options),
        language=text("language") or code or "en",
        labels=_labels(get("labels"), record.values),
        question=question,
        answer=text("answer"),
        name=f"{folder.name}: {images[0]}",
    )


def _report(text: str | None, findings: str | None, impression: str | None, options: ImageTextOptions) -> Report:
    """Choose the report: section columns that an option names, else the text, else section columns found by name."""
    named = options.findings or options.impression
    if text and not named:
        return sections.split(text)
    return Report(findings=findings, impression=impression)


def _study(items: list[TableRow]) -> RawStudy:
    """Combine the rows of one study: the views of all, everything else of the first."""
    first = items[0]
    fault = None
    if not first.report.text() and not first.answer:
        fault = "empty text"
    elif any(item.report != first.report or item.answer != first.answer for item in items):
        fault = "rows of one study with different texts"
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


def _text(value: Any) -> str:
    """Return a cell as text; some exporters write integers with a point, so 7.0 becomes 7 and both are one patient."""
    if value is None:
        return ""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise UnusableRecord("text that is no Unicode") from None
    return text


def _strings(value: Any) -> list[str]:
    """Return a list of texts from one text or several; in a CSV several are a JSON list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value]  # a file may be called so
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, (dict, list)) for item in values):
        raise UnusableRecord("image or view that is no text")
    return [_text(item) for item in values]


def _labels(value: Any, record: dict[str, Any]) -> dict[str, dict[str, int | None]]:
    """Return labels by vocabulary, from a labels column and from columns with CheXpert's names."""
    labels: dict[str, dict[str, int | None]] = {}
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("{"):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                raise UnusableRecord("labels that are no JSON") from None
        else:
            value = [name.strip() for name in value.split("|") if name.strip()]
    if isinstance(value, list):
        value = {_text(name): 1 for name in value}
    if isinstance(value, dict) and value:
        nested = all(isinstance(inner, dict) for inner in value.values())
        plain = "chexpert" if set(value) <= set(CHEXPERT) else VOCABULARY
        for vocabulary, values in (value if nested else {plain: value}).items():
            labels[_text(vocabulary)] = {_text(name): _label(label) for name, label in values.items()}
    elif value:
        raise UnusableRecord("labels that are no names")
    own = {name: _label(record[name]) for name in CHEXPERT if name in record}
    return {"chexpert": own, **labels} if own else labels


def _label(value: Any) -> int | None:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UnusableRecord("a label other than 1, 0, -1 and empty") from None
    if number not in (1, 0, -1):
        raise UnusableRecord("a label other than 1, 0, -1 and empty")
    return int(number)
