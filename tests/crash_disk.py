"""A disk that dies at a chosen call: the process is killed there, or the power fails and what was not flushed is lost.

    with CrashDisk(folder, fail_at=7) as disk, pytest.raises(Killed):
        checkpoints.save(...)
    disk.after_power_cut(tmp_path / "after")      # `folder` as it is found when the machine is back

Calls that change the disk are counted: mkdir, open, rename, replace, unlink, rmdir and fsync, as the product makes them
through `os`. From the chosen call on every call raises Killed, a BaseException, so that no handler of the product can
do anything more, as after a SIGKILL. The power cut is the worst that a file system may do: a file keeps what it had
when it was last flushed, a folder the entries that it had when it was last flushed; nothing else is kept.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CALLS = ("mkdir", "open", "rename", "replace", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """The process ends here."""


class CrashDisk(contextlib.AbstractContextManager["CrashDisk"]):
    """Watches one folder. Not for several threads."""

    def __init__(self, folder: Path, fail_at: int | None = None) -> None:
        self.folder, self.fail_at = folder, fail_at
        self.calls: list[tuple[str, str]] = []  # (call, last path argument), of this folder or unknown ones
        self._files: dict[int, bytes] = {}  # inode -> flushed content
        self._folders: dict[int, dict[str, tuple[int, bool]]] = {}  # inode -> entries: name -> (inode, is folder)
        self._held: list[int] = []  # open descriptors: an inode number must not be used twice
        self._patch = pytest.MonkeyPatch()
        self._real = {name: getattr(os, name) for name in CALLS}

    def __enter__(self) -> "CrashDisk":
        for top, _, names in os.walk(self.folder):  # what was there before is on the disk
            self._flush(top)
            for name in names:
                self._flush(os.path.join(top, name))
        for name in CALLS:
            self._patch.setattr(os, name, self._counted(name))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)
        self._held.clear()

    def after_power_cut(self, target: Path) -> Path:
        """Write what is on the disk to a new folder."""
        self._restore(os.stat(self.folder).st_ino, target)
        return target

    def _counted(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real(*arguments, **options)
            if self.fail_at is not None and len(self.calls) >= self.fail_at:
                raise Killed
            path = arguments[-1] if name in ("rename", "replace") else arguments[0]
            path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
            self.calls.append((name, path))
            result = real(*arguments, **options)
            if name == "fsync":
                self._flush(arguments[0])
            return result

        return call

    def _flush(self, path: str | int) -> None:
        """Note what a file or a folder holds now."""
        place = f"/proc/self/fd/{path}" if isinstance(path, int) else path
        descriptor = self._real["open"](place, os.O_RDONLY)
        self._held.append(descriptor)
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            with os.scandir(descriptor) as entries:
                self._folders[about.st_ino] = {entry.name: (entry.inode(), entry.is_dir()) for entry in entries}
            for name, (_, is_folder) in self._folders[about.st_ino].items():
                flags = os.O_RDONLY | (os.O_DIRECTORY if is_folder else 0)
                self._held.append(self._real["open"](name, flags, dir_fd=descriptor))
        else:
            self._files[about.st_ino] = os.pread(descriptor, about.st_size, 0)

    def _restore(self, inode: int, target: Path) -> None:
        target.mkdir(parents=True)
        for name, (child, is_folder) in self._folders.get(inode, {}).items():
            if is_folder:
                self._restore(child, target / name)
            else:
                (target / name).write_bytes(self._files.get(child, b""))


def crashes(folder: Callable[[], Path], work: Callable[[Path], Any]) -> Iterator[tuple[int, CrashDisk]]:
    """Kill `work` at each of its calls in turn, each time in a fresh folder. Ends when it gets through."""
    for number in range(10_000):
        place = folder()
        with CrashDisk(place, number) as disk:
            try:
                work(place)
            except Killed:
                finished = False
            else:
                finished = True
        yield number, disk
        disk.close()
        if finished:
            return
