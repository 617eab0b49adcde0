"""Finds an archive's images, whichever way it was unpacked.

folders_with(raw, re.compile(r"patient\\d+"))       # [raw/train, raw/valid]: found without opening a patient
for path in files(raw, (".png", ".dcm")): ...       # all of them, in no order
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from radhpc.core.errors import UserError, first_line
from radhpc.core.untrusted import printable
from shards import raw_files
from shards.datasets.reader import DatasetWarning

DEPTH = 4  # folders below the archive's own
Places = set[tuple[int, int]]  # the device and the number of each folder that a walk has been to


def folders_with(folder: Path, pattern: re.Pattern[str], depth: int = DEPTH, of_folders: bool = False) -> list[Path]:
    """Return the folders, sorted, that hold a file (or a folder) whose name matches; they are searched no deeper."""
    return sorted(_folders_with(folder, pattern, depth, of_folders, set()))


def _folders_with(
    folder: Path, pattern: re.Pattern[str], depth: int, of_folders: bool, places: Places
) -> Iterator[Path]:
    below = []
    for entry in _new_entries(folder, places):
        matches = pattern.fullmatch(entry.name) is not None
        if matches and not of_folders:
            yield folder
            return
        if is_folder(entry):
            if matches:
                yield folder
                return
            below.append(entry)
    for path in _in_order(below) if depth else ():
        yield from _folders_with(path, pattern, depth - 1, of_folders, places)


def files(folder: Path, suffixes: tuple[str, ...], depth: int = DEPTH) -> Iterator[Path]:
    """Yield the files with one of these endings (lower case), folder by folder, those of one folder in no order."""
    return _files(folder, suffixes, depth, set())


def _files(folder: Path, suffixes: tuple[str, ...], depth: int, places: Places) -> Iterator[Path]:
    below = []
    for entry in _new_entries(folder, places):
        if is_folder(entry):
            below.append(entry)
        elif entry.name.lower().endswith(suffixes) and not entry.name.startswith("."):
            yield folder / entry.name
    for path in _in_order(below) if depth else ():
        yield from _files(path, suffixes, depth - 1, places)


def _in_order(folders: Iterable[os.DirEntry[str]]) -> list[Path]:
    """Return the paths of folders by their names, links to some last: what a link leads to is gone through once."""
    return [Path(entry.path) for entry in sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name))]


def _new_entries(folder: Path, places: Places) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder, unless this walk has been there on another way. Raises UserError."""
    try:
        facts = folder.stat()
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or first_line(error)})") from error
    if (facts.st_dev, facts.st_ino) not in places:
        places.add((facts.st_dev, facts.st_ino))
        yield from entries(folder)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder of the archive. A link out of it is none, and is warned of."""
    try:
        if not entry.is_dir():
            return False
        if not entry.is_symlink() or raw_files.current().holds(os.path.realpath(entry.path)):
            return True
    except OSError:  # a link in a circle
        return False
    name = printable(entry.name)
    warnings.warn(f"{name}: a link out of the archive, not followed (outside=allow)", DatasetWarning, stacklevel=2)
    return False


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder, in no order. Raises UserError."""
    try:
        with os.scandir(folder) as scan:
            yield from scan
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or first_line(error)})") from error
