"""Lock a folder, or a name, against other commands on this node and on others: by a link, without flock.

    with hold(run.path / "lock", "resume"):        # or UserError: who is at work there, since when, and where
        ...
    with hold(beside(out), "export"): ...

`link` makes a name or fails, atomically, on every POSIX file system, NFS and Lustre included, where flock may be absent
or of this node alone. A client of NFS may be told that a link failed which was made: the count of links says the truth.

An owner may die with its lock. On its own node (and in its own PID namespace) the next one sees that its process is
gone. On another node it counts as dead when it has not touched its lock for STALE seconds, by the clock of the file
server; a living owner touches it every REFRESH seconds. A dead lock may be removed by one waiter alone, who holds a
claim on it, or two waiters could remove each other's: claims are links, too, of a name that has the dead lock's token
and a number in it, and whoever finds a claim whose owner has died as well takes the next number.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from radhpc.core.errors import UserError
from radhpc.core.files import read_record
from radhpc.core.process import process_start, started_at

REFRESH, STALE = 5.0, 120.0  # seconds
_POLL = 0.1


@dataclass(frozen=True)
class Holder:
    """The content of a lock file."""

    token: str
    purpose: str
    host: str
    namespace: str  # what process numbers count in: this boot of the machine, this container
    pid: int
    process_start: str
    since: float

    @classmethod
    def this(cls, purpose: str) -> "Holder":
        pid = os.getpid()
        token = secrets.token_hex(8)
        return cls(token, purpose, socket.gethostname(), _namespace(), pid, process_start(pid), time.time())

    def __str__(self) -> str:
        return f"'{self.purpose}' (process {self.pid} on {self.host})"


class Lock:
    """A lock that is held."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name=f"lock {path.name}", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        """Return whether the lock is this one's still: a process that stood still for long may have been given up."""
        return _read(self.path) == self.holder

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH):
            with contextlib.suppress(OSError):
                if self.held:
                    os.utime(self.path)

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if self.held:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(path: Path, purpose: str, patience: float = 0.0) -> Iterator[Lock]:
    """Hold a lock file, whose folder exists; wait up to `patience` seconds for it.

    Raises UserError, in one line, where another holds it, and OSError where the folder cannot be written.
    """
    holder = Holder.this(purpose)
    own = path.with_name(f"{path.name}.{holder.token}")
    deadline = time.monotonic() + patience
    _write(own, holder)
    try:
        while not _link(own, path):
            current, busy = _read(path), ""
            if current is not None and not _dead(path, current, own):
                busy = f"{path.parent}: {current} is at work here; try again when it has ended"
            elif current is not None:
                _remove_dead(path, current, own)
            elif _nameless(path) and not _remove_nameless(path, own):
                busy = f"{path}: a lock that cannot be read, and is fresh; delete it if nothing is at work here"
            if busy and time.monotonic() >= deadline:
                raise UserError(busy)
            if busy:
                time.sleep(_POLL)
    except BaseException:
        own.unlink(missing_ok=True)
        raise
    lock = Lock(path, holder)
    _sweep(path, own)
    own.unlink(missing_ok=True)
    try:
        yield lock
    finally:
        lock.release()


def beside(path: Path) -> Path:
    """Return the lock's name for something that may not be there yet: hidden, in the same folder, which is made."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.lock"


def _write(own: Path, holder: Holder) -> None:
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, json.dumps(asdict(holder)).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(own: Path, name: Path) -> bool:
    """Give this process's file a second name. Returns whether it has it, whatever the answer of the server was."""
    with contextlib.suppress(FileExistsError):
        try:
            os.link(own, name)
            return True
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
                raise OSError(error.errno, f"this file system has no hard links, which locks need: {error.strerror}",
                              str(name)) from error  # fmt: skip
            raise
    try:
        return os.path.samestat(os.stat(own), os.stat(name))
    except FileNotFoundError:  # released since
        return False


def _read(path: Path) -> Holder | None:
    """Return who holds a lock; None where nobody does, or the file cannot be read."""
    record = read_record(path) if path.exists() else None
    if record is None or record.keys() != Holder.__dataclass_fields__.keys():
        return None
    holder = Holder(**record)
    whole = re.fullmatch(r"[0-9a-f]{16}", str(holder.token)) and isinstance(holder.pid, int)
    return holder if whole else None


def _dead(path: Path, holder: Holder, own: Path) -> bool:
    """Return whether the owner of a lock, or of a claim, is gone."""
    if (holder.host, holder.namespace) == (socket.gethostname(), _namespace()):
        return started_at(holder.pid) != holder.process_start
    return _age(path, own) > STALE


def _age(path: Path, own: Path) -> float:
    """Return the seconds since a file was touched, by the server's own clock."""
    os.utime(own)
    try:
        return os.stat(own).st_mtime - os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_dead(path: Path, dead: Holder, own: Path) -> None:
    """Remove a dead owner's lock, if this process is the one that may; return in any case."""
    claim = _claim(path, dead.token, own)
    if claim is None:
        time.sleep(_POLL)
        return
    if _read(path) == dead:  # nobody else can change that now
        path.unlink(missing_ok=True)
    claim.unlink(missing_ok=True)


def _nameless(path: Path) -> bool:
    return path.exists() and _read(path) is None


def _remove_nameless(path: Path, own: Path) -> bool:
    """Remove a lock that cannot be read, as a power cut leaves it, once it is old. Returns whether it is gone."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return True
    if _age(path, own) <= STALE:
        return False
    claim = _claim(path, f"{about.st_ino}-{about.st_mtime_ns}", own)
    if claim is None:
        return False
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(about, os.stat(path)) and _nameless(path):
            path.unlink(missing_ok=True)
    claim.unlink(missing_ok=True)
    return True


def _claim(path: Path, token: str, own: Path) -> Path | None:
    """Return the claim on a dead lock that this process holds now; None while another has it."""
    number = 0
    while True:
        claim = path.with_name(f"{path.name}.claim-{token}-{number}")
        if _link(own, claim):
            return claim
        other = _read(claim)
        if other is None and claim.exists() and _age(claim, own) <= STALE:
            return None
        if other is not None and not _dead(claim, other, own):
            return None
        if not claim.exists():  # it was just given back
            return None
        number += 1


def _sweep(path: Path, own: Path) -> None:
    """Delete what waiters and claimers left that died long ago. Only the owner of the lock calls it."""
    os.utime(own)
    now = os.stat(own).st_mtime  # by the server's clock
    with os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f"{path.name}."):
                with contextlib.suppress(FileNotFoundError):
                    if now - entry.stat().st_mtime > 3600:
                        os.unlink(entry.path)


def _namespace() -> str:
    """Return what this process's number counts in."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
