"""Reads a table of records: JSON, JSON lines, CSV or TSV, by the standard library, in UTF-8 with or without BOM.

table = read(Path("data.json"))                     # Table: path, columns, records
table.records[0].values["image"], table.records[0].where                     # "images/1.jpg", "record 1"
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radhpc.errors import UserError
from shards import splits

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
MAX_FIELD = 1 << 24  # characters: reports are longer than csv's own limit allows


@dataclass(frozen=True)
class Record:
    """One row; `fault` says why it cannot be used, where the row is broken."""

    where: str  # "row 3", "line 7", "record 1"
    values: dict[str, Any]
    fault: str | None = None


@dataclass(frozen=True)
class Table:
    """All rows of a file, and the names of the columns that any of them has."""

    path: Path
    columns: tuple[str, ...]
    records: tuple[Record, ...]


def find(raw: Path, named: str | None = None) -> Path:
    """The table in a folder, or the file itself. Raises UserError where there is none, or more than one."""
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
    found = sorted(path for path in raw.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"--raw {raw}: no table there; allowed is a file that ends in {', '.join(SUFFIXES)}")
    if len(found) > 1:
        raise UserError(f"--raw {raw}: several tables: {', '.join(p.name for p in found)}; choose with table=NAME")
    return found[0]


def read(path: Path, delimiter: str | None = None) -> Table:
    """Read a table. Raises UserError that names the file and the place of what is wrong."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.object[error.start]:#04x} at offset {error.start} is not UTF-8; save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix.lower() in (".csv", ".tsv"):
        records = _csv(path, text, delimiter or ("\t" if path.suffix.lower() == ".tsv" else ","))
    elif path.suffix.lower() == ".jsonl":
        records = _json_lines(path, text)
    else:
        records = _json(path, text)
    if not records:
        raise UserError(f"{path}: the table is empty")
    columns = dict.fromkeys(name for record in records for name in record.values)
    return Table(path, tuple(columns), tuple(records))


def _csv(path: Path, text: str, delimiter: str) -> list[Record]:
    if delimiter == "\\t":
        delimiter = "\t"
    if len(delimiter) != 1:
        raise UserError(f"delimiter={delimiter}: one character is allowed")
    csv.field_size_limit(MAX_FIELD)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records = []
    try:
        header = [name.strip() for name in next(rows, [])]
        if len(header) == 1:
            _suggest_delimiter(path, header[0], delimiter)
        for row in rows:
            if row:
                fault = None if len(row) == len(header) else "row of another length than the header"
                records.append(Record(f"line {rows.line_num}", dict(zip(header, row, strict=False)), fault))
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: {error}") from error
    return records


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
