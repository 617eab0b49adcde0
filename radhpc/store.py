"""Where shards lie: a folder, or an object store behind a URL. Reads whole files and byte ranges.

    store = Store("/data/padchest")                 # a folder: os.pread
    store = Store("s3://bucket/padchest")           # obstore: s3, gs, az, http and file URLs
    store.read_range("train-000000.tar", 512, 100)

A fragment names a subset of the samples that lie there: Store("/data/padchest#balanced").subset is "balanced", and
its manifest is balanced.json (manifest.py). A path that is no string is taken as it stands.

Safe to use from many threads. obstore's own threads do not survive a fork: open stores after forking. Credentials,
the endpoint and the region come from the environment, as for other S3 tools: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, AWS_REGION, and AWS_ALLOW_HTTP=true for an endpoint without TLS.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from radhpc.errors import UserError, first_line
from radhpc.files import write_atomically

__all__ = ["Store", "write_atomically"]

_SUBSET = re.compile(r"(?P<url>.*)#(?P<subset>[a-z][a-z0-9_-]*)", re.DOTALL)


MODE = 0o640  # of files in a folder: owner and group may read patients' data, others not
RETRIES = {"max_retries": 10, "retry_timeout": timedelta(minutes=2)}  # of one request to an object store
PART = 16 << 20  # bytes of one part of an upload


class Store:
    """A flat folder of files behind a path or a URL."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        found = _SUBSET.fullmatch(url) if isinstance(url, str) else None
        self.subset = found["subset"] if found else None
        self.url = (found["url"] if found else os.fspath(url)).rstrip("/")
        self.folder = None if "://" in self.url else Path(self.url)
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @cached_property
    def _remote(self) -> Any:
        import obstore.store

        scheme = self.url.split("://")[0]
        try:
            local = {"mkdir": True} if scheme == "file" else {"retry_config": RETRIES}
            return obstore.store.from_url(self.url, **local)
        except Exception as error:
            raise UserError(
                f"{self.url}: {first_line(error)}; allowed are a folder and s3, gs, az, http, file URLs"
            ) from error

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises FileNotFoundError."""
        if self.folder is not None:
            return (self.folder / name).read_bytes()
        with self._explain(name):
            return bytes(self._remote.get(name).bytes())

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`; fewer where the file ends before. Raises FileNotFoundError."""
        if self.folder is not None:
            return os.pread(self._descriptor(name), length, offset)
        if length <= 0:
            return b""
        with self._explain(name):
            return bytes(self._remote.get_range(name, start=offset, length=length))

    def size(self, name: str) -> int:
        """The size in bytes. Raises FileNotFoundError."""
        if self.folder is not None:
            return (self.folder / name).stat().st_size
        with self._explain(name):
            return int(self._remote.head(name)["size"])

    def names(self) -> list[str]:
        """The names of all files, without those of folders below it."""
        if self.folder is not None:
            return sorted(path.name for path in self.folder.iterdir() if path.is_file()) if self.folder.exists() else []
        with self._explain(""):
            return sorted(entry["path"] for entry in self._remote.list_with_delimiter()["objects"])

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; it appears under its name complete or not at all."""
        if self.folder is not None:
            write_atomically(self.folder / name, data, MODE)
        else:
            with self._explain(name):
                self._remote.put(name, data, chunk_size=PART)

    def upload(self, path: Path, name: str) -> None:
        """Put a local file there, in parts; it appears under its name complete or not at all."""
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
            raise UserError(f"{self.url}/{name}: {hint} ({_said(error)})") from error

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)  # type: ignore[operator]
            return self._descriptors[name]

    def close(self) -> None:
        """Close the files that ranges were read from."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


def _said(error: Exception) -> str:
    """The gist of obstore's long messages: what the server said, else the innermost cause."""
    text = first_line(error)
    if said := re.search(r"<Code>(.*?)</Code>(?:<Message>(.*?)</Message>)?", str(error)):
        return ": ".join(part for part in said.groups() if part)
    return text.split(" - ", 1)[-1][:200]
