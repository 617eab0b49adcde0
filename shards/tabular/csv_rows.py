"""Reads the rows of a CSV, and names what is broken in them by line and column.

    rows, header = open_csv(path, file, ",")
    for record in records(rows, [("ImageID", 0), ("Report", 3)], len(header), ","):
        ...

Named are a row of another length than the header, a zero byte, and a quote that nobody closed or opened, so that the
next rows became a part of one cell: where the file cannot be read on with a UserError, else as the fault of a record.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from radhpc.core.errors import UserError
from shards.tabular import dialect
from shards.tabular.lines import MAX_LINE, LongLine, lines_of
from shards.tabular.records import Record

MAX_FIELD = MAX_LINE  # characters: reports are longer than csv's own limit allows
TOO_LONG = f"line of more than {MAX_LINE} characters"
LONG_NUMBER = 5  # digits from which on a number tells one row from another
# The form of a cell that hardly a sentence has: a path, a file's name, a long number.
TELLING = re.compile(r"\S*a[./\\_-]+[a0]\S*|\S*0[./\\_-]+a\S*|\S*00\S*")


@dataclass
class Lines:
    """The lines of a file; those since the last row are kept, so that a fault can be placed."""

    file: TextIO
    row: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        for line in lines_of(self.file):
            self.row.append(line)
            yield line


@dataclass
class CsvRows:
    """The rows of a CSV, and the lines that the last one was read from."""

    path: Path
    lines: Lines
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
    def line(self) -> int:
        """The line in which the last row begins."""
        return int(self.reader.line_num) - max(0, len(self.lines.row) - 1)

    def _broken(self, error: csv.Error) -> UserError:
        """Return the error of a row that is none: nearly always a quote that nobody closed, often lines above."""
        last, rows = self.reader.line_num, self.lines.row
        start, quote = self.line, next((line.find('"') + 1 for line in rows if '"' in line), 0)
        if len(rows) < 2 or not quote:
            return UserError(f"{self.path}: line {last}{f', character {quote}' if quote else ''}: {error}")
        return UserError(
            f"{self.path}: line {start}, character {quote}: a quote that is opened there swallows what follows, to "
            f"line {last} ({error})"
        )


def open_csv(path: Path, file: TextIO, delimiter: str) -> tuple[CsvRows, list[str]]:
    """Return the rows after the header, and the header. Raises UserError."""
    csv.field_size_limit(MAX_FIELD)
    lines = Lines(file)
    rows = CsvRows(path, lines, csv.reader(lines, delimiter=delimiter, strict=True))
    header = next(iter(rows), [])
    if dialect.SEPARATOR_LINE.match("".join(lines.row)):
        header = next(iter(rows), [])
    if zero := next((place for place, name in enumerate(header, 1) if "\0" in name), 0):
        raise UserError(f"{path}: line {rows.line}, column {zero}: zero byte in the column's name")
    return rows, [name.strip() for name in header]


def records(rows: CsvRows, places: Sequence[tuple[str, int]], length: int, delimiter: str) -> Iterator[Record]:
    """Yield the rows as records of the columns (name, place), `length` being that of the header. Raises UserError."""
    lines = rows.lines.row
    for row in rows:
        if any(isinstance(line, LongLine) for line in rows.lines.row):
            yield Record(f"line {rows.line}", {}, TOO_LONG)
            continue
        if not row:
            continue
        where, fault = f"line {rows.line}", None
        if len(row) != length:
            fault = "row of another length than the header"
        values = {name: row[place] for name, place in places if place < len(row)}
        if any("\0" in line for line in lines):
            zero = next((place for name, place in places if "\0" in values.get(name, "")), None)
            if zero is not None:
                where, fault = f"{where}, column {zero + 1}", fault or "zero byte in a cell"
        if len(lines) > 1 and (place := _swallowing(row, delimiter)) is not None:
            where, fault = (
                f"lines {rows.line} to {rows.reader.line_num}, column {place + 1}",
                "a quote that swallows rows",
            )
        elif sum([line.count('"') for line in lines]) % 2:
            # 5" in a cell without quotes is no fault; a cell that ends with a quote, and did not begin with one, is.
            half = next((place for place, cell in enumerate(row) if cell.endswith('"')), None)
            if half is not None:
                where, fault = f"line {rows.line}, column {half + 1}", fault or "a quote that was never opened"
        yield Record(where, values, fault)


def _swallowing(row: Sequence[str], delimiter: str) -> int | None:
    """Return the place of a cell of several lines, of which one is a row like this one, or None.

    Reports have lines with commas, too. So a line counts as a row only if its other cells are of the same form as
    those of this row, such as a1/b2.png and a3/b4.png, and one of them is more than a word or a short number; or if
    it has as many cells as the row, all the others of the same form.
    """
    for place, cell in enumerate(row):
        lines = [line for line in cell.splitlines()[1:] if delimiter in line]
        if not lines:
            continue
        own_before, own_after = [_form(part) for part in row[:place]], [_form(part) for part in row[place + 1 :]]
        for line in lines:
            parts = line.split(delimiter)
            before = [_form(part) for part in parts[:place]]
            after = [_form(part) for part in parts[len(parts) - len(own_after) :]]
            alike_before = len(parts) > place and before == own_before
            alike_after = len(parts) >= len(row) and after == own_after
            if (alike_before and _tells(before)) or (alike_after and _tells(after)):
                return place
            if alike_before and alike_after and len(parts) == len(row) > 2:
                return place
    return None


def _tells(forms: Sequence[str]) -> bool:
    return any(TELLING.fullmatch(form) for form in forms)


def _form(cell: str) -> str:
    """Return the form of a cell: 02-1.png is 0-0.a, and 50414267 is 00."""
    digits = re.sub(r"\d+", lambda match: "0" if len(match[0]) < LONG_NUMBER else "00", cell.strip().strip('"'))
    return re.sub(r"[^\W\d_]+", "a", digits)
