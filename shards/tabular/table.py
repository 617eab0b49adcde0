"""Reads a table of records: JSON, JSON lines, CSV or TSV, by the standard library, as dialect.py finds it written.

    for record in stream(path, ("ImageID", "Report")):    # a large CSV: only these columns, row by row
        record.values["ImageID"], record.where, record.fault                 # "1.png", "line 7", None
    table = read(Path("data.json"))                       # a table of any kind: path, columns, records

A CSV may be compressed (.csv.gz), and is never held in memory.
"""

import codecs
import contextlib
import gzip
import io
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from radhpc.core.errors import UserError, first_line
from radhpc.core.untrusted import printable
from shards import raw_files
from shards.tabular import csv_rows, dialect, json_records
from shards.tabular.faults import DatasetWarning
from shards.tabular.records import Record as Record, Rows, Table as Table

CSV = (".csv", ".tsv")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
MAX_JSON = 1 << 30  # bytes of JSON, which is parsed at once; other tables are read row by row
LONGEST_LIST = 1000  # characters


@dataclass(frozen=True)
class Form:
    """The form of a table, as far as the user names it; the rest is detected."""

    delimiter: str | None = None
    encoding: str | None = None

    def check(self) -> None:
        """Raise UserError for a delimiter or an encoding that is none."""
        if self.delimiter is not None and len(self.delimiter) != 1 and self.delimiter != "\\t":
            raise UserError(f"delimiter={self.delimiter}: one character is allowed")
        if self.encoding is not None:
            try:
                b"".decode(self.encoding)
                codecs.lookup(self.encoding)
            except (LookupError, ValueError):
                raise UserError(
                    f"encoding={self.encoding}: unknown; allowed are utf-8, utf-16, cp1252, cp1250, gb18030 and the "
                    "others that Python knows"
                ) from None


DETECTED = Form()


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


def stream(path: Path, columns: Sequence[str], form: Form = DETECTED) -> Iterator[Record]:
    """Yield the rows of a CSV with only these columns. Raises UserError where one is missing or there twice.

    Names in the header are compared without the spaces around them. Columns that are not asked for, dates and names
    among them, never leave the file.
    """
    with _reading(path, form) as (file, cut):
        rows, header = csv_rows.open_csv(path, file, cut)
        if missing := [name for name in columns if name not in header]:
            raise UserError(
                f"{path}: no column {', '.join(missing)}; found are {listed(header)}; expected {', '.join(columns)}"
            )
        for name in columns:
            if header.count(name) > 1:
                refuse_repeated(path, header, name)
        places = [(name, header.index(name)) for name in columns]
        yield from csv_rows.records(rows, places, len(header), cut)


def refuse_repeated(path: Path, header: Sequence[str], name: str) -> None:
    """Raise UserError where the header has a column twice, so that nobody can know which one is meant."""
    places = [n for n, other in enumerate(header, 1) if other == name or letters(other) == (letters(name) or None)]
    if len(places) < 2:
        return
    names = ", ".join(f"'{other}'" for other in dict.fromkeys(header[n - 1] for n in places))
    line = f"line 1, columns {' and '.join(map(str, places))}" if kind(path) in CSV else "names in the records"
    raise UserError(
        f"{path}: {line} are the same ({names}), so it is not known which one is meant; rename or remove one"
    )


def listed(names: Iterable[str]) -> str:
    """Return the names of columns for a message, not all of them where there are too many to read."""
    return printable(", ".join(names), LONGEST_LIST) or "none"


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
    tables = tables_in(raw)
    if not tables:
        raise UserError(f"--raw {raw}: no table there; allowed is a file that ends in {', '.join(SUFFIXES)} (also .gz)")
    if len(tables) > 1:
        raise UserError(f"--raw {raw}: several tables: {', '.join(p.name for p in tables)}; choose with table=NAME")
    return tables[0]


def tables_in(folder: Path) -> list[Path]:
    """Return the files of a folder that may be tables, by their names."""
    return sorted(path for path in folder.iterdir() if kind(path) in SUFFIXES and path.is_file())


def read(path: Path, form: Form = DETECTED) -> Table:
    """Read a table of any kind. Raises UserError that names the file and the place of what is wrong."""
    records: Iterable[Record]
    header: list[str] = []
    if kind(path) in CSV:
        with _reading(path, form) as (file, cut):
            _, header = csv_rows.open_csv(path, file, cut)
        columns, records = list(dict.fromkeys(header)), Rows(lambda: _stream_all(path, form))
    else:
        if kind(path) == ".jsonl":
            records = Rows(lambda: _stream_lines(path, form))
        else:
            with _reading(path, form) as (file, _):
                records = json_records.parse_json(path, file.read())
        columns = list(dict.fromkeys(name for record in records for name in record.values))
    first = next(iter(records), None)
    if first is None:
        raise UserError(f"{path}: the table is empty")
    if not columns and first.fault:
        raise UserError(f"{path}: {first.where}: {first.fault}")
    return Table(path, tuple(columns), records, tuple(header or columns))


def _stream_all(path: Path, form: Form) -> Iterator[Record]:
    with _reading(path, form) as (file, cut):
        rows, header = csv_rows.open_csv(path, file, cut)
        places = [(name, place) for place, name in enumerate(header) if name not in header[:place]]
        yield from csv_rows.records(rows, places, len(header), cut)


def _stream_lines(path: Path, form: Form) -> Iterator[Record]:
    with _reading(path, form) as (file, _):
        yield from json_records.parse_lines(path, file)


def kind(path: Path) -> str:
    """Return the suffix, without that of a compression."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


@contextlib.contextmanager
def _reading(path: Path, form: Form) -> Iterator[tuple[io.TextIOWrapper, str]]:
    """Open for text, with the delimiter of a CSV, and turn errors in the bytes into one line."""
    form.check()
    usual = "\t" if kind(path) == ".tsv" else ","
    is_csv = kind(path) not in (".json", ".jsonl")
    cut = "\t" if form.delimiter == "\\t" else form.delimiter
    try:
        dialected = dialect.detect(path, usual if is_csv and cut is None else None, form.encoding)
        if message := dialected.message(usual):
            warnings.warn(f"{path.name}: {message}", DatasetWarning, stacklevel=4)
        with (
            raw_files.open_table(path, MAX_JSON if kind(path) == ".json" else None) as binary,
            io.TextIOWrapper(binary, encoding=dialected.encoding, newline="") as file,
        ):
            yield file, cut or dialected.delimiter or usual
    except UnicodeDecodeError as error:
        name = dialect.NAMES.get(error.encoding, error.encoding)
        raise UserError(
            f"{path}: byte {error.object[error.start]:#04x} is not {name}; save the file as UTF-8"
        ) from error
    except UnicodeError as error:
        raise UserError(f"{path}: no text ({first_line(error)}); save the file as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cut or damaged ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({raw_files.reason(error)})") from error
