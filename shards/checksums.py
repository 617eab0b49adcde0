"""Checks raw files against the table of checksums that came with their archive: MIMIC-CXR-JPG's SHA256SUMS.txt.

    for name, digest in read_table(folder / "SHA256SUMS.txt", problems):    # bytes, relative to the table
    checks = FileChecks("SHA256SUMS.txt", folder, lookup)
    checks.check(path, data)          # raises BadImage where they differ, and counts

The image is read anyway, so the check costs its hash alone. A download that was cut, or changed on its way, is named
here even where its decoder would not notice.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from shards import raw_files
from shards.images.raw_image import BadImage

NAMES = ("SHA256SUMS.txt", "SHA256SUMS", "MD5SUMS.txt", "MD5SUMS")  # in the archive's folder; the first one counts
REASON = "checksum differs"
MAX_TABLE = 1 << 30  # bytes
MAX_FILE = 1 << 30  # bytes of a metadata table that is checked
_LINE = re.compile(rb"([0-9a-fA-F]+)[ \t]+\*?(.+?)\r?")  # of sha256sum and md5sum: digest, name
_ALGORITHMS = {"SHA256": "sha256", "MD5": "md5"}


def find_table(folder: Path) -> Path | None:
    """Return the archive's table of checksums, or None where it has none."""
    return next((folder / name for name in NAMES if os.path.isfile(folder / name)), None)


def algorithm(name: str) -> str:
    """Return hashlib's name for the algorithm of a table."""
    return _ALGORITHMS[name.partition("SUMS")[0]]


def read_table(path: Path, problems: list[str]) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and digest of each file in a table; what cannot be read is counted in `problems`, in one message.

    Raises OSError.
    """
    length, unreadable, first = hashlib.new(algorithm(path.name)).digest_size * 2, 0, 0
    with raw_files.open_table(path, MAX_TABLE) as file:
        for number, line in enumerate(file, 1):
            match = _LINE.fullmatch(line.rstrip(b"\n"))
            if match and len(match[1]) == length:
                yield os.path.normpath(match[2]), bytes.fromhex(match[1].decode())
            elif line.strip():
                unreadable, first = unreadable + 1, first or number
    if unreadable:
        problems.append(f"{path.name}: {unreadable} lines cannot be read, line {first} is the first: not checked")


def check_tables(folder: Path, name: str, lookup: Callable[[bytes], bytes | None]) -> list[str]:
    """Return a message for each table beside the images whose checksum differs: it may be damaged, or was edited."""
    messages = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        expected = lookup(os.fsencode(entry.name))
        if expected is None or not entry.is_file() or entry.stat().st_size > MAX_FILE:
            continue
        with raw_files.open_file(Path(entry.path), MAX_FILE) as file:
            if hashlib.file_digest(file, algorithm(name)).digest() != expected:
                messages.append(f"{entry.name}: {REASON} from {name}: download it again, unless you have edited it")
    return messages


class FileChecks:
    """Compares images with a table, and counts. `lookup` returns the digest of a name, or None."""

    def __init__(self, name: str, folder: Path, lookup: Callable[[bytes], bytes | None]) -> None:
        self.name, self.checked, self.unchecked = name, 0, 0
        self._folder, self._lookup, self._algorithm = folder, lookup, algorithm(name)

    def check(self, path: Path, data: bytes) -> None:
        """Raise BadImage where a file is not what the table says."""
        expected = self._lookup(os.fsencode(path.relative_to(self._folder))) if self._holds(path) else None
        if expected is None:
            self.unchecked += 1
            return
        if hashlib.new(self._algorithm, data).digest() != expected:
            raise BadImage(path, REASON, f"from {self.name}; download it again")
        self.checked += 1

    def _holds(self, path: Path) -> bool:
        return path.is_relative_to(self._folder)
