"""Record the sizes and modification times of an archive's images, so that a changed archive is not taken for the same.

    state = ArchiveState(salt, folder)
    for study, files in state.watch(studies):      # the same studies in their order, and the state of their images
        ...
    state.summary()      # {"images": 3, "missing": 0, "bytes": 4096, "sizes": "1f3a...", "times": "9c0e...", ...}

A listing that opens no image cannot tell new pixels under the old names; a size or a time can, and costs one question
to the file system for each image. Many are asked at a time, as a parallel file system answers each of them late. The
digests are keyed by the salt, and hold no name and no time that others could read.
"""

import hashlib
import hmac
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from shards import checksums, raw_files
from shards.datasets.reader import RawStudy

THREADS = 32  # that ask for sizes and times
BATCH = 2048  # studies that are looked at together
CHUNK = 128  # files for one thread at a time
MAX_VIEWS = 1000  # of a study; one with more is left out
DIGITS = 32  # hexadecimal, of a digest


class _FileState(NamedTuple):
    """The state of a file; -1 where there is none."""

    size: int  # bytes
    time: int  # ns since 1970


class ArchiveState:
    """The state of the images of an archive, in the order of its studies."""

    def __init__(self, salt: bytes, folder: Path | None) -> None:
        self._sizes, self._times = (hmac.new(salt, name, hashlib.sha256) for name in (b"sizes", b"times"))
        self._images = self._missing = self._bytes = 0
        self._started = time.time_ns()
        self._checksums = None if folder is None else _checksums(salt, folder)

    def watch(self, studies: Iterable[RawStudy]) -> Iterator[tuple[RawStudy, bytes]]:
        """Yield the studies, each with the sizes and times of its images as bytes; many files are asked at a time."""
        studies = iter(studies)
        with ThreadPoolExecutor(THREADS, "sizes") as pool:
            while batch := list(islice(studies, BATCH)):
                paths = [
                    [source for source, _ in study.views[:MAX_VIEWS] if isinstance(source, Path)] for study in batch
                ]
                every = list(chain.from_iterable(paths))
                parts = [every[start : start + CHUNK] for start in range(0, len(every), CHUNK)]
                states = chain.from_iterable(pool.map(_look, parts))
                for study, own in zip(batch, paths, strict=True):
                    yield study, b"".join(self._add(state) for state in islice(states, len(own)))

    def _add(self, state: _FileState) -> bytes:
        """Count a file in, and return its state as bytes."""
        self._images += 1
        self._missing += state.size < 0
        self._bytes += max(state.size, 0)
        # Some mounts of object stores tell the time of the question, which says nothing about the file.
        moment = state.time if state.time < self._started else 0
        size, moment_bytes = (value.to_bytes(8, "big", signed=True) for value in (state.size, moment))
        self._sizes.update(size)
        self._times.update(moment_bytes)
        return size + moment_bytes

    def summary(self) -> dict[str, Any]:
        """Return what a build records; nothing where there are no files, as in drawn datasets."""
        if not self._images:
            return {}
        table = {} if self._checksums is None else {"checksums": self._checksums}
        return {
            "images": self._images,
            "missing": self._missing,
            "bytes": self._bytes,
            "sizes": self._sizes.hexdigest()[:DIGITS],
            "times": self._times.hexdigest()[:DIGITS],
            **table,
        }


def _files_of(study: RawStudy) -> list[Path]:
    return [source for source, _ in study.views[:MAX_VIEWS] if isinstance(source, Path)]


def _look(paths: Sequence[Path]) -> list[_FileState]:
    return [_state_of(path) for path in paths]


def _state_of(path: Path) -> _FileState:
    """Ask for the state of a file, of what a link leads to."""
    try:
        result = os.stat(path)
    except (OSError, ValueError):
        return _FileState(-1, -1)
    return _FileState(result.st_size, result.st_mtime_ns)


def _checksums(salt: bytes, folder: Path) -> str | None:
    """Return a digest of the archive's own table of checksums, or None where it has none that can be read."""
    table = checksums.find_table(folder)
    try:
        data = None if table is None else raw_files.read(table, checksums.MAX_TABLE)
    except OSError:
        return None
    return None if data is None else hmac.new(salt, data, hashlib.sha256).hexdigest()[:DIGITS]


def describe_change(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Say in which way the files of an archive differ from those of a build, in a few words."""
    if not before:
        return "files: their sizes and times were not recorded then"
    changes = []
    if (counts := tuple(before.get(key) for key in ("images", "missing"))) != (now["images"], now["missing"]):
        changes.append(f"{now['images']} images, {now['missing']} of them missing; were {counts[0]} and {counts[1]}")
    if before.get("sizes") != now["sizes"]:
        changes.append(f"sizes of images, {now['bytes']} bytes in all; were {before.get('bytes')}")
    if before.get("checksums") != now.get("checksums"):
        changes.append("the table of checksums")
    if not changes:
        return (
            "files: modification times of images, not their sizes: the archive was copied, or images were replaced in "
            "place, which 'radhpc verify URL --raw DIR' tells apart"
        )
    return f"files: {'; '.join(changes)}"
