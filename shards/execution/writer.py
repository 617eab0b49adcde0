"""Writes one tar shard whose bytes depend on its samples alone, and returns the offset of each member.

    shard, rows = write_shard(Path("train-000000.tar"), samples)

`samples` yields (key, [(suffix, data), ...]); the members of a sample are called `<key>.<suffix>` and are adjacent.
Plain ustar with fixed mtime, owner and mode: any tar or WebDataset reader reads it. The file gets its name when it is
complete and on the disk.
"""

import contextlib
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from awscrt.checksums import crc32c

from radhpc.core.manifest import Shard

BLOCK = tarfile.BLOCKSIZE  # bytes: headers and data start at multiples of it
MODE = 0o640  # of the shard itself: owner and group may read patients' data, others not


class MemberRow(NamedTuple):
    """The position of one member: `length` bytes from `offset`, after its tar header."""

    suffix: str
    offset: int
    length: int
    crc32c: int


class SampleRow(NamedTuple):
    """One sample of the shard."""

    key: str
    members: tuple[MemberRow, ...]


def write_shard(
    path: Path, samples: Iterable[tuple[str, list[tuple[str, bytes]]]]
) -> tuple[Shard | None, list[SampleRow]]:
    """Write the samples in their order; without samples there is no file, and None. Raises OSError and their errors."""
    rows: list[SampleRow] = []
    digest, size = hashlib.sha256(), 0
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:

            def put(data: bytes) -> None:
                nonlocal size
                file.write(data)
                digest.update(data)
                size += len(data)

            for key, members in samples:
                member_rows = []
                for suffix, data in members:
                    put(tar_header(f"{key}.{suffix}", len(data)))
                    member_rows.append(MemberRow(suffix, size, len(data), crc32c(data)))
                    put(data)
                    put(bytes(-len(data) % BLOCK))
                rows.append(SampleRow(key, tuple(member_rows)))
            if not rows:
                return None, []
            put(bytes(2 * BLOCK))  # the end of the archive
            put(bytes(-size % tarfile.RECORDSIZE))
            file.flush()
            os.fchmod(file.fileno(), MODE)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return Shard(name=path.name, size=size, sha256=digest.hexdigest(), samples=len(rows)), rows


def tar_header(name: str, length: int) -> bytes:
    """Return the tar header of a member: 512 bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = length, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)
