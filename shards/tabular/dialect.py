"""Detects how a text file is written: its encoding, and the character between the columns of a CSV.

    dialect = detect(Path("informes.csv"), ",")  # encoding "cp1252", delimiter ";"
    dialect.message(",")                         # "read as Windows-1252, with a semicolon between the columns"

UTF-8 and commas are the rule. A byte order mark decides. A file that is no UTF-8 is Windows-1252, which Excel writes in
the West, unless most of it is UTF-8 or its words make no sense so: then the place is named.
"""

import csv
import functools
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from radhpc.core.errors import UserError
from shards import raw_files

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
UTF8 = "utf-8-sig"
NAMES = {
    UTF8: "UTF-8", "utf-8": "UTF-8", "cp1252": "Windows-1252", "utf-16": "UTF-16", "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16", "utf-32": "UTF-32",
}  # fmt: skip
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
SAMPLE = 1 << 16  # bytes or characters that are looked at for the delimiter
HEAD = 1 << 8  # bytes that tell UTF-16 without a mark
CHUNK = 1 << 17
SEPARATOR_LINE = re.compile(r'\ufeff?"?sep=(.)"?\r?\n')  # the first line that tells Excel the delimiter
UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")  # Windows-1252 gives these bytes no character
MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
CUT = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")  # a character's beginning
MOSTLY = 10  # times as many stray bytes as characters of UTF-8: the file is no UTF-8
# In Western words no three accented letters follow one another, and neither an accented capital nor a symbol, but for
# these, stands between two small letters.
RUN = re.compile(r"[\xa1-\xff]{3,}")
INNER = re.compile(r"(?<=[^\W\d_])[\x80-\uffff](?=[^\W\d_])")
USUAL_INNER = frozenset("\xa0\xad\xaa\xab\xae\xb0\xb1\xb5\xb7\xba\xbb\xd7\xf7‘’“”–—…•™/")
CAPITAL = re.compile(r"(?<=[a-z])[À-ÖØ-ÞŠŒŽŸ](?=[a-z])")
REMEDY = "save it as UTF-8, or give encoding=NAME where the dataset has that option"
FOREIGN = 0.02  # the share of characters that make no sense, from which on a text is not Western


@dataclass(frozen=True)
class Dialect:
    """The way a file is written."""

    encoding: str = UTF8
    delimiter: str | None = None  # None: no CSV

    def message(self, usual: str = ",") -> str:
        """Return the words for what is unlike the usual form, or nothing."""
        parts = [f"as {NAMES.get(self.encoding, self.encoding)}"] if NAMES.get(self.encoding) != "UTF-8" else []
        if self.delimiter is not None and self.delimiter != usual:
            parts.append(f"with a {DELIMITERS.get(self.delimiter, self.delimiter)} between the columns")
        return f"read {', '.join(parts)}" if parts else ""


def detect(path: Path, usual: str | None = None, encoding: str | None = None) -> Dialect:
    """Return the dialect of a file, plain or gzipped; `usual`: the delimiter of its kind, if it is a CSV.

    `encoding`: the one that the user names. Raises UserError that names the line and the character of a byte that
    belongs to no text, and what opening raises.
    """
    facts = path.stat()
    return _detect(path, usual, encoding, facts.st_size, facts.st_mtime_ns)


def binary(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, plain or gzipped, in chunks that end between two characters of UTF-8."""
    carry = b""
    with raw_files.open_table(path) as source:
        while chunk := source.read(CHUNK):
            data = carry + chunk
            cut = CUT.search(data, max(0, len(data) - 3))
            carry = cut[0] if cut else b""
            yield data[: len(data) - len(carry)]
    if carry:
        yield carry


@functools.lru_cache(maxsize=64)
def _detect(path: Path, usual: str | None, named: str | None, size: int, time: int) -> Dialect:
    encoding = named or encoding_of(binary(path), path)
    if usual is None:
        return Dialect(encoding)
    with raw_files.open_table(path) as source, io.TextIOWrapper(source, encoding=encoding, newline="") as file:
        text = file.read(SAMPLE)
    return Dialect(encoding, _delimiter(text, usual))


def encoding_of(chunks: Iterable[bytes], path: Path) -> str:
    """Return the encoding of a text in chunks that end between two characters. Raises UserError that names `path`."""
    line, place = 1, ""
    strays = characters = foreign = high = 0
    for number, chunk in enumerate(chunks):
        if number == 0:
            if mark := next((name for mark, name in MARKS.items() if chunk.startswith(mark)), None):
                return mark
            if wide := _wide(chunk):
                return wide
        if chunk.isascii():
            line += chunk.count(b"\n")
            continue
        valid = MULTIBYTE.findall(chunk)
        characters += len(valid)
        try:
            chunk.decode()
        except UnicodeDecodeError as error:
            strays += sum(byte > 0x7F for byte in chunk) - sum(map(len, valid))
            if not place:
                before, _, cut_line = b"\n".join((b"", chunk[: error.start])).rpartition(b"\n")
                character = len(cut_line.decode(errors="replace")) + 1
                lines = line + before.count(b"\n")
                place = f"line {lines}, character {character}: byte {chunk[error.start]:#04x}"
            strange, accented = _western(chunk.decode("cp1252", errors="replace"))
            foreign, high = foreign + strange, high + accented
        if place and UNDEFINED.search(MULTIBYTE.sub(b"", chunk)):
            raise UserError(f"{path}: {place} is neither UTF-8 nor Windows-1252; {REMEDY}")
        line += chunk.count(b"\n")
    if not place:
        return UTF8
    if strays < MOSTLY * characters:
        raise UserError(
            f"{path}: {place} is not UTF-8, as the rest of the file seems to be; it is damaged or of another encoding; "
            f"{REMEDY}"
        )
    if foreign > FOREIGN * high:
        raise UserError(f"{path}: {place} is not UTF-8, and its words make no sense as Windows-1252; {REMEDY}")
    return "cp1252"


def _western(text: str) -> tuple[int, int]:
    """Return how many characters beyond ASCII stand where none do in Western words, and how many there are."""
    runs = sum(len(run) for run in RUN.findall(text) if len(set(run)) > 1)
    symbols = (c for c in INNER.findall(text) if not unicodedata.category(c).startswith("L"))
    runs += len(CAPITAL.findall(text))
    return runs + sum(c not in USUAL_INNER for c in symbols), sum(c > "\x7f" for c in text)


def _wide(sample: bytes) -> str | None:
    """Return the encoding of UTF-16 without a mark: in the Latin letters of a header every second byte is zero."""
    head = sample[:HEAD].partition(b"\n")[0]
    head = head[: len(head) // 2 * 2]
    even, odd = head[::2], head[1::2]
    if len(head) >= 4 and not any(odd) and all(even):
        return "utf-16-le"
    if len(head) >= 4 and not any(even) and all(odd):
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
