"""Any table of images and texts: JSON, JSON lines, CSV or TSV, beside the images.

    [{"image": "images/1.png", "text": "Findings: ... Impression: ...", "patient": "7", "view": "PA"}, ...]

`image` is a path relative to the table, or a list of them. Rows of the same study are its views. Columns are
found by the letters of their usual names (PatientID is patient_id) or named by options: `image=COLUMN text=COLUMN ...`.
Columns that nobody names, dates and names among them, are not read; those that look like patients, studies or splits
are listed. Encoding and delimiter are found, and said where they are not UTF-8 and commas. Cells such as nan, None and
N/A are empty. Texts may be paths of text files beside the table. Images that lie in folders train, test and so on have
these splits, also where each folder has a table of its own.
"""

import re
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
from shards.tabular import cells, external_sort, table, text_files
from shards.text import sections

SYNTHETIC = False

ALIASES: dict[str, tuple[str, ...]] = {
    "image": ("image", "images", "image_path", "image_paths", "path", "file", "file_name", "filename"),
    "text": ("text", "report", "caption"),
    "findings": ("findings",),
    "impression": ("impression",),
    "patient": ("patient", "patient_id", "subject_id", "subject"),
    "study": ("study", "study_id", "study_instance_uid"),
    "view": ("view", "view_position", "projection"),
    "split": ("split", "set", "partition", "subset", "fold"),
    "question": ("question",),
    "answer": ("answer",),
    "labels": ("labels",),
    "language": ("language",),
}
# Columns that look like one of these, by their letters: to be named to the user where they are not used.
_NUMBER = "(id|ids|uid|no|nr|num|number|nummer|numero|key|code|name|hash|index)?$"
LOOKS = {
    "patient": re.compile(f"(patient(en|in)?|paciente?|subject|person|^mrn|^pid|medicalrecord|^nhc){_NUMBER}"),
    "study": re.compile(f"(study|studyinstance|exam|examination|estudio|accession|encounter){_NUMBER}"),
    "split": re.compile("(split|partition|subset|fold|^set|trainvaltest|traintest)$"),
}
NO_SPLIT = "none"  # for split=: the splits are made from the patients
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


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies of the table. Raises UserError for a table that cannot be read."""
    assert isinstance(options, ImageTextOptions)
    if raw is None:
        raise UserError("image_text: --raw is missing: the folder of the table, or the table itself")
    rows = table.open_folder(raw, options.table, options.delimiter)
    columns = find_columns(rows, options)
    for message in (*_unused(rows, columns), *_without_patients(rows, columns)):
        warnings.warn(f"{rows.path.name}: {message}", DatasetWarning, stacklevel=2)
    parser = _RowParser(rows, columns, options)
    different = studies = 0
    for _, items in external_sort.grouped(parser.rows()):
        if isinstance(items[0], RawStudy):
            yield items[0]
            continue
        studies += 1
        different += any((item.report, item.answer) != (items[0].report, items[0].answer) for item in items)
        yield _study(items)
    if different:
        warnings.warn(
            f"{rows.path.name}: {different} of {studies} studies have rows with different texts; each has the text of "
            "its first row that has one",
            DatasetWarning,
            stacklevel=2,
        )
    for message in parser.messages():
        warnings.warn(f"{rows.path.name}: {message}", DatasetWarning, stacklevel=2)


def find_columns(rows: table.Table, options: ImageTextOptions) -> dict[str, str]:
    """Map the names of ALIASES to the table's columns. Raises UserError that lists the columns found and expected."""
    by_letters = {table.letters(name): name for name in reversed(rows.columns)}
    columns = {}
    for ours, aliases in ALIASES.items():
        chosen = getattr(options, ours)
        if ours == "split" and chosen == NO_SPLIT and NO_SPLIT not in rows.columns:
            continue
        if chosen is not None and (ours != "language" or chosen in rows.columns):
            if chosen not in rows.columns:
                raise UserError(
                    f"{ours}={chosen}: no such column in {rows.path}{nearest(chosen, rows.columns)}; "
                    f"found are {', '.join(rows.columns)}"
                )
            if rows.header.count(chosen) > 1:
                table.refuse_repeated(rows.path, rows.header, chosen)
            columns[ours] = chosen
        elif theirs := next((by_letters[name] for name in map(table.letters, aliases) if name in by_letters), None):
            if ours == "split" and table.letters(theirs) != ours and not _holds_splits(rows, theirs):
                continue
            table.refuse_repeated(rows.path, rows.header, theirs)
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


def _holds_splits(rows: table.Table, column: str) -> bool:
    """Return whether all cells of a column are names of splits."""
    values = {str(record.values.get(column, "")).strip().lower() for record in rows.records if not record.fault}
    return bool(values - {""}) and values - {""} <= splits.WORDS.keys()


def _unused(rows: table.Table, columns: dict[str, str]) -> Iterator[str]:
    """Yield a message on each column that looks like a patient, a study or a split, and is not used."""
    for name in rows.columns:
        role = next((role for role, look in LOOKS.items() if look.search(table.letters(name))), None)
        if role is None or name in columns.values():
            continue
        used = f"; '{columns[role]}' is" if role in columns else ""
        yield f"column '{name}' looks like the {role} and is not used{used} ({role}='{name}' uses it)"


def _without_patients(rows: table.Table, columns: dict[str, str]) -> Iterator[str]:
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
        self.identifiers = cells.Identifiers()
        self.texts = text_files.TextFiles(source.path.parent)
        self.folder_splits = "split" not in columns and options.split != NO_SPLIT and self._several_splits()

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
        if self.texts.count:
            yield f"{self.texts.count} texts are paths of text files, which were read"
        if self.folder_splits:
            yield "the splits are those that the images' folders name (others: split=COLUMN, or split=none)"

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
        if isinstance(value, (dict, list)) or isinstance(cells.structure(value), list):
            raise UnusableRecord(f"{ours} is no text")
        return cells.text(value) or None

    def prose(ours: str) -> str | None:
        content = text(ours)
        return None if content is None else parser.texts.resolve(content, folder) or None

    if "\0" in str(get("image")):
        raise UnusableRecord("image path with a zero byte")
    pairs = zip_longest(cells.strings(get("image")), cells.strings(get("view")), fillvalue="")
    views = [view for view in pairs if view[0]]
    images = [path for path, _ in views]
    if not images:
        raise UnusableRecord("no image named")
    patient = parser.identifiers(get("patient")) if text("patient") else ""
    if "patient" in columns and not patient:
        raise UnusableRecord("empty patient")
    question = text("question")
    study = (cells.identifier(get("study")) if text("study") else "") or "\x1f".join([*images, question or ""])
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


def _labels(value: Any, record: dict[str, Any]) -> dict[str, dict[str, int | None]]:
    """Return labels by vocabulary, from a labels column and from columns with CheXpert's names."""
    labels: dict[str, dict[str, int | None]] = {}
    value = cells.structure(value)
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("{"):
            raise UnusableRecord("labels that are no JSON")
        if value.startswith("["):
            raise UnusableRecord("labels that are no list")
        value = [name.strip() for name in value.split("|") if name.strip()]
    if isinstance(value, list):
        value = {name: 1 for name in map(cells.text, value) if name}
    if isinstance(value, dict) and value:
        nested = all(isinstance(inner, dict) for inner in value.values())
        plain = "chexpert" if set(value) <= set(CHEXPERT) else VOCABULARY
        for vocabulary, values in (value if nested else {plain: value}).items():
            labels[cells.text(vocabulary)] = {cells.text(name): _label(label) for name, label in values.items()}
    elif value and not cells.is_empty(value):
        raise UnusableRecord("labels that are no names")
    own = {name: _label(record[name]) for name in CHEXPERT if name in record}
    return {"chexpert": own, **labels} if own else labels


def _label(value: Any) -> int | None:
    if cells.is_empty(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UnusableRecord("a label other than 1, 0, -1 and empty") from None
    if number not in (1, 0, -1):
        raise UnusableRecord("a label other than 1, 0, -1 and empty")
    return int(number)
