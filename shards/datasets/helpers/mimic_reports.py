"""Reads the reports of MIMIC-CXR: from files of their own, or from mimic-cxr-reports.zip as it was downloaded.

    reports = find_reports(Path("mimic-cxr-jpg/2.1.0"), None)
    reports.text("p10/p10000032/s50414267.txt")

They belong to MIMIC-CXR; whoever has MIMIC-CXR-JPG has them in a folder beside it, or somewhere else.
"""

import lzma
import os
import re
import zipfile
import zlib
from itertools import islice
from pathlib import Path
from typing import Protocol

from radhpc.core.errors import UserError, first_line
from shards import raw_files
from shards.datasets.reader import UnusableRecord

VERSIONS = ("2.1.0", "2.0.0")
NAME = "mimic-cxr-reports"  # of the zip, and of the folder that it is unpacked into
MAX_BYTES = 1 << 20  # of a report: the longest has 8 thousand
MAX_ZIP = 1 << 30  # bytes of the zip: the real one has 142 million
ENCRYPTED = 1  # a bit of an entry's flags
EXAMPLE = "files/p10/p10000032/s50414267.txt"


class ReportStore(Protocol):
    """Reports by their path in the archive."""

    def text(self, place: str) -> str:
        """Return the report at pXX/pXXXXXXXX/sXXXXXXXX.txt, with \\n as line ends. Raises UnusableRecord."""
        ...


class ReportFolder:
    """Reports in files of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._archive = raw_files.current().including(folder)  # the threads that read have none of their own

    def text(self, place: str) -> str:
        try:
            with raw_files.inside(self._archive):
                return _decode(raw_files.read(self._folder / place, MAX_BYTES))
        except FileNotFoundError:
            raise UnusableRecord("missing report") from None
        except raw_files.RefusedFile as error:
            raise UnusableRecord(f"report: {error.strerror}") from None
        except OSError:
            raise UnusableRecord("unreadable report") from None


class ReportZip:
    """Reports in the zip: one file to open instead of 227,835; its directory takes 150 MB of memory."""

    def __init__(self, path: Path) -> None:
        try:
            with raw_files.inside(raw_files.current().including(path.parent)):
                self._zip = zipfile.ZipFile(raw_files.open_file(path, MAX_ZIP))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
        places = (re.fullmatch(r"(.*?)p\d\d/p\d+/s\d+\.txt", name) for name in self._zip.namelist())
        first = next(filter(None, places), None)
        if first is None:
            raise UserError(f"{path}: no reports in it, such as {EXAMPLE}")
        self._before = first[1]

    def text(self, place: str) -> str:
        try:
            entry = self._zip.getinfo(self._before + place)
            if entry.file_size > MAX_BYTES:
                raise UnusableRecord("report: file too large")
            if entry.flag_bits & ENCRYPTED:
                raise UnusableRecord("encrypted report")
            with self._zip.open(entry) as file:
                return _decode(file.read(MAX_BYTES))
        except KeyError:
            raise UnusableRecord("missing report") from None
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, OSError):
            raise UnusableRecord("unreadable report") from None


def find_reports(folder: Path, named: Path | None) -> ReportStore:
    """Find the reports that the user names, else those in the usual places around `folder`. Raises UserError."""
    if named and named.is_file():
        return ReportZip(named)
    if named:
        if reports := _within(named):
            return reports
        raise UserError(f"reports={named}: no reports there, such as {EXAMPLE}")
    above, root = folder.parent, folder.parent.parent
    project = "mimic-cxr"  # the folder of the other edition, with or without one of its version below
    for place in (folder, above, above / project, *(root / project / version for version in VERSIONS), root / project):
        if reports := _within(place / NAME) or _within(place):
            return reports
        if (place / f"{NAME}.zip").is_file():
            return ReportZip(place / f"{NAME}.zip")
    raise UserError(
        f"--raw {folder}: no reports there nor beside it; they are in {NAME}.zip of MIMIC-CXR: put it there, as it is "
        "or unpacked, or give reports=PATH"
    )


def _within(folder: Path) -> ReportFolder | None:
    """Return `folder`, or its `files`, if it holds reports; only the first patients of each group are checked."""
    for files in (folder / "files", folder):
        for group in sorted(path for path in files.glob("p[0-9][0-9]") if path.is_dir()):
            with os.scandir(group) as patients:
                if any(next(Path(patient).glob("s*.txt"), None) for patient in islice(patients, 5)):
                    return ReportFolder(files)
    return None


def _decode(data: bytes) -> str:
    try:
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise UnusableRecord("report that is not UTF-8") from None
