"""A changed archive is changed: other sizes, times or checksums of its images are refused, and can be compared."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radhpc.core.errors import UserError
from shards.build import BuildResult, BuildSettings, build
from shards.datasets.reader import RawStudy
from shards.raw_state import ArchiveState, describe_change
from shards.rebuild import compare
from tests.shards.helpers import contents, notes

pytestmark = pytest.mark.timeout(120)
STUDIES = 10


def run(raw: Path, out: Path, force: bool = False) -> BuildResult:
    settings = BuildSettings(workers=1, longest_side=32, shard_samples=4, max_skipped="50%", force=force)
    return build("image_text", raw, str(out), {}, settings)


def image(raw: Path, number: int = 3) -> Path:
    return raw / f"images/1.2.840.{number}.png"


def tars(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name.endswith(".tar")}


def redraw(path: Path) -> None:
    """Other pixels, and another size of the file."""
    Image.fromarray(65535 - np.asarray(Image.open(path))).save(path)


def touch(path: Path) -> None:
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 10**9))


def swap(path: Path) -> None:
    """Other pixels in a file of the same size, whose time is now."""
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    touch(path)


def retarget(path: Path) -> None:
    """The link in the archive stays, what it leads to is another file."""
    other = path.with_name("other.bin")
    shutil.copy(path, other)
    other.write_bytes(other.read_bytes() + b"\0")
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (redraw, "sizes of images, [0-9]+ bytes in all; were [0-9]+"),
        (retarget, "sizes of images"),
        (touch, "modification times of images, not their sizes: the archive was copied"),
        (swap, "modification times of images, not their sizes"),
        (Path.unlink, "10 images, 1 of them missing; were 10 and 0"),
        (lambda path: (path.parent.parent / "SHA256SUMS.txt").write_text("00  a\n"), "the table of checksums"),
    ],
)
def test_a_changed_archive_is_refused_by_what_changed(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    raw, out = notes(tmp_path / "raw", STUDIES), tmp_path / "out"
    run(raw, out)
    assert run(raw, out).reused
    before = contents(out)
    change(image(raw))
    with pytest.raises(UserError, match=rf"holds another build \(files: .*{words}.*--force to replace it"):
        run(raw, out)
    assert contents(out) == before
    assert not run(raw, out, force=True).reused
    assert run(raw, out).reused


def test_a_moved_a_linked_and_a_faithfully_copied_archive_are_the_same(tmp_path: Path) -> None:
    raw, out = notes(tmp_path / "raw", STUDIES), tmp_path / "out"
    run(raw, out)
    shutil.copytree(raw, tmp_path / "copy")  # with its times, as cp -a and rsync -a do
    assert run(tmp_path / "copy", out).reused
    (tmp_path / "link").symlink_to(raw)
    assert run(tmp_path / "link", out).reused
    assert run(raw.rename(tmp_path / "moved"), out).reused


def test_a_copy_with_other_times_gives_the_same_shards_and_compares_equal(tmp_path: Path) -> None:
    raw, out = notes(tmp_path / "raw", STUDIES), tmp_path / "out"
    run(raw, out)
    before = tars(out)
    for number in range(STUDIES):
        touch(image(raw, number))
    with pytest.raises(UserError, match="verify URL --raw DIR"):
        run(raw, out)
    assert compare(str(out), raw) == []
    run(raw, out, force=True)
    assert tars(out) == before


def test_compare_names_each_study_that_differs(tmp_path: Path) -> None:
    raw, out = notes(tmp_path / "raw", STUDIES), tmp_path / "out"
    run(raw, out)
    before = contents(out)
    for number in (2, 5):
        Image.fromarray(np.asarray(Image.open(image(raw, number)))[::-1]).save(image(raw, number))
    image(raw, 7).unlink()
    faults = sorted(fault.fault for fault in compare(str(out), raw))
    assert [text.partition(":")[0] for text in faults] == [
        "cannot be built from the archive any more (missing image file)",
        *["other pixels than in the archive"] * 2,
    ]
    assert contents(out) == before
    (raw / "data.json").write_text((raw / "data.json").read_text().replace("Report 4", "Report of 4"))
    with pytest.raises(UserError, match="other source"):
        compare(str(out), raw)


@pytest.mark.parametrize("number", range(0, STUDIES, 3))
def test_an_unfinished_build_goes_on_with_repaired_images(tmp_path: Path, number: int) -> None:
    """Shards whose images are the same are kept, and the end is that of a build from scratch."""
    raw, out = notes(tmp_path / "raw", STUDIES), tmp_path / "out"
    settings = BuildSettings(workers=1, longest_side=32, shard_samples=2, ratios=(0.4, 0.3, 0.3))

    counts: list[int] = []

    def stop(done: int, total: int) -> None:
        counts.append(done)
        if done == STUDIES - 1:
            raise KeyboardInterrupt

    for _ in range(2):
        counts.clear()
        with pytest.raises(KeyboardInterrupt):
            build("image_text", raw, str(out), {}, settings, stop)
    assert counts[0] > 0
    redraw(image(raw, number))
    result = build("image_text", raw, str(out), {}, settings)
    assert [text for text in result.warnings if "changed since the build began: files: sizes of images" in text]
    build("image_text", raw, str(tmp_path / "fresh"), {}, settings)
    assert tars(out) == tars(tmp_path / "fresh")


def studies(paths: list[Path]) -> list[RawStudy]:
    return [RawStudy(str(n), "p", ((path, None),), "") for n, path in enumerate(paths)]


def summary(paths: list[Path], salt: bytes = b"salt") -> dict[str, object]:
    state = ArchiveState(salt, None)
    assert [study for study, _ in state.watch(studies(paths))] == studies(paths)
    return state.summary()


def test_the_state_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{n}" for n in range(300)]
    for n, path in enumerate(paths):
        path.write_bytes(b"x" * n)
        os.utime(path, (1e9, 1e9))
    paths += [tmp_path / "missing", tmp_path / "nul\0", tmp_path / "0" / "below-a-file"]
    whole = summary(paths)
    assert (whole["images"], whole["missing"], whole["bytes"]) == (303, 3, sum(range(300)))
    monkeypatch.setattr("shards.raw_state.BATCH", 7)
    monkeypatch.setattr("shards.raw_state.CHUNK", 3)
    assert summary(paths) == whole
    other = summary(paths, b"other salt")
    assert other["sizes"] != whole["sizes"]
    assert other["times"] != whole["times"]
    assert summary([]) == {}


def test_mounts_that_tell_the_time_of_the_question_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    results = []
    for seconds in (100, 200):
        os.utime(path, (time.time() + seconds, time.time() + seconds))
        results.append(summary([path]))
    assert results[0] == results[1]


def test_builds_without_a_record_of_their_files() -> None:
    assert describe_change(None, {"images": 1}) == "files: their sizes and times were not recorded then"
