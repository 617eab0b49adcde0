"""Groups and looks up rows on the disk, so that the memory of a listing does not grow with the archive.

    for study, rows in grouped((row["StudyID"], row) for row in ...):     # in the order in which keys first appear
    reports = Lookup((path.stem, path.read_text()) for path in ...)       # reports.get("s50414267")

All use an unnamed temporary file of SQLite, which is gone when it is closed.
"""

import pickle
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

BATCH = 1000  # rows fetched at a time


def grouped(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Yield (key, [values]) from (key, value): groups by first appearance, values in the order they came."""
    connection = _temporary()
    try:
        connection.execute("CREATE TABLE rows (place INTEGER PRIMARY KEY, key BLOB, value BLOB)")
        connection.execute("BEGIN")  # else each row would be a transaction of its own, several times as slow
        connection.executemany(
            "INSERT INTO rows (key, value) VALUES (?, ?)", ((_encode(key), _pack(v)) for key, v in rows)
        )
        connection.execute("COMMIT")
        connection.execute("CREATE TABLE firsts AS SELECT key, MIN(place) AS first FROM rows GROUP BY key")
        ordered = connection.execute(
            "SELECT firsts.first, rows.key, rows.value FROM rows JOIN firsts USING (key) ORDER BY first, place"
        )
        ordered.arraysize = BATCH
        for _, group in groupby(ordered, itemgetter(0)):
            members = list(group)
            yield _decode(members[0][1]), [pickle.loads(value) for *_, value in members]
    finally:
        connection.close()


class Lookup:
    """A dictionary on the disk, filled once. A key that comes again replaces the value, and counts in `repeated`."""

    def __init__(self, rows: Iterable[tuple[str, Any]]) -> None:
        self._connection = _temporary()
        self._connection.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        count = 0
        self._connection.execute("BEGIN")
        for key, value in rows:
            self._connection.execute("INSERT OR REPLACE INTO rows VALUES (?, ?)", (_encode(key), _pack(value)))
            count += 1
        self._connection.execute("COMMIT")
        self.repeated = count - len(self)

    def __bool__(self) -> bool:
        return self._connection.execute("SELECT 1 FROM rows LIMIT 1").fetchone() is not None

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM rows").fetchone()[0])

    def __contains__(self, key: str) -> bool:
        return self._connection.execute("SELECT 1 FROM rows WHERE key = ?", (_encode(key),)).fetchone() is not None

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or the default."""
        row = self._connection.execute("SELECT value FROM rows WHERE key = ?", (_encode(key),)).fetchone()
        return default if row is None else pickle.loads(row[0])

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield all pairs in the order of the keys."""
        for key, value in self._connection.execute("SELECT key, value FROM rows ORDER BY key"):
            yield _decode(key), pickle.loads(value)


class FirstValues:
    """A dictionary on the disk in which the first value of each key stays."""

    def __init__(self) -> None:
        self._connection = _temporary()
        self._connection.execute("CREATE TABLE rows (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        self._connection.execute("BEGIN")
        self._last = "", ""

    def setdefault(self, key: str, value: str) -> str:
        """Return the first value of the key, which is this one if there was none."""
        if (key, value) == self._last:  # rows of one patient mostly stand together
            return value
        self._connection.execute("INSERT OR IGNORE INTO rows VALUES (?, ?)", (key, value))
        row = self._connection.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
        first = str(row[0])
        if first == value:
            self._last = key, value
        return first


def _temporary() -> sqlite3.Connection:
    connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA temp_store = FILE")
    connection.execute("PRAGMA cache_size = -16000")  # kibibytes
    return connection


def _encode(key: str) -> bytes:
    """Encode any text; names of files and JSON may hold half of a surrogate pair, which SQLite's own texts cannot."""
    return key.encode("utf-8", "surrogatepass")


def _decode(key: bytes) -> str:
    return key.decode("utf-8", "surrogatepass")


def _pack(value: Any) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
