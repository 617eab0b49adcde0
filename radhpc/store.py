"""Where shards lie: a folder, or an object store behind a URL. Reads whole files and byte ranges.

    store = Store("/data/padchest")                 # a folder: os.pread
    store = Store("s3://bucket/padchest")           # obstore: s3, gs, az, http and file URLs
    store.read_range("train-000000.tar", 512, 100)

Safe to use from many threads. obstore's own threads do not survive a fork: open stores after forking.
"""

import os
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

from radhpc.errors import UserError, first_line
from radhpc.files import write_atomically

__all__ = ["Store", "write_atomically"]


class Store:
    """A flat folder of files behind a path or a URL."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/")
        self._folder = None if "://" in self.url else Path(self.url)
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @cached_property
    def _remote(self) -> Any:
        import obstore.store

        try:
            return obstore.store.from_url(self.url)
        except Exception as error:
            raise UserError(
                f"{self.url}: {first_line(error)}; allowed are a folder and s3, gs, az, http, file URLs"
            ) from error

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises FileNotFoundError."""
        if self._folder is not None:
            return (self._folder / name).read_bytes()
        return bytes(self._remote.get(name).bytes())

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`; fewer where the file ends before. Raises FileNotFoundError."""
        if self._folder is not None:
            return os.pread(self._descriptor(name), length, offset)
        return bytes(self._remote.get_range(name, start=offset, length=length))

    def size(self, name: str) -> int:
        """The size in bytes. Raises FileNotFoundError."""
        if self._folder is not None:
            return (self._folder / name).stat().st_size
        return int(self._remote.head(name)["size"])

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; it appears under its name complete or not at all."""
        if self._folder is not None:
            write_atomically(self._folder / name, data)
        else:
            self._remote.put(name, data)

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)  # type: ignore[operator]
            return self._descriptors[name]

    def close(self) -> None:
        """Close the files that ranges were read from."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
