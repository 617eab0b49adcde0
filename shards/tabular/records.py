"""Describes a table that was read: records, one for each row or object, and the names of their columns."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    """Records that are read anew on each walk."""

    walk: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[Record]:
        return self.walk()
