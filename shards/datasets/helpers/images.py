"""Finds an archive's images, whichever way it was unpacked.

folders_with(raw, re.compile(r"patient\\d+"))       # [raw/train, raw/valid]: found without opening a patient
for path in files(raw, (".png", ".dcm")): ...       # all of them, in no order
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from radhpc.core.errors import UserError, first_line

DEPTH = 4  # folders below the archive's own; it also ends the walk where a link leads back up


def folders_with(folder: Path, pattern: re.Pattern[str], depth: int = DEPTH) -> list[Path]:
    """Return the folders, sorted, that hold an entry whose name matches; their subfolders are not searched."""
    below = []
    for entry in entries(folder):
        if pattern.fullmatch(entry.name):
            return [folder]
        if is_folder(entry):
            below.append(entry.name)
    if not depth:
        return []
    return [path for name in sorted(below) for path in folders_with(folder / name, pattern, depth - 1)]


def files(folder: Path, suffixes: tuple[str, ...], depth: int = DEPTH) -> Iterator[Path]:
    """Yield the files with one of these endings (lower case), folder by folder, those of one folder in no order."""
    below = []
    for entry in entries(folder):
        if is_folder(entry):
            below.append(entry.name)
        elif entry.name.lower().endswith(suffixes) and not entry.name.startswith("."):
            yield folder / entry.name
    if depth:
        for name in sorted(below):
            yield from files(folder / name, suffixes, depth - 1)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, wherever links lead; one that leads in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder, in no order. Raises UserError."""
    try:
        with os.scandir(folder) as scan:
            yield from scan
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or first_line(error)})") from error
