"""Write small files that never have their final name half written, and read lines of which the last may be cut.

And folders: on which kind of disk they lie, and one command at a time working in them.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError

# File systems that only this machine sees. What another node writes there is not here.
NODE_LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "overlay", "tmpfs", "ramfs")
)

log = logging.getLogger("radhpc")

FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then move it to its name."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


class IrregularFile(OSError):
    """A FIFO, a device, a socket or a folder is where a file must be."""


def open_regular(path: str | os.PathLike[str], check: Callable[[str], None] | None = None) -> int:
    """Open a regular file for reading, and return its descriptor. Raises IrregularFile, and OSError.

    Whatever else has the name is not opened at all: a FIFO would wait for ever, and some devices act when opened.
    `check` gets the file's real place, and may raise OSError.
    """
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except ValueError as error:  # a zero byte
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise IrregularFile(errno.EINVAL, "no regular file", os.fspath(path))
        if check is not None:
            check(os.readlink(f"/proc/self/fd/{place}"))
        try:
            return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(place)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk: after the latter a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Parse a JSON file; return None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def read_record(path: Path) -> dict[str, Any] | None:
    """Parse a small JSON object that says where something stands; None where there is none, or none that can be read.

    Another node, a power cut or a hand may have left it empty or half written. That is named once and believed never.
    """
    try:
        record = read_json(path)
    except (ValueError, RecursionError):
        record = ()
    except OSError as error:
        _name_once(path, f"cannot be read: {error.strerror}")
        return None
    if record is not None and not isinstance(record, dict):
        _name_once(path, "holds no JSON object and is left out")
        return None
    return record


def read_lines(path: Path, whole: Callable[[dict[str, Any]], bool] = lambda line: True) -> list[dict[str, Any]]:
    """Parse a JSONL file of objects. Lines that are none, or that `whole` refuses, are left out.

    They are counted and named once: a crash may cut a line, a file system lose a page, two nodes write over each other.
    A last line without its line feed may still be being written, and is left out without a word.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = [line for line in data.split(b"\n")[:-1] if line]
    records = _parse(b"[" + b",".join(lines) + b"]")  # at once: there may be thousands of files
    if not isinstance(records, list) or len(records) != len(lines):
        records = [_parse(line) for line in lines]
    kept = [record if isinstance(record, dict) and whole(record) else None for record in records]
    if damaged := kept.count(None):
        first = 1 + kept.index(None)
        _name_once(path, f"{damaged} line(s) cannot be read and are left out, the first is line {first}")
    return [record for record in kept if record is not None]


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_named: dict[Path, str] = {}


def _name_once(path: Path, fault: str) -> None:
    if _named.get(path) != fault:
        _named[path] = fault
        log.warning("%s: %s", path, fault)


def write_with_reserve(reserve: Path, write: Callable[[], None]) -> None:
    """Call `write`; if the disk or the quota is full, delete the reserve and call it again. Raises OSError."""
    try:
        write()
    except OSError as error:
        if error.errno not in FULL:
            raise
        reserve.unlink(missing_ok=True)
        write()


def append_line(descriptor: int, line: bytes) -> None:
    """Append a line or nothing: half a line, as a full disk would leave it, is truncated. Raises OSError.

    A line that a crash has cut is ended first, so that it takes no other with it; for that the descriptor must be open
    for reading, too.
    """
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    written = os.write(descriptor, line)
    if written < len(line):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_append(path: Path) -> int:
    """Open a file of lines for `append_line`, private to this user."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def private_folder(folder: Path, longest: int) -> Path:
    """Resolve a folder, existing or not, that only this user may fill, to a plain path of at most `longest` characters.

    Nothing is created. Raises UserError, which names the option --folder.
    """
    place = folder.absolute().parent.resolve() / folder.name
    if len(str(place)) > longest or not re.fullmatch(r"[\w./+-]{2,}", str(place), re.ASCII):
        raise UserError(f"--folder {place}: allowed are up to {longest} letters, digits and . / _ + -")
    if place.is_symlink() or (place.exists() and not (place.is_dir() and place.stat().st_uid == os.getuid())):
        raise UserError(f"--folder {place}: exists and is not a folder of yours")
    return place


@contextlib.contextmanager
def exclusive(place: Path) -> Iterator[None]:
    """Keep two commands from working in one folder at the same time. Raises UserError."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{place}: another `up` or `down` is at work here; try again") from None
    finally:
        os.close(descriptor)


def file_system(path: Path) -> str:
    """Return the type of the file system that a path lies on, or will lie on once it is created."""
    path = Path(os.path.abspath(path))
    while not path.exists():
        path = path.parent
    real, best, kind = os.path.realpath(path), "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, name = line.split()[:3]
        mount = mount.encode().decode("unicode_escape")
        if (real + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best):
            best, kind = mount, name
    return kind
