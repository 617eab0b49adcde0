"""Opens every file of a raw archive: only regular files, only inside the archive, none larger than expected.

    archive = Archive((Path("/data/padchest"),))
    with inside(archive):
        data = read(Path("/data/padchest/images/1.png"), 1 << 30)        # an image, a report, ...
        with open_table(Path("/data/padchest/labels.csv.gz")) as file:   # its bytes, without the compression
            ...

An archive comes from somebody else. A table may name /home/me/private.png or ../private.png, a link in it may lead
there, and a FIFO would wait for ever. So a file is opened first as a mere place (O_PATH), which opens no device; then
the kernel is asked where that place is, which no link and no race can change; and only then is it opened for reading.
The archive in force is that of the thread (`inside`), so that readers of tables need not hand it on.
"""

import contextlib
import errno
import functools
import gzip
import io
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from radhpc.core.errors import first_line
from radhpc.core.files import open_regular

# Tables of text become 5 to 20 times as large when they are decompressed, a bomb of zeros 1,030 times.
MAX_RATIO = 100
MIN_LIMIT = 1 << 26  # bytes that any compressed table may become
MAX_TABLE = 1 << 36  # bytes of a table in the archive: above them it is a sparse file, or none that can be a table
BUFFER = 1 << 18
OUTSIDE, CHANGED = "file outside of the archive", "file that changed while it was read"


class RefusedFile(OSError):
    """A file that is not read; `strerror` is a general phrase, `detail` may name the particulars."""

    def __init__(self, path: Path, reason: str, detail: str = "") -> None:
        super().__init__(errno.EPERM, reason, str(path))
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return RefusedFile, (Path(self.filename), self.strerror or "", self.detail)


class LargeFile(RefusedFile):
    """A file of `size` bytes, more than are read."""

    def __init__(self, path: Path, size: int, limit: int) -> None:
        super().__init__(path, "file too large", f"{size} bytes; at most {limit} are read")
        self.size, self.limit = size, limit

    def __reduce__(self) -> tuple[Any, ...]:
        return LargeFile, (Path(self.filename), self.size, self.limit)


@dataclass(frozen=True)
class Archive:
    """The folders that hold all files of an archive; without any, files may lie anywhere."""

    roots: tuple[Path, ...] = ()
    outside: bool = False  # files elsewhere are read, too: the user has allowed it

    def including(self, folder: Path) -> "Archive":
        """Return the archive with one more folder, which its own content did not name."""
        return replace(self, roots=(*self.roots, folder)) if self.roots else self

    def holds(self, place: str) -> bool:
        """Return whether what lies at a real place belongs to the archive."""
        if self.outside or not self.roots:
            return True
        return any(place == real or place.startswith(real.rstrip("/") + "/") for real in map(_real, self.roots))

    def check(self, path: Path, place: str) -> None:
        """Raise RefusedFile for a file whose real place is outside of the archive."""
        if not self.holds(place):
            raise RefusedFile(path, OUTSIDE, "outside=allow reads such files")


_archive: ContextVar[Archive] = ContextVar("archive", default=Archive())  # noqa: B039, it is frozen


@contextlib.contextmanager
def inside(archive: Archive) -> Iterator[None]:
    """Let this thread open files of this archive alone."""
    token = _archive.set(archive)
    try:
        yield
    finally:
        _archive.reset(token)


def reason(error: OSError) -> str:
    """Return why a file cannot be read, in a few words for the user."""
    words = error.strerror or first_line(error)
    return f"{words}: {error.detail}" if isinstance(error, RefusedFile) and error.detail else words


def current() -> Archive:
    """Return the archive in force, for other threads."""
    return _archive.get()


def open_file(path: Path, limit: int | None = None) -> io.BufferedReader:
    """Open a file of at most `limit` bytes. Raises RefusedFile and other kinds of OSError."""
    file: io.BufferedReader = io.BufferedReader(
        io.FileIO(open_regular(path, functools.partial(current().check, path))), BUFFER
    )
    try:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise LargeFile(path, size, limit)
    except BaseException:
        file.close()
        raise
    return file


def read(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes. Raises RefusedFile and other kinds of OSError."""
    with open_file(path, limit) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1)
    if len(data) != size:
        raise RefusedFile(path, CHANGED, f"{size} bytes, then {len(data)}")
    return data


@contextlib.contextmanager
def open_table(path: Path, limit: int | None = None) -> Iterator[io.BufferedReader]:
    """Open a table, plain or gzipped, for its bytes without the compression; at most `limit` of them can be read.

    Raises RefusedFile, also while it is read: where it becomes too large, or changes. Raises what gzip does.
    """
    packed = path.suffix.lower() == ".gz"
    with open_file(path, MAX_TABLE if packed or limit is None else limit) as file:
        size = os.fstat(file.fileno()).st_size
        length = max(MIN_LIMIT, MAX_RATIO * size) if packed else size
        source = gzip.GzipFile(fileobj=file) if packed else file
        yield io.BufferedReader(_Bytes(path, source, length, packed, limit), BUFFER)


class _Bytes(io.RawIOBase):
    """The bytes of a table, no more than it may have."""

    def __init__(
        self, path: Path, source: io.BufferedReader | gzip.GzipFile, length: int, packed: bool, limit: int | None
    ) -> None:
        super().__init__()
        self._path, self._source, self._packed = path, source, packed
        self._length, self._limit, self._done = length, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._source.readinto(buffer)
        self._done += count
        if self._packed and self._done > self._length:
            raise RefusedFile(self._path, f"gzip file that becomes {MAX_RATIO} times as large, or more")
        if not self._packed and (
            self._done > self._length or (not count and self._done < self._length and len(buffer))
        ):
            raise RefusedFile(self._path, "file that changed while it was read")
        if self._limit is not None and self._done > self._limit:
            raise LargeFile(self._path, self._done, self._limit)
        return count


@functools.lru_cache(maxsize=64)
def _real(root: Path) -> str:
    return os.path.realpath(root)
