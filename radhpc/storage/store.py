"""Read and write shards in a folder or in an object store behind a URL: complete files and byte ranges.

    store = Store("/data/padchest")                 # a folder
    store = Store("s3://bucket/padchest")           # obstore: s3, gs, az, http and file URLs
    store.read_range("train-000000.tar", 512, 100)

A fragment names a subset of the samples that lie there: Store("/data/padchest#balanced").subset is "balanced", and
its manifest is balanced.json (manifest.py). A path that is no string is taken as it stands.

Safe to use from many threads. obstore's own threads do not survive a fork: open stores after forking. Credentials,
the endpoint and the region come from the environment, as for other S3 tools: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, AWS_REGION, and AWS_ALLOW_HTTP=true for an endpoint without TLS. Without a key there, those of
AWS_PROFILE in ~/.aws/credentials (or AWS_SHARED_CREDENTIALS_FILE), which is read again when they expire, so that
whatever renews that file renews the job's; else the web identity, container or machine that obstore finds.
"""

import contextlib
import logging
import mmap
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError
from radhpc.core.files import NODE_LOCAL, IrregularFile, file_system, open_regular, write_atomically
from radhpc.storage import object_store
from radhpc.storage.object_store import Traffic

__all__ = ["Store", "Traffic", "write_atomically"]

log = logging.getLogger("radhpc")

_SUBSET = re.compile(r"(?P<url>.*)#(?P<subset>[a-z][a-z0-9_-]*)", re.DOTALL)

MODE = 0o640  # of files in a folder: owner and group may read patients' data, others not
PART = 16 << 20  # bytes of one part of an upload
PREAD = 1 << 24  # bytes of a ranged read that is believed without a look at the file's size
MAPS = 160  # shards that are mapped at a time


class NoRegularFile(UserError):
    """A FIFO, a device, a socket or a folder is where a file must be."""


class Store:
    """A flat folder of files behind a path or a URL."""

    def __init__(self, url: str | os.PathLike[str], traffic: Traffic | None = None) -> None:
        actual = _SUBSET.fullmatch(url) if isinstance(url, str) else None
        self.subset = actual["subset"] if actual else None
        self.url = (actual["url"] if actual else os.fspath(url)).rstrip("/")
        self.folder = None if "://" in self.url else Path(self.url)
        self.traffic = traffic or Traffic()
        self._descriptors: dict[str, int] = {}
        self._maps: dict[str, memoryview] = {}
        self._client: Any = None
        self._answered = False  # whether a ranged read was granted
        self._lock = threading.Lock()

    @cached_property
    def _remote(self) -> Any:
        return object_store.connect(self.url, retried=True)

    def _ranges(self) -> Any:
        """Return the client of ranged reads, which are repeated here and not by obstore, so that they are counted."""
        with self._lock:
            if self._client is None:
                self._client = object_store.connect(self.url, retried=False)
            return self._client

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises FileNotFoundError, and NoRegularFile."""
        if self.folder is not None:
            with open(self._open(name), "rb") as file:
                return file.read()
        with self._explain(name):
            return bytes(self._remote.get(name).bytes())

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`; fewer where the file ends before. Raises FileNotFoundError."""
        return bytes(self.view_range(name, offset, length))

    def view_range(self, name: str, offset: int, length: int, given_up: threading.Event | None = None) -> memoryview:
        """Read a range without a copy. Raises CancelledError between two attempts once `given_up` is set."""
        if self.folder is not None:
            descriptor = self._descriptor(name)
            if length > PREAD:  # room for all of it is made before it is known to be there
                length = max(0, min(length, os.fstat(descriptor).st_size - offset))
            return memoryview(os.pread(descriptor, length, offset))
        if length <= 0:
            return memoryview(b"")
        backoff = object_store.Backoff(given_up or threading.Event())
        cause: str | None
        while True:
            with self._explain(name):
                try:
                    data = self._ranges().get_range(name, start=offset, length=length)
                    self._answered = True
                    self.traffic.add(requests=1, bytes=len(data))
                    if len(data) == length:
                        return memoryview(data)
                    size = self.size(name)
                    if size < offset + length and len(data) == max(0, size - offset):
                        return memoryview(data)
                    cause, message = "short", f"{len(data)} of {length} bytes came"
                except FileNotFoundError:
                    raise
                except Exception as error:
                    self.traffic.add(requests=1)
                    cause = object_store.retry_cause(error, self._answered)
                    if cause is None or backoff.over:
                        raise
                    message = object_store.error_summary(error)
                    if cause == "expired":
                        with self._lock:
                            self._client = None  # the next one asks for keys anew
            if backoff.over:
                raise UserError(f"{self.url}/{name}: the store does not answer as it should ({message})")
            self.traffic.add(retry=cause)
            if backoff.attempts in (3, 6):
                log.warning("%s/%s: %s; trying again", self.url, name, message)
            backoff.wait()

    def mapped(self, name: str, size: int) -> memoryview | None:
        """Map a file of `size` bytes on a local disk into memory; None for one that is not on a local disk."""
        view = self._maps.get(name)
        if view is not None:
            return view
        if self.folder is None or not self.on_local_disk:
            return None
        with self._lock:
            try:
                with open(self._open(name), "rb") as file:
                    actual = os.fstat(file.fileno()).st_size
                    if actual != size:
                        raise UserError(
                            f"{self.url}/{name}: {actual} bytes, {size} when this run began: cut or replaced"
                        )
                    view = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            except FileNotFoundError as error:
                raise UserError(f"{self.url}/{name}: gone while it is being read") from error
            while len(self._maps) >= MAPS:  # a mapping lives on in the samples that were cut out of it
                del self._maps[next(iter(self._maps))]
            self._maps[name] = view
            return view

    @cached_property
    def on_local_disk(self) -> bool:
        """Return whether these files are on a disk of this machine."""
        # Those are mapped. A network may fail in mid-read, which a mapping answers with SIGBUS.
        return self.folder is not None and file_system(self.folder) in NODE_LOCAL

    def size(self, name: str) -> int:
        """Return a file's size in bytes. Raises FileNotFoundError, and NoRegularFile."""
        if self.folder is not None:
            facts = (self.folder / name).stat()
            if not stat.S_ISREG(facts.st_mode):
                raise NoRegularFile(f"{self.url}/{name}: no regular file")
            return facts.st_size
        with self._explain(name):
            return int(self._remote.head(name)["size"])

    def names(self) -> list[str]:
        """Return the names of all files here, without those of folders below."""
        if self.folder is not None:
            return sorted(path.name for path in self.folder.iterdir() if path.is_file()) if self.folder.exists() else []
        with self._explain(""):
            return sorted(entry["path"] for entry in self._remote.list_with_delimiter()["objects"])

    def folders(self) -> list[str]:
        """Return the names of the folders, or prefixes, directly below."""
        if self.folder is not None:
            return sorted(path.name for path in self.folder.iterdir() if path.is_dir()) if self.folder.exists() else []
        with self._explain(""):
            return sorted(prefix.rsplit("/", 1)[-1] for prefix in self._remote.list_with_delimiter()["common_prefixes"])

    def write_pieces(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write an object whose content comes in pieces; it appears complete or, if an error ends the pieces, not
        at all.
        """
        assert self.folder is None
        with self._explain(name):
            self._remote.put(name, iter(pieces), chunk_size=PART)

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; it appears under its name complete or not at all."""
        if self.folder is not None:
            write_atomically(self.folder / name, data, MODE)
        else:
            with self._explain(name):
                self._remote.put(name, data, chunk_size=PART)

    def upload(self, path: Path, name: str) -> None:
        """Upload a local file in parts; it appears under its name complete or not at all."""
        if self.folder is not None:
            write_atomically(self.folder / name, path.read_bytes(), MODE)
            return
        with self._explain(name):
            self._remote.put(name, path, chunk_size=PART)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError), self._explain(name):
                self._remote.delete(name)

    @contextlib.contextmanager
    def _explain(self, name: str) -> Iterator[None]:
        """Turn an object store's refusals into FileNotFoundError, or one line that names the URL."""
        import obstore.exceptions as refusals

        try:
            yield
        except (FileNotFoundError, refusals.NotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise UserError(f"{self.url}: no such bucket") from error
            raise FileNotFoundError(f"{self.url}/{name}") from error
        except (refusals.BaseError, PermissionError) as error:
            denied = isinstance(error, (PermissionError, refusals.PermissionDeniedError, refusals.UnauthenticatedError))
            hint = "check the credentials in the environment" if denied else "the store does not answer as it should"
            raise UserError(f"{self.url}/{name}: {hint} ({object_store.error_summary(error)})") from error

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = self._open(name)
            return self._descriptors[name]

    def _open(self, name: str) -> int:
        """Open a file of the folder. Raises FileNotFoundError, and NoRegularFile."""
        assert self.folder is not None
        try:
            return open_regular(self.folder / name)
        except IrregularFile as error:
            raise NoRegularFile(f"{self.url}/{name}: no regular file") from error

    def close(self) -> None:
        """Close the files from which ranges were read."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._maps.clear()
