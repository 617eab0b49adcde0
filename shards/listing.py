"""Lists a reader's studies as the rows of a build: hashed identifiers, a split each, in the order of the shards.

Rows are ordered by split, then by key; keys are salted hashes, so patients and classes spread over the shards. A
shard is the next `shard_samples` rows of one split. All of it is a pure function of the studies, the salt and the
settings.

The listing is an SQLite file, so that its memory does not grow with the archive, and so that the processes of a build,
on whatever node, read the rows of their shards from it. It holds raw identifiers: it lies in the build's private work
folder, and goes with it.
"""

import errno
import functools
import hashlib
import hmac
import json
import os
import pickle
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from radhpc.core.errors import UserError
from radhpc.core.sample import SPLITS, Split
from radhpc.core.untrusted import printable
from shards import checksums, raw_files, splits
from shards.checksums import FileChecks
from shards.datasets.reader import RawStudy
from shards.people import Pseudonyms
from shards.raw_state import DIGITS, MAX_VIEWS, ArchiveState
from shards.text.languages import LanguageTally

# Far above any study, far below what would fill the memory of a worker, or keep the rules of the privacy gate busy.
MAX_DESCRIPTION = 1 << 19  # bytes of a study but for its pixels
LONGEST_NAME = 500  # characters that are shown
_TABLES = """
CREATE TABLE studies (place INTEGER PRIMARY KEY, study TEXT UNIQUE, patient TEXT, person TEXT, official TEXT,
                      name TEXT, raw BLOB, files BLOB);
CREATE TABLE skips (place INTEGER PRIMARY KEY, name TEXT, id TEXT, reason TEXT, detail TEXT, fault INTEGER);
CREATE TABLE patients (patient TEXT PRIMARY KEY, split INTEGER) WITHOUT ROWID;
CREATE TABLE rows (split INTEGER, study TEXT, place INTEGER, PRIMARY KEY (split, study)) WITHOUT ROWID;
CREATE TABLE checksums (name BLOB PRIMARY KEY, digest BLOB) WITHOUT ROWID;
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
"""
_ORDER = """
CREATE INDEX by_patient ON studies (patient);
INSERT INTO patients SELECT patient, split_of(patient, MAX(official)) FROM studies GROUP BY patient;
"""
_ROWS = "INSERT INTO rows SELECT split, study, place FROM studies JOIN patients USING (patient)"
FORMAT = f"{RawStudy.__module__}.{RawStudy.__qualname__} 3"  # of a listing and the pickles in it
_COUNTS = "SELECT split, COUNT(*) FROM patients GROUP BY split"


@dataclass(frozen=True)
class StudyRow:
    """One study on its way into a shard."""

    raw: RawStudy
    study: str  # salted hash
    patient: str  # salted hash
    person: str  # salted hash in the namespace of its patients: shards/people.py
    split: Split
    key: str  # of its members in the tar


@dataclass(frozen=True)
class ShardPlan:
    """One shard to build: its file name, its split, and its range of the split's rows."""

    name: str
    split: Split
    first: str  # study
    last: str  # study
    samples: int
    files: str  # digest of the state of its images: raw_state.py


@dataclass(frozen=True)
class SkippedStudy:
    """A study that is left out: the user's name of it, a general reason, and particulars for the user alone."""

    name: str
    id: str  # salted hash, which others may read
    reason: str
    detail: str = ""
    fault: bool = True  # something is broken: it counts against the budget

    def public(self) -> dict[str, str]:
        """Return the facts that others may read, in the card beside the shards."""
        return {"study": self.id, "reason": self.reason}

    def for_user(self) -> dict[str, str]:
        """Return the facts that the user alone may read."""
        reason = f"{self.reason}: {self.detail}" if self.detail else self.reason
        return {"name": self.name, "reason": printable(reason, LONGEST_NAME)}


class Listing:
    """All studies of a dataset, sorted into shards."""

    def __init__(self, path: Path) -> None:
        assert path.stat().st_uid == os.geteuid(), f"{path} holds pickles of somebody else"
        # Nobody writes to it any more, so no locks are needed, which not every parallel file system has.
        self._connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        facts = dict(self._connection.execute("SELECT name, value FROM facts"))
        self.dataset: str = facts["dataset"]
        self.format: str = facts.get("format", "")  # of the pickles: a listing of another one cannot be read
        self.digest: str = facts["digest"]  # of all that the reader yielded, keyed by the salt
        self.files: dict[str, Any] = json.loads(facts.get("files", "{}"))  # the state of the images: raw_state.py
        self.studies = int(facts["studies"])  # read, those left out included
        self.without_rules: dict[str, int] = json.loads(
            facts["without_rules"]
        )  # studies by language: text/languages.py
        self.names: list[str] = json.loads(facts["names"])  # to be removed from texts
        self.warnings: list[str] = json.loads(facts["warnings"])  # about languages and checksums
        self.filled: tuple[Split, ...] = tuple(json.loads(facts["filled"]))  # splits that would have been empty
        self.checksums = Path(facts["checksums"]) if facts.get("checksums") else None  # the archive's own table of them
        self.plans = tuple(ShardPlan(*row) for row in json.loads(facts["plans"]))

    def rows(self, plan: ShardPlan) -> Iterator[StudyRow]:
        """Yield the rows of a shard, in its order."""
        rows = self._connection.execute(
            "SELECT rows.study, patient, person, raw FROM rows JOIN studies USING (place) "
            "WHERE split = ? AND rows.study BETWEEN ? AND ? ORDER BY rows.study",
            (SPLITS.index(plan.split), plan.first, plan.last),
        )
        for study, patient, person, raw in rows:
            yield StudyRow(pickle.loads(raw), study, patient, person, plan.split, self.key(study))

    def file_checks(self) -> FileChecks | None:
        """Return the checks against the archive's own table of checksums, or None where it has none."""
        if self.checksums is None:
            return None
        return FileChecks(self.checksums.name, self.checksums.parent, functools.partial(_checksum, self._connection))

    def key(self, study: str) -> str:
        return f"{self.dataset}-{study}"

    def name(self, study: str) -> str:
        """Return the user's name of a study."""
        return str(self._connection.execute("SELECT name FROM studies WHERE study = ?", (study,)).fetchone()[0])

    def skipped(self) -> Iterator[SkippedStudy]:
        """Yield the studies that are ruled out by the metadata alone."""
        for row in self._connection.execute("SELECT name, id, reason, detail, fault FROM skips ORDER BY place"):
            yield SkippedStudy(row[0], row[1], row[2], row[3], bool(row[4]))

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_listing(
    path: Path,
    studies: Iterable[RawStudy],
    pseudonyms: Pseudonyms,
    ratios: splits.Ratios,
    shard_samples: int,
    folder: Path | None,
    names: Sequence[str] = (),
) -> None:
    """Hash, split and sort the studies of a dataset. Raises UserError where a patient has two splits.

    `folder` is the raw archive's: the digest holds paths relative to it, so that an archive may be moved.
    `names` are to be removed from texts; they lie here because a listing is private.
    """
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
        connection.execute("BEGIN")
        tally = LanguageTally()
        state = ArchiveState(pseudonyms.salt, folder)
        digest, count = _add_studies(connection, state.watch(studies), pseudonyms, folder, tally)
        _refuse_two_splits(connection)
        connection.create_function("split_of", 2, lambda patient, split: _split_number(patient, split, ratios))
        for statement in filter(None, map(str.strip, _ORDER.split(";"))):
            connection.execute(statement)
        table, problems = _add_checksums(connection, folder)
        filled = _fill_empty_splits(connection, ratios)
        connection.execute(_ROWS)
        facts = {
            "dataset": pseudonyms.name,
            "format": FORMAT,
            "digest": digest,
            "files": json.dumps(state.summary()),
            "studies": count,
            "filled": json.dumps(filled),
            "without_rules": json.dumps(tally.without_rules),
            "names": json.dumps(list(names)),
            "warnings": json.dumps([*tally.messages(), *problems]),
            "checksums": None if table is None else str(table),
            "plans": json.dumps(list(_plans(connection, shard_samples, pseudonyms.salt))),
        }
        connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        connection.close()


def _add_studies(
    connection: sqlite3.Connection,
    studies: Iterable[tuple[RawStudy, bytes]],
    pseudonyms: Pseudonyms,
    folder: Path | None,
    tally: LanguageTally,
) -> tuple[str, int]:
    """Write the studies as they come, and count their languages. Returns their digest and their number."""
    digest, count = hmac.new(pseudonyms.salt, digestmod=hashlib.sha256), 0
    for count, (raw, files) in enumerate(studies, 1):
        canonical, shown = _canonical(raw, folder), printable(raw.name, LONGEST_NAME)
        digest.update(canonical)
        reason = raw.fault or raw.gap or _excess(raw, canonical)
        if not reason:
            study = pseudonyms.study(raw.study)
            texts = (*raw.report.model_dump().values(), raw.question, raw.answer)
            tally.count(raw.language, " ".join(filter(None, texts)))
            packed = pickle.dumps(raw, pickle.HIGHEST_PROTOCOL)
            patient, person = pseudonyms.patient(raw.patient), pseudonyms.person(raw.patient)
            added = connection.execute(
                "INSERT OR IGNORE INTO studies VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (count, study, patient, person, raw.split, shown, packed, files),
            )
            reason = None if added.rowcount else "duplicate key"
        if reason:
            skip = count, shown, pseudonyms.skipped(shown), reason, "", reason != raw.gap
            connection.execute("INSERT INTO skips VALUES (?, ?, ?, ?, ?, ?)", skip)
    return digest.hexdigest(), count


def _add_checksums(connection: sqlite3.Connection, folder: Path | None) -> tuple[Path | None, list[str]]:
    """Write the archive's own table of checksums, if it has one. Returns its path, and messages for the user."""
    table, problems = None if folder is None else checksums.find_table(folder), list[str]()
    if folder is None or table is None:
        return None, problems
    try:
        rows = checksums.read_table(table, problems)
        connection.executemany("INSERT OR REPLACE INTO checksums VALUES (?, ?)", rows)
        problems += checksums.check_tables(folder, table.name, functools.partial(_checksum, connection))
    except OSError as error:
        return None, [f"{table.name}: cannot be read ({raw_files.reason(error)}): no checksum is checked"]
    return table, problems


def _checksum(connection: sqlite3.Connection, name: bytes) -> bytes | None:
    row = connection.execute("SELECT digest FROM checksums WHERE name = ?", (name,)).fetchone()
    return None if row is None else bytes(row[0])


def _excess(raw: RawStudy, canonical: bytes) -> str | None:
    """Return why a study is beyond all that a study can be, or None."""
    if len(raw.views) > MAX_VIEWS:
        return f"more than {MAX_VIEWS} images"
    if len(canonical) > MAX_DESCRIPTION:
        return f"texts, labels and names of more than {MAX_DESCRIPTION} bytes"
    try:
        f"{raw.study}{raw.patient}".encode()
    except UnicodeEncodeError:
        return "identifier that is no Unicode"
    return None


def _refuse_two_splits(connection: sqlite3.Connection) -> None:
    """Raise UserError where a patient is in two official splits."""
    row = connection.execute(
        "SELECT patient FROM studies WHERE official IS NOT NULL GROUP BY patient "
        "HAVING COUNT(DISTINCT official) > 1 ORDER BY MIN(place) LIMIT 1"
    ).fetchone()
    if not row:
        return
    (name, split), (other, other_split) = connection.execute(
        "SELECT name, official FROM studies WHERE patient = ? AND official IS NOT NULL "
        "GROUP BY official ORDER BY MIN(place) LIMIT 2",
        row,
    )
    raise UserError(
        f"split: '{name}' is in {split} and '{other}' in {other_split}, "
        "but they are of the same patient; a patient may be in one split only"
    )


def _split_number(patient: str, official: Split | None, ratios: splits.Ratios) -> int:
    return SPLITS.index(official or splits.by_hash(patient, ratios))


def _fill_empty_splits(connection: sqlite3.Connection, ratios: splits.Ratios) -> list[Split]:
    """Move the nearest patient into each empty split of a ratio above 0, if another split can spare one.

    Official splits stay. Returns the splits that were filled.
    """
    filled: list[Split] = []
    if connection.execute("SELECT 1 FROM studies WHERE official IS NOT NULL LIMIT 1").fetchone():
        return filled
    for place, (split, ratio) in enumerate(zip(SPLITS, ratios, strict=True)):
        counts = dict(connection.execute(_COUNTS))
        spare = [other for other, patients in counts.items() if patients > 1]
        if ratio == 0 or counts.get(place) or not spare:
            continue
        patients = connection.execute(
            f"SELECT patient FROM patients WHERE split IN ({','.join(map(str, spare))}) ORDER BY patient"
        )
        nearest = min((splits.distance(patient, split, ratios), patient) for (patient,) in patients)[1]
        connection.execute("UPDATE patients SET split = ? WHERE patient = ?", (place, nearest))
        filled.append(split)
    return filled


def _plans(
    connection: sqlite3.Connection, shard_samples: int, salt: bytes
) -> Iterator[tuple[str, Split, str, str, int, str]]:
    for place, split in enumerate(SPLITS):
        studies = connection.execute(
            "SELECT rows.study, files FROM rows JOIN studies USING (place) WHERE split = ? ORDER BY rows.study",
            (place,),
        )
        number = 0
        while part := studies.fetchmany(shard_samples):
            files = hmac.new(salt, b"".join(state for _, state in part), hashlib.sha256).hexdigest()[:DIGITS]
            yield f"{split}-{number:06d}.tar", split, part[0][0], part[-1][0], len(part), files
            number += 1


def _canonical(raw: RawStudy, folder: Path | None) -> bytes:
    """Return the same bytes for the same study on every machine.

    Names of RawStudy's fields and the repr of what draws a view are part of them, and so of the identity of a build.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value.relative_to(folder)) if folder and value.is_relative_to(folder) else str(value)
        text = repr(value)
        if re.search(r" at 0x[0-9a-f]+>", text):
            raise TypeError(f"{type(value).__name__} needs a repr that tells its drawings apart")
        return text

    views = [(plain(source), view) for source, view in raw.views]
    fields = {name: value for name, value in vars(raw).items() if name not in ("views", "report", "name")}
    return json.dumps([fields, views, raw.report.model_dump()], sort_keys=True).encode()
