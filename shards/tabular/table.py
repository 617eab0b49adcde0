"""Reads a table of records: JSON, JSON lines, CSV or TSV, by the standard library, as dialect.py finds it written.

    for record in stream(path, ("ImageID", "Report")):    # a large CSV: only these columns, row by row
        record.values["ImageID"], record.where, record.fault                 # "1.png", "line 7", None
    table = read(Path("data.json"))                       # a table of any kind: path, columns, records

A CSV may be compressed (.csv.gz), and is never held in memory.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError, first_line
from shards import splits
from shards.datasets.reader import DatasetWarning
from shards.tabular import dialect

CSV = (".csv", ".tsv")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
MAX_FIELD = 1 << 24  # characters: reports are longer than csv's own limit allows


@dataclass(frozen=True)
class Record:
    """One row; `fault` is the reason why a broken one cannot be used."""

    where: str  # "row 3", "line 7", "record 1"
    values: dict[str, Any]
    fault: str | None = None
    folder: Path | None = None  # what its paths are relative to, where it is not the table's


@dataclass(frozen=True)
class Table:
    """All rows of a file, and the names of all their columns."""

    path: Path
    columns: tuple[str, ...]
    records: Iterable[Record]  # may be walked through more than once
    header: tuple[str, ...] = ()  # of a CSV: the columns as they stand, those of the same name included


@dataclass(frozen=True)
class Rows:
    """The records of a CSV, read anew on each walk."""

    walk: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[Record]:
        return self.walk()


def locate(raw: Path | None, names: Sequence[str], description: str) -> Path:
    """Return the first of `names` in the folder `raw`, plain or gzipped; `raw` may be that file itself.

    Raises UserError, which calls the table `description`.
    """
    if raw is None:
        raise UserError(f"--raw is missing: the folder of {description}")
    if raw.is_file():
        return raw
    if not raw.is_dir():
        raise UserError(f"--raw {raw}: no such file or folder")
    if path := find_one(raw, names):
        return path
    raise UserError(f"--raw {raw}: no {description} there; looked for {', '.join(names)} (also .gz)")


def find_one(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first of `names` that is in the folder, plain or gzipped, or None."""
    return next((path for name in names for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def stream(path: Path, columns: Sequence[str], delimiter: str | None = None) -> Iterator[Record]:
    """Yield the rows of a CSV with only these columns. Raises UserError where one is missing or there twice.

    Names in the header are compared without the spaces around them. Columns that are not asked for, dates and names
    among them, never leave the file.
    """
    with _reading(path, delimiter) as (file, cut):
        rows, header = _open_csv(path, file, cut)
        if missing := [name for name in columns if name not in header]:
            raise UserError(
                f"{path}: no column {', '.join(missing)}; found are {', '.join(header) or 'none'}; "
                f"expected {', '.join(columns)}"
            )
        for name in columns:
            if header.count(name) > 1:
                refuse_repeated(path, header, name)
        places = [(name, header.index(name)) for name in columns]
        yield from _records(path, rows, places, len(header), cut)


def refuse_repeated(path: Path, header: Sequence[str], name: str) -> None:
    """Raise UserError where the header has a column twice, so that nobody can know which one is meant."""
    places = [n for n, other in enumerate(header, 1) if other == name or letters(other) == (letters(name) or None)]
    if len(places) > 1:
        names = ", ".join(f"'{other}'" for other in dict.fromkeys(header[n - 1] for n in places))
        raise UserError(
            f"{path}: line 1, columns {' and '.join(map(str, places))} have the same name ({names}), so it is not "
            "known which one is meant; rename or remove one"
        )


def letters(name: str) -> str:
    """Return the letters and digits of a column's name: PatientID, patient_id and "Patient ID" are the same."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFC", name)).casefold()


def find(raw: Path, named: str | None = None) -> Path:
    """Return the table in a folder, or the file itself. Raises UserError where there is none, or more than one."""
    if raw.is_file():
        return raw
    if not raw.is_dir():
        raise UserError(f"--raw {raw}: no such file or folder")
    if named:
        if not (raw / named).is_file():
            raise UserError(f"table={named}: no such file in {raw}")
        return raw / named
    if (raw / "data.json").is_file():
        return raw / "data.json"
    tables = sorted(path for path in raw.iterdir() if kind(path) in SUFFIXES and path.is_file())
    if not tables:
        raise UserError(f"--raw {raw}: no table there; allowed is a file that ends in {', '.join(SUFFIXES)} (also .gz)")
    if len(tables) > 1:
        raise UserError(f"--raw {raw}: several tables: {', '.join(p.name for p in tables)}; choose with table=NAME")
    return tables[0]


def open_folder(raw: Path, named: str | None = None, delimiter: str | None = None) -> Table:
    """Read the table of a folder; or those of its folders train, test, ..., as Hugging Face's imagefolder has them."""
    parts = _split_folders(raw) if raw.is_dir() and not named else []
    if not parts:
        return read(find(raw, named), delimiter)
    tables = [(split, read(path, delimiter)) for split, path in parts]
    columns = tuple(dict.fromkeys(name for _, part in tables for name in part.columns))
    header = next((part.header for _, part in tables if len(set(part.header)) < len(part.header)), columns)

    def walk() -> Iterator[Record]:
        for split, part in tables:
            for record in part.records:
                where = f"{part.path.parent.name} {record.where}"
                yield replace(record, where=where, values={"split": split, **record.values}, folder=part.path.parent)

    return Table(raw / parts[0][1].name, tuple(dict.fromkeys(("split", *columns))), Rows(walk), header)


def _split_folders(raw: Path) -> list[tuple[str, Path]]:
    """Return (split, table) of each folder called like a split that holds one, if the folder has no table itself."""
    if any(kind(path) in SUFFIXES and path.is_file() for path in raw.iterdir()):
        return []
    folders = sorted(path for path in raw.iterdir() if path.name.lower() in splits.WORDS and path.is_dir())
    holding = [(folder, [p for p in folder.iterdir() if kind(p) in SUFFIXES and p.is_file()]) for folder in folders]
    return [(folder.name, find(folder)) for folder, tables in holding if tables]


def read(path: Path, delimiter: str | None = None) -> Table:
    """Read a table of any kind. Raises UserError that names the file and the place of what is wrong."""
    records: Iterable[Record]
    header: list[str] = []
    if kind(path) in CSV:
        with _reading(path, delimiter) as (file, cut):
            _, header = _open_csv(path, file, cut)
        columns, records = list(dict.fromkeys(header)), Rows(lambda: _stream_all(path, delimiter))
    else:
        with _reading(path) as (file, _):
            text = file.read()
        parse = _json_lines if kind(path) == ".jsonl" else _json
        records = parse(path, text)
        columns = list(dict.fromkeys(name for record in records for name in record.values))
    if next(iter(records), None) is None:
        raise UserError(f"{path}: the table is empty")
    return Table(path, tuple(columns), records, tuple(header or columns))


def _stream_all(path: Path, delimiter: str | None) -> Iterator[Record]:
    with _reading(path, delimiter) as (file, cut):
        rows, header = _open_csv(path, file, cut)
        places = [(name, place) for place, name in enumerate(header) if name not in header[:place]]
        yield from _records(path, rows, places, len(header), cut)


def kind(path: Path) -> str:
    """Return the suffix, without that of a compression."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


@contextlib.contextmanager
def _reading(path: Path, delimiter: str | None = None) -> Iterator[tuple[io.TextIOWrapper, str]]:
    """Open for text, with the delimiter of a CSV, and turn errors in the bytes into one line."""
    usual = {".tsv": "\t", ".csv": ","}.get(kind(path), ",")
    delimiter = "\t" if delimiter == "\\t" else delimiter
    if delimiter is not None and len(delimiter) != 1:
        raise UserError(f"delimiter={delimiter}: one character is allowed")
    try:
        form = dialect.detect(path, usual if kind(path) not in (".json", ".jsonl") and delimiter is None else None)
        if message := form.message(usual):
            warnings.warn(f"{path.name}: {message}", DatasetWarning, stacklevel=4)
        with path.open("rb") as plain:
            binary = gzip.GzipFile(fileobj=plain) if path.suffix.lower() == ".gz" else plain
            with io.TextIOWrapper(binary, encoding=form.encoding, newline="") as file:
                yield file, delimiter or form.delimiter or usual
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.object[error.start]:#04x} is not {dialect.NAMES.get(error.encoding, 'UTF-8')}; save "
            "the file as UTF-8"
        ) from error
    except UnicodeError as error:
        raise UserError(f"{path}: no text ({first_line(error)}); save the file as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cut or damaged ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error


@dataclass
class _Lines:
    """The lines of a file; those since the last row are kept, so that a fault can be placed."""

    file: Iterable[str]
    row: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.row.append(line)
            yield line


@dataclass
class _CsvRows:
    """The rows of a CSV, and the lines that the last one was read from."""

    path: Path
    lines: _Lines
    reader: Any

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            self.lines.row.clear()
            try:
                row = next(self.reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise self._broken(error) from error
            yield row

    @property
    def where(self) -> str:
        """The line where the last row begins, or its lines."""
        last, count = self.reader.line_num, len(self.lines.row)
        return f"line {last}" if count < 2 else f"lines {last - count + 1} to {last}"

    def _broken(self, error: csv.Error) -> UserError:
        """Return the error of a row that is none: nearly always a quote that nobody closed, often lines above."""
        last, rows = self.reader.line_num, self.lines.row
        start, quote = last - len(rows) + 1, next((line.find('"') + 1 for line in rows if '"' in line), 0)
        if len(rows) < 2 or not quote:
            return UserError(f"{self.path}: line {last}{f', character {quote}' if quote else ''}: {error}")
        return UserError(
            f"{self.path}: line {start}, character {quote}: a quote that is opened there swallows what follows, to "
            f"line {last} ({error})"
        )


def _open_csv(path: Path, file: Iterable[str], delimiter: str) -> tuple[_CsvRows, list[str]]:
    """Return the rows after the header, and the header."""
    csv.field_size_limit(MAX_FIELD)
    lines = _Lines(file)
    rows = _CsvRows(path, lines, csv.reader(lines, delimiter=delimiter, strict=True))
    header = next(iter(rows), [])
    if dialect.SEPARATOR_LINE.match("".join(lines.row)):
        header = next(iter(rows), [])
    return rows, [name.strip() for name in header]


def _records(
    path: Path, rows: _CsvRows, places: Sequence[tuple[str, int]], length: int, delimiter: str
) -> Iterator[Record]:
    for row in rows:
        if not row:
            continue
        where, fault = rows.where, None
        if len(row) != length:
            fault = "row of another length than the header"
        values = {name: row[place] for name, place in places if place < len(row)}
        zero = next((place for name, place in places if "\0" in values.get(name, "")), None)
        if zero is not None:
            where, fault = f"{where}, column {zero + 1}", fault or "zero byte in a cell"
        if len(rows.lines.row) > 1 and (place := _swallowing(row, delimiter)) is not None:
            where, fault = f"{where}, column {place + 1}", "a quote that swallows rows"
        yield Record(where, values, fault)


def _swallowing(row: Sequence[str], delimiter: str) -> int | None:
    """Return the place of a cell of several lines, of which one is a row like this one, or None.

    Reports have lines with commas, too. So a line counts as a row only if its other cells are of the same form as
    those of this row, such as a1/b2.png and a3/b4.png, and one of them is more than a word or a number.
    """
    for place, cell in enumerate(row):
        for line in cell.splitlines()[1:]:
            parts = line.split(delimiter)
            before = [_form(part) for part in parts[:place]]
            after = [_form(part) for part in parts[len(parts) - (len(row) - place - 1) :]]
            alike_before = len(parts) > place and before == [_form(part) for part in row[:place]]
            alike_after = len(parts) >= len(row) and after == [_form(part) for part in row[place + 1 :]]
            if (alike_before and _telling(before)) or (
                alike_after and (_telling(after) or (alike_before and len(parts) == len(row)))
            ):
                return place
    return None


def _telling(forms: Sequence[str]) -> bool:
    return any(re.fullmatch(r"\S*\w[./\\_-]+\w\S*", form) for form in forms)


def _form(cell: str) -> str:
    """Return the form of a cell: 00-102.png is 0-0.a."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", cell.strip().strip('"')))


def _json(path: Path, text: str) -> list[Record]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object after the other: JSON lines under another name
            return _json_lines(path, text)
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: no valid JSON ({error.msg})") from error
    if isinstance(value, dict):
        lists = {key: items for key, items in value.items() if isinstance(items, list)}
        if len(lists) > 1 and set(map(str.lower, lists)) <= set(splits.WORDS):
            return [
                Record(f"{key} record {n}", {"split": key, **item})
                for key, items in lists.items()
                for n, item in enumerate(_objects(path, items), 1)
            ]
        if len(lists) != 1:
            raise UserError(
                f"{path}: an object with {len(lists)} lists ({', '.join(lists) or 'none'}); allowed are a list of "
                "records, an object with one such list, or one for each split"
            )
        value = next(iter(lists.values()))
    return [Record(f"record {n}", item) for n, item in enumerate(_objects(path, value), 1)]


def _json_lines(path: Path, text: str) -> list[Record]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(Record(f"line {number}", _objects(path, [json.loads(line)])[0]))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number}: no valid JSON ({error.msg})") from error
    return records


def _objects(path: Path, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f'{path}: the records must be a list of objects such as {{"image": ..., "text": ...}}')
    return value
