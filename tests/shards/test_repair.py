"""Faults that verify finds are rebuilt to the very same bytes, and nothing that differs is put in place."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radhpc.core.errors import UserError
from shards.build import build
from shards.repair import repair
from shards.verify import verify
from tests.shards.helpers import SMALL, contents, notes

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return notes(tmp_path_factory.mktemp("repair") / "raw", 24)


@pytest.fixture(scope="module")
def whole(archive: Path) -> Path:
    out = archive.parent / "shards"
    build("image_text", archive, str(out), {}, SMALL)
    return out


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "mended"),
    [
        (lambda out: flip(out / "train-000001.tar", 3000), ["train-000001.tar"]),
        (lambda out: (out / "train-000000.tar").unlink(), ["train-000000.tar"]),
        (lambda out: (out / "index.npz").write_bytes(b"cut"), ["index.npz"]),
        (lambda out: (out / "fingerprints.npy").unlink(), ["fingerprints.npy"]),
        (
            lambda out: [flip(out / "test-000000.tar", 700), (out / "fingerprints.npy").write_bytes(b"")],
            ["fingerprints.npy", "test-000000.tar"],
        ),
    ],
)
def test_what_is_broken_is_built_again(damage, mended, archive: Path, whole: Path, broken: Path) -> None:  # type: ignore[no-untyped-def]
    damage(broken)
    kept = {path: path.stat().st_mtime_ns for path in broken.iterdir()}
    report = verify(str(broken))
    assert {fault.shard for fault in report.faults} == set(mended)
    assert repair(str(broken), archive, report) == mended
    assert contents(broken) == contents(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path.name not in mended)


def test_what_cannot_be_mended_is_one_line(archive: Path, broken: Path, tmp_path: Path) -> None:
    flip(broken / "train-000001.tar", 3000)
    report = verify(str(broken))
    with pytest.raises(UserError, match="--raw is missing"):
        repair(str(broken), None, report)
    moved = Path(shutil.copytree(archive, tmp_path / "moved"))
    images = sorted((moved / "images").iterdir())
    for path in images:
        with Image.open(path) as image:
            Image.fromarray(255 - np.asarray(image)).save(path)
    with pytest.raises(UserError, match=r"train-000001.tar: built again, it has other bytes .* have changed since"):
        repair(str(broken), moved, report)
    (moved / "data.json").write_text((moved / "data.json").read_text().replace("Report", "Note"))
    with pytest.raises(UserError, match=r"cannot be built again as it was \(other source\)"):
        repair(str(broken), moved, report)
    (broken / "index.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"index.npz and train-000001.tar are both damaged"):
        repair(str(broken), archive, verify(str(broken)))
    assert verify(str(broken)).faults  # nothing was put in place
    assert not [path.name for path in broken.iterdir() if path.name.startswith(".")]
