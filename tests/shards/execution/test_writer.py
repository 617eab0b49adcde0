"""A shard is a plain tar, its index points at every byte, and its bytes depend on the samples alone."""

import errno
import hashlib
import os
import tarfile
import tempfile
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings, strategies as st

from shards.execution.writer import write_shard

pytestmark = pytest.mark.timeout(60)
SAMPLES = st.lists(
    st.lists(st.binary(max_size=1500), min_size=1, max_size=3).map(
        lambda images: [(f"{n}.jpg", data) for n, data in enumerate(images)]
    ),
    min_size=1,
    max_size=6,
).map(lambda samples: [(f"set-{n:016x}", [("json", b"{}"), *members]) for n, members in enumerate(samples)])


@settings(max_examples=40, deadline=None)
@given(SAMPLES)
def test_offsets_point_at_the_data(samples: list[tuple[str, list[tuple[str, bytes]]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train-000000.tar"
        shard, rows = write_shard(path, samples)
        data = path.read_bytes()
        assert os.listdir(folder) == [path.name]
        with tarfile.open(path) as tar:
            members = [(member.name, member.offset_data, member.size) for member in tar]
            assert all((member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644) for member in tar)
        write_shard(path, samples)
        assert path.read_bytes() == data
    assert shard is not None
    assert (shard.size, shard.sha256, shard.samples) == (len(data), hashlib.sha256(data).hexdigest(), len(samples))
    assert members == [(f"{row.key}.{m.suffix}", m.offset, m.length) for row in rows for m in row.members]
    for (key, parts), row in zip(samples, rows, strict=True):
        assert key == row.key
        for (suffix, part), member in zip(parts, row.members, strict=True):
            assert suffix == member.suffix
            assert data[member.offset : member.offset + member.length] == part
            assert google_crc32c.value(part) == member.crc32c
    assert len(data) % 10240 == 0


def test_nothing_gets_the_name_unless_it_is_whole(tmp_path: Path) -> None:
    def broken():
        yield "a", [("json", b"{}")]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "train-000000.tar", broken())
    assert write_shard(tmp_path / "train-000000.tar", []) == (None, [])
    assert list(tmp_path.iterdir()) == []


def test_others_may_not_read_a_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("a", [("json", b"{}")])])
    assert (tmp_path / "a.tar").stat().st_mode & 0o777 == 0o640
