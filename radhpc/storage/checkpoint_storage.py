"""Store checkpoints in a folder or below a prefix of an object store. checkpoint.py defines what is in them.

    storage = Folder(Path("runs/x/checkpoints"))        # or Bucket("s3://bucket/prefix/x")
    storage.begin("step-000120", files)
    storage.put("step-000120", "state.safetensors", pieces)
    storage.commit("step-000120", "COMMITTED", marker)   # until here it does not count

In a folder a checkpoint is written under a temporary name, its process's own, flushed and renamed, so that of two that
write it one is complete; in an object store every object appears complete or not at all, and an object says which life
writes. In both the marker comes last, and goes first when a checkpoint is deleted.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from radhpc.core.files import sync, write_atomically
from radhpc.storage.store import PART, Store

Buffer = bytes | memoryview
_LEASE = "lease"  # the object that holds the token of the life that writes


class CheckpointStorage(Protocol):
    """Named checkpoints of a few files each. Errors are OSError (FileNotFoundError for a missing file) or, from
    an object store, UserError.
    """

    def names(self) -> list[str]:
        """Return the names of all checkpoints, torn ones too."""
        ...

    def take(self, token: str) -> None:
        """Note that the life with this token writes here from now on."""
        ...

    def held(self, token: str) -> bool:
        """Return whether the life with this token is the last one that has taken the place."""
        ...

    def begin(self, name: str, files: Iterable[str]) -> None:
        """Make room for a checkpoint; `files`: of one that an earlier life may have left, in the order of deletion."""
        ...

    def discard(self, name: str, files: Iterable[str]) -> None:
        """Delete what was put since begin(), and with `files` what stands under the name."""
        ...

    def put(self, name: str, file: str, pieces: Iterable[Buffer]) -> None: ...

    def commit(self, name: str, file: str, marker: bytes) -> None:
        """Make the files durable, then write the marker."""
        ...

    def remove(self, name: str, files: Iterable[str]) -> None:
        """Delete `files` in this order, the marker first: a deletion that is cut short leaves a torn checkpoint."""
        ...

    def sweep(self) -> None:
        """Delete the half-written files of killed processes."""
        ...

    def has(self, name: str, file: str) -> bool: ...

    def pieces(self, name: str, file: str) -> Iterator[Buffer]:
        """Yield a file's content from its beginning to its end."""
        ...

    def where(self, name: str) -> str:
        """Return the path or URL, for people."""
        ...


class FolderStorage:
    """A folder of a file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = secrets.token_hex(4)

    def take(self, token: str) -> None:
        pass  # the lease lies in the run folder, beside it

    def held(self, token: str) -> bool:
        return True

    def names(self) -> list[str]:
        return [path.name for path in self.path.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]

    def begin(self, name: str, files: Iterable[str]) -> None:
        shutil.rmtree(self._unfinished(name), ignore_errors=True)
        self._unfinished(name).mkdir(mode=0o700)

    def discard(self, name: str, files: Iterable[str]) -> None:
        shutil.rmtree(self._unfinished(name), ignore_errors=True)

    def put(self, name: str, file: str, pieces: Iterable[Buffer]) -> None:
        with open(self._unfinished(name) / file, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
            for piece in pieces:
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())

    def commit(self, name: str, file: str, marker: bytes) -> None:
        path, before = self.path / name, self._unfinished(name).with_suffix(".replaced")
        sync(self._unfinished(name))
        with contextlib.suppress(FileNotFoundError):  # a damaged or torn one of an earlier life
            path.rename(before)
        self._unfinished(name).rename(path)
        sync(self.path)
        write_atomically(path / file, marker, 0o600)
        sync(path)
        shutil.rmtree(before, ignore_errors=True)

    def remove(self, name: str, files: Iterable[str]) -> None:
        for file in files:
            (self.path / name / file).unlink(missing_ok=True)
        shutil.rmtree(self.path / name, ignore_errors=True)

    def sweep(self) -> None:
        for path in [*self.path.glob(".step-*.writing"), *self.path.glob(".step-*.replaced")]:
            shutil.rmtree(path, ignore_errors=True)

    def has(self, name: str, file: str) -> bool:
        return (self.path / name / file).exists()

    def pieces(self, name: str, file: str) -> Iterator[Buffer]:
        with open(self.path / name / file, "rb") as opened:
            while piece := opened.read(PART):
                yield piece

    def where(self, name: str) -> str:
        return str(self.path / name)

    def _unfinished(self, name: str) -> Path:
        return self.path / f".{name}.{self._own}.writing"


class ObjectStorage:
    """A prefix of an object store."""

    def __init__(self, url: str) -> None:
        self._store = Store(url)

    def names(self) -> list[str]:
        return [name for name in self._store.folders() if re.fullmatch(r"step-\d+", name)]

    def take(self, token: str) -> None:
        self._store.write(_LEASE, token.encode())

    def held(self, token: str) -> bool:
        try:
            return self._store.read(_LEASE).decode(errors="replace") == token
        except FileNotFoundError:
            return True  # deleted by hand: that is no other life

    def begin(self, name: str, files: Iterable[str]) -> None:
        self.remove(name, files)  # the marker first: what lies behind it is written over

    def discard(self, name: str, files: Iterable[str]) -> None:
        self.remove(name, files)

    def put(self, name: str, file: str, pieces: Iterable[Buffer]) -> None:
        self._store.write_pieces(f"{name}/{file}", pieces)

    def commit(self, name: str, file: str, marker: bytes) -> None:
        self._store.write(f"{name}/{file}", marker)

    def remove(self, name: str, files: Iterable[str]) -> None:
        for file in files:
            self._store.delete(f"{name}/{file}")

    def sweep(self) -> None:
        pass  # an upload that was cut short is no object

    def has(self, name: str, file: str) -> bool:
        try:
            self._store.size(f"{name}/{file}")
        except FileNotFoundError:
            return False
        return True

    def pieces(self, name: str, file: str) -> Iterator[Buffer]:
        path = f"{name}/{file}"
        size = self._store.size(path)
        for start in range(0, size, PART):
            yield self._store.view_range(path, start, min(PART, size - start))

    def where(self, name: str) -> str:
        return f"{self._store.url}/{name}"
