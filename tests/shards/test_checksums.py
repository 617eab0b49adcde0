"""Checksums that an archive brings are checked as its images are read, and the card says so."""

import hashlib
import os
from pathlib import Path

import pytest

from radhpc.core.manifest import Manifest
from radhpc.storage.store import Store
from shards import checksums
from shards.build import BuildResult, BuildSettings, build
from tests.shards.helpers import notes

pytestmark = pytest.mark.timeout(120)


def table(raw: Path, name: str = "SHA256SUMS.txt", binary: bool = False) -> Path:
    """Write what sha256sum or md5sum prints of an archive's files."""
    made = checksums.algorithm(name)
    files = sorted(path for path in raw.rglob("*") if path.is_file() and path.name not in checksums.NAMES)
    mark = "*" if binary else " "
    lines = [f"{hashlib.new(made, path.read_bytes()).hexdigest()} {mark}{path.relative_to(raw)}" for path in files]
    (raw / name).write_text("\n".join(lines) + "\n")
    return raw / name


def run(raw: Path, out: Path) -> BuildResult:
    settings = BuildSettings(workers=1, longest_side=32, shard_samples=4, max_skipped="50%")
    return build("image_text", raw, str(out), {}, settings)


def images(raw: Path) -> list[Path]:
    return sorted((raw / "images").iterdir())


@pytest.mark.parametrize("name", checksums.NAMES)
@pytest.mark.parametrize("binary", [False, True])
def test_what_differs_is_named_and_the_card_counts_the_rest(tmp_path: Path, name: str, binary: bool) -> None:
    raw = notes(tmp_path / "raw", 10)
    table(raw, name, binary)
    changed, unnamed = images(raw)[3], images(raw)[5]
    sums = raw / name
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if unnamed.name not in line))
    # Behind its end a decoder sees nothing wrong.
    changed.write_bytes(changed.read_bytes() + b"\0")
    result = run(raw, tmp_path / "out")
    assert [skip["reason"].partition(":")[0] for skip in result.skipped] == [checksums.REASON]
    found = Manifest.load(Store(str(tmp_path / "out"))).checksums
    assert found is not None
    assert (found.file, found.checked, found.unchecked) == (name, 8, 1)
    assert f"{name}: 8 image files have theirs, 1 are not in it" in (tmp_path / "out/card.md").read_text()


def test_an_archive_without_a_table_says_nothing(tmp_path: Path) -> None:
    result = run(notes(tmp_path / "raw", 10), tmp_path / "out")
    assert not result.skipped
    assert Manifest.load(Store(str(tmp_path / "out"))).checksums is None
    assert "checksums of the archive" not in (tmp_path / "out/card.md").read_text()


def test_a_changed_table_beside_the_images_is_a_warning(tmp_path: Path) -> None:
    raw = notes(tmp_path / "raw", 10)
    table(raw)
    (metadata,) = [path for path in raw.iterdir() if path.is_file() and path.name not in checksums.NAMES]
    with metadata.open("a") as file:
        file.write("\n")
    warnings = run(raw, tmp_path / "out").warnings
    assert (
        f"{metadata.name}: checksum differs from SHA256SUMS.txt: download it again, unless you have edited it"
        in warnings
    )


@pytest.mark.parametrize(
    "line", ["garbage", "0" * 63 + "  a.png", "0" * 65 + "  a.png", "z" * 64 + "  a.png", "0" * 64]
)
def test_lines_that_cannot_be_read_are_counted(tmp_path: Path, line: str) -> None:
    raw = notes(tmp_path / "raw", 10)
    path = table(raw)
    path.write_text(f"{line}\n{path.read_text()}")
    result = run(raw, tmp_path / "out")
    assert f"{path.name}: 1 lines cannot be read, line 1 is the first: not checked" in result.warnings
    assert not result.skipped


def test_names_may_be_any_bytes_and_paths_plain(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    path = tmp_path / "SHA256SUMS.txt"
    path.write_bytes(
        b"".join(digest.encode() + b"  " + name + b"\r\n" for name in (b"./a.png", b"b/../c.png", b"\xff d.png"))
    )
    problems: list[str] = []
    assert [name for name, _ in checksums.read_table(path, problems)] == [b"a.png", b"c.png", b"\xff d.png"]
    assert not problems


def test_a_table_that_is_no_regular_file_hangs_nothing(tmp_path: Path) -> None:
    raw = notes(tmp_path / "raw", 10)
    os.mkfifo(raw / "SHA256SUMS.txt")
    assert not run(raw, tmp_path / "out").skipped
