"""Reads the records of JSON and of JSON lines.

Read are a list of objects, an object that holds one such list, an object with a list for each split, and one object a
line. A name that stands twice in one object is the record's fault, as nobody can know which one is meant.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from radhpc.core.errors import UserError
from shards import splits
from shards.tabular.lines import MAX_LINE, LongLine, lines_of
from shards.tabular.records import Record

TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)  # a text, or what begins, parts and ends a list
MAX_DIGITS = 1000
DEEP = "nested too deeply"
SPLIT = "split"  # the column of records that stand below a split's name


class _Repeated(dict[str, Any]):
    """An object in which a name stands twice; `name`: it."""

    name = ""


def parse_json(path: Path, text: str) -> list[Record]:
    """Return the records of a JSON file. Raises UserError that names the line of what is wrong."""
    try:
        value = _load(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object after the other: JSON lines under another name
            return list(parse_lines(path, io.StringIO(text)))
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: no valid JSON ({error.msg})") from error
    except RecursionError as error:
        if not (items := _items(text)):
            raise UserError(f"{path}: no usable JSON ({DEEP})") from error
        return [_salvaged(path, f"record {n}", item) for n, item in enumerate(items, 1)]
    if isinstance(value, dict):
        lists = {key: items for key, items in value.items() if isinstance(items, list)}
        if len(lists) > 1 and set(map(str.lower, lists)) <= set(splits.WORDS):
            return [
                _record(f"{key} record {n}", item, {SPLIT: key})
                for key, items in lists.items()
                for n, item in enumerate(_objects(path, items), 1)
            ]
        if len(lists) != 1:
            raise UserError(
                f"{path}: an object with {len(lists)} lists ({', '.join(lists) or 'none'}); allowed are a list of "
                "records, an object with one such list, or one for each split"
            )
        value = next(iter(lists.values()))
    return [_record(f"record {n}", item) for n, item in enumerate(_objects(path, value), 1)]


def _items(text: str) -> list[str]:
    """Return the items of a list in JSON, each as it stands; none where the text is no list that ends."""
    items, start, depth = [], 0, 0
    for match in TOKEN.finditer(text) if text.lstrip().startswith("[") else ():
        token = match[0]
        depth += (token in "[{") - (token in "]}")
        if depth == 0 or (depth == 1 and token == ","):
            items.append(text[start : match.start()])
        if depth == 0:
            return items if not text[match.end() :].strip() else []
        if depth == 1 and token in "[,":
            start = match.end()
    return []


def _salvaged(path: Path, where: str, text: str) -> Record:
    """Return the record of one item of a list, another of which was nested too deeply."""
    try:
        return _record(where, _objects(path, [_load(text)])[0])
    except RecursionError:
        return Record(where, {}, DEEP)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {where}: no valid JSON ({error.msg})") from error


def parse_lines(path: Path, file: TextIO) -> Iterator[Record]:
    """Yield the records of a file with one JSON object a line. Raises UserError that names the line."""
    for number, line in enumerate(lines_of(file), 1):
        if isinstance(line, LongLine):
            yield Record(f"line {number}", {}, f"line of more than {MAX_LINE} characters")
        elif line.strip():
            try:
                record = _record(f"line {number}", _objects(path, [_load(line)])[0])
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number}, column {error.colno}: no valid JSON ({error.msg})") from error
            except RecursionError:
                record = Record(f"line {number}", {}, DEEP)
            yield record


def _load(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_int=_integer)


def _integer(digits: str) -> int | str:
    """Return a whole number; one of more digits than any count or number of a patient as the text that it is."""
    return int(digits) if len(digits) <= MAX_DIGITS else digits


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    repeated = _Repeated(values)
    names = [name for name, _ in pairs]
    repeated.name = next(name for name in names if names.count(name) > 1)
    return repeated


def _record(where: str, item: dict[str, Any], more: dict[str, Any] | None = None) -> Record:
    repeated = next((value for value in (item, *item.values()) if isinstance(value, _Repeated)), None)
    if repeated is not None:
        return Record(f"{where}, '{repeated.name}'", {**(more or {}), **item}, "a name that stands twice in one record")
    return Record(where, {**(more or {}), **item})


def _objects(path: Path, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f'{path}: the records must be a list of objects such as {{"image": ..., "text": ...}}')
    return value
