"""Reads a table of records: JSON, JSON lines, CSV or TSV, by the standard library, in UTF-8 with or without BOM.

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
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError, first_line
from shards import raw_files, splits

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
MAX_JSON = 1 << 30  # bytes of JSON, which is parsed at once; other tables are read row by row
MAX_FIELD = 1 << 24  # characters: reports are longer than csv's own limit allows


@dataclass(frozen=True)
class Record:
    """One row; `fault` is the reason why a broken one cannot be used."""

    where: str  # "row 3", "line 7", "record 1"
    values: dict[str, Any]
    fault: str | None = None


@dataclass(frozen=True)
class Table:
    """All rows of a file, and the names of all their columns."""

    path: Path
    columns: tuple[str, ...]
    records: Iterable[Record]  # may be walked through more than once


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
    """Yield the rows of a CSV with only these columns. Raises UserError where one is missing.

    Names in the header are compared without the spaces around them. Columns that are not asked for, dates and names
    among them, never leave the file.
    """
    with _reading(path) as file:
        rows, header = _open_csv(path, file, delimiter)
        if missing := [name for name in columns if name not in header]:
            raise UserError(
                f"{path}: no column {', '.join(missing)}; found are {', '.join(header) or 'none'}; "
                f"expected {', '.join(columns)}"
            )
        places = [(name, header.index(name)) for name in columns]
        yield from _records(path, rows, places, len(header))


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


def read(path: Path, delimiter: str | None = None) -> Table:
    """Read a table of any kind. Raises UserError that names the file and the place of what is wrong."""
    records: Iterable[Record]
    if kind(path) in (".csv", ".tsv"):
        with _reading(path) as file:
            _, header = _open_csv(path, file, delimiter)
        columns, records = header, Rows(lambda: stream(path, header, delimiter))
    else:
        with _reading(path, MAX_JSON) as file:
            text = file.read()
        parse = _json_lines if kind(path) == ".jsonl" else _json
        records = parse(path, text)
        columns = list(dict.fromkeys(name for record in records for name in record.values))
    if next(iter(records), None) is None:
        raise UserError(f"{path}: the table is empty")
    return Table(path, tuple(columns), records)


def kind(path: Path) -> str:
    """Return the suffix, without that of a compression."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


@contextlib.contextmanager
def _reading(path: Path, limit: int | None = None) -> Iterator[io.TextIOWrapper]:
    """Open for text, and turn errors in the bytes into one line."""
    try:
        with raw_files.open_table(path, limit) as binary:
            yield io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.object[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cut or damaged ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error


def _open_csv(path: Path, file: Iterable[str], delimiter: str | None) -> tuple[Any, list[str]]:
    """Return the rows after the header, and the header."""
    delimiter = delimiter or ("\t" if kind(path) == ".tsv" else ",")
    if delimiter == "\\t":
        delimiter = "\t"
    if len(delimiter) != 1:
        raise UserError(f"delimiter={delimiter}: one character is allowed")
    csv.field_size_limit(MAX_FIELD)
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: {error}") from error
    if len(header) == 1:
        _suggest_delimiter(path, header[0], delimiter)
    return rows, header


def _records(path: Path, rows: Any, places: Sequence[tuple[str, int]], length: int) -> Iterator[Record]:
    try:
        for row in rows:
            if row:
                fault = None if len(row) == length else "row of another length than the header"
                values = {name: row[place] for name, place in places if place < len(row)}
                yield Record(f"line {rows.line_num}", values, fault)
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: {error}") from error


def _suggest_delimiter(path: Path, header: str, delimiter: str) -> None:
    for other, name in DELIMITERS.items():
        if other in header and other != delimiter:
            written = "\\t" if other == "\t" else other
            raise UserError(
                f"{path}: cut at each {DELIMITERS.get(delimiter, delimiter)}, the header is one column, '{header}'; "
                f"if the {name} cuts it, give delimiter='{written}'"
            )


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
