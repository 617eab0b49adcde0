"""Reads the table of a folder, or its tables of which each holds one split.

    train/metadata.jsonl  test/metadata.jsonl       as Hugging Face's imagefolder has them; or val, dev, validation
    train.csv  val.csv  test.csv                    or metadata_train.csv ...: side by side

Their records have the column `split`, unless a table has one of its own; paths are relative to the record's table.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from shards import splits
from shards.tabular import table
from shards.tabular.faults import DatasetWarning
from shards.tabular.json_records import SPLIT
from shards.tabular.records import Record, Rows, Table


def open_folder(raw: Path, named: str | None = None, form: table.Form = table.DETECTED) -> Table:
    """Return the table of a folder, or those of its splits as one. Raises UserError."""
    parts = _by_split(raw) if raw.is_dir() and not named else []
    if not parts:
        return table.read(table.find(raw, named), form)
    return _joined(raw, [(split, table.read(path, form)) for split, path in parts])


def _joined(raw: Path, parts: Sequence[tuple[str, Table]]) -> Table:
    columns = dict.fromkeys(name for _, part in parts for name in part.columns)
    own = any(table.letters(name) == SPLIT for name in columns)
    repeated = (part.header for _, part in parts if len(set(part.header)) < len(part.header))

    def walk() -> Iterator[Record]:
        for split, part in parts:
            for record in part.records:
                where = f"{part.path.relative_to(raw)} {record.where}"
                values = record.values if own else {SPLIT: split, **record.values}
                yield replace(record, where=where, values=values, folder=part.path.parent)

    files = ", ".join(str(part.path.relative_to(raw)) for _, part in parts)
    by_name = "" if own else ", each as the split that its name says"
    warnings.warn(f"{files}: read as one table{by_name}", DatasetWarning, stacklevel=4)
    names = tuple(columns) if own else (SPLIT, *columns)
    return Table(raw / parts[0][1].path.name, names, Rows(walk), next(repeated, names))


def _by_split(raw: Path) -> list[tuple[str, Path]]:
    """Return (split, table) of a folder's split folders, or of its files; nothing where it holds one table for all."""
    tables = table.tables_in(raw)
    if tables:
        return _files(tables)
    folders = sorted(path for path in raw.iterdir() if path.name.lower() in splits.WORDS and path.is_dir())
    return [(folder.name, table.find(folder)) for folder in folders if table.tables_in(folder)]


def _files(tables: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return (split, table) where the names of all tables differ in the name of a split alone."""
    parts = []
    others = set()
    for path in tables:
        words = re.split(r"([\W_]+)", path.name.removesuffix(".gz").lower())
        places = [place for place, word in enumerate(words) if word in splits.WORDS]
        if len(places) != 1:
            return []
        parts.append((words[places[0]], path))
        others.add(tuple(word for place, word in enumerate(words) if place != places[0]))
    distinct = {splits.WORDS[word] for word, _ in parts}
    return parts if len(parts) > 1 and len(others) == 1 and len(distinct) == len(parts) else []
