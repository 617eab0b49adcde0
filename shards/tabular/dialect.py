"""Finds out how a text file is written: its encoding, and the character between the columns of a CSV.

    dialect = detect(Path("informes.csv"))       # encoding "cp1252", delimiter ";"
    dialect.message()                            # "read as Windows-1252, with a semicolon between the columns"

UTF-8 and commas are the rule. A byte order mark decides; a file that is no UTF-8 is Windows-1252, which a Western Excel
writes, unless most of it is UTF-8: then it is damaged, and the place is named.
"""

import csv
import functools
import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from radhpc.core.errors import UserError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
NAMES = {"cp1252": "Windows-1252", "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "utf-32": "UTF-32"}
UTF8 = "utf-8-sig"
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
SAMPLE = 1 << 16  # bytes or characters that are looked at for the delimiter
CHUNK = 1 << 20
SEPARATOR_LINE = re.compile(r'\ufeff?"?sep=(.)"?\r?\n')  # the first line that tells Excel the delimiter
# Windows-1252 gives these bytes no character.
UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
MOSTLY = 10  # times as many stray bytes as characters of UTF-8: the file is no UTF-8


@dataclass(frozen=True)
class Dialect:
    """The way a file is written."""

    encoding: str = UTF8
    delimiter: str | None = None  # None: no CSV

    def message(self, usual: str = ",") -> str:
        """Return the words for what is unlike the usual form, or nothing."""
        parts = [f"as {NAMES[self.encoding]}"] if self.encoding in NAMES else []
        if self.delimiter is not None and self.delimiter != usual:
            parts.append(f"with a {DELIMITERS.get(self.delimiter, self.delimiter)} between the columns")
        return f"read {', '.join(parts)}" if parts else ""


def detect(path: Path, usual: str | None = None) -> Dialect:
    """Return the dialect of a file, plain or gzipped; `usual`: the delimiter of its kind, if it is a CSV.

    Raises UserError that names the line and the column of a byte that belongs to no text, and what opening raises.
    """
    facts = path.stat()
    return _detect(path, usual, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _detect(path: Path, usual: str | None, size: int, time: int) -> Dialect:
    encoding = _encoding(path)
    if usual is None:
        return Dialect(encoding)
    with path.open("rb") as plain:
        binary = gzip.GzipFile(fileobj=plain) if path.suffix.lower() == ".gz" else plain
        with io.TextIOWrapper(binary, encoding=encoding, newline="") as file:
            text = file.read(SAMPLE)
    return Dialect(encoding, _delimiter(text, usual))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as plain:
        binary = gzip.GzipFile(fileobj=plain) if path.suffix.lower() == ".gz" else plain
        while chunk := binary.read(CHUNK):
            if len(chunk) == CHUNK:
                chunk += binary.readline(CHUNK)  # no character is cut in two
            yield chunk


def _encoding(path: Path) -> str:
    strays = characters = 0
    line, place = 1, ""
    for number, chunk in enumerate(_chunks(path)):
        if number == 0:
            if mark := next((name for mark, name in MARKS.items() if chunk.startswith(mark)), None):
                return mark
            if wide := _wide(chunk[:SAMPLE]):
                return wide
        try:
            chunk.decode()
        except UnicodeDecodeError as error:
            valid = MULTIBYTE.findall(chunk)
            high = sum(map(len, re.findall(rb"[\x80-\xff]+", chunk)))
            strays += high - sum(map(len, valid))
            characters += len(valid)
            if not place:
                *before, cut_line = chunk[: error.start].split(b"\n")
                character = len(cut_line.decode(errors="replace")) + 1
                place = f"line {line + len(before)}, character {character}: byte {chunk[error.start]:#04x}"
        else:
            characters += len(MULTIBYTE.findall(chunk)) if not chunk.isascii() else 0
        if place and UNDEFINED.search(MULTIBYTE.sub(b"", chunk)):
            raise UserError(f"{path}: {place} is neither UTF-8 nor Windows-1252; save the file as UTF-8")
        line += chunk.count(b"\n")
    if place and strays < MOSTLY * characters:
        raise UserError(f"{path}: {place} is not UTF-8, as the rest of the file is; it is damaged or of two encodings")
    return "cp1252" if place else UTF8


def _wide(sample: bytes) -> str | None:
    """Return the encoding of UTF-16 without a mark: in Latin writing every second byte is zero."""
    even, odd = sample[::2], sample[1::2]
    if len(sample) >= 4 and not even.count(0) and odd.count(0) * 2 > len(odd):
        return "utf-16-le"
    if len(sample) >= 4 and not odd.count(0) and even.count(0) * 2 > len(even):
        return "utf-16-be"
    return None


def _delimiter(text: str, usual: str) -> str:
    """Return the character that cuts most rows into as many columns as the header has; the usual one in doubt."""
    if separator := SEPARATOR_LINE.match(text):
        return separator[1]
    best, score = usual, 0.0
    for delimiter in dict.fromkeys((usual, *DELIMITERS)):
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lengths: list[int] = []
        try:
            for row in rows:
                lengths += [len(row)] if row else []
        except csv.Error:
            pass
        if len(text) == SAMPLE and len(lengths) > 2:
            lengths.pop()  # cut
        if not lengths or lengths[0] < 2:
            continue
        share = (1 + sum(length == lengths[0] for length in lengths[1:])) / (1 + len(lengths[1:]))
        if share > score:
            best, score = delimiter, share
    return best
