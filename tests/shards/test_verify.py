"""Every kind of damage is found, and named with shard, member and offset."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radhpc.core.errors import UserError
from radhpc.core.manifest import INDEX, MANIFEST, FileEntry, Manifest, SampleIndex, sha256
from radhpc.storage.store import Store
from shards.build import BuildSettings, build
from shards.verify import ShardFault, verify

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "shards"
    build("phantom", None, str(out), {"studies": "30", "size": "64"}, BuildSettings(workers=1, shard_samples=10))
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def faults(folder: Path) -> list[ShardFault]:
    report = verify(str(folder))
    assert report.ok == (not report.faults)
    return report.faults


def first_member(folder: Path) -> tuple[str, Any]:
    """The first JSON of the first shard."""
    manifest = Manifest.load(Store(folder))
    return manifest.shards[0].name, next(manifest.load_index(Store(folder)).members(0))


def change(path: Path, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def rewrite_index(folder: Path, **columns: Any) -> None:
    """Replace columns of the index, and make the manifest agree with the new file."""
    manifest = Manifest.load(Store(folder))
    index = manifest.load_index(Store(folder))
    data = SampleIndex(**{**index.__dict__, **columns}).to_bytes()
    (folder / INDEX).write_bytes(data)
    file = FileEntry(name=INDEX, size=len(data), sha256=sha256(data))
    (folder / MANIFEST).write_bytes(manifest.model_copy(update={"index": file}).to_bytes())


def test_a_whole_dataset_has_no_fault(whole: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(str(whole), lambda done, total: seen.append((done, total)))
    assert report.ok
    assert (report.samples, report.shards, seen[-1]) == (30, len(list(whole.glob("*.tar"))), (30, 30))


def test_a_flipped_bit_in_an_image(copy: Path) -> None:
    manifest = Manifest.load(Store(copy))
    index = manifest.load_index(Store(copy))
    member = list(index.members(3))[1]
    shard = manifest.shards[member.shard].name

    def flip(data: bytearray) -> None:
        data[member.offset + member.length // 2] ^= 1

    change(copy / shard, flip)
    assert faults(copy) == [
        ShardFault(shard, None, None, "sha256 differs from the manifest's"),
        ShardFault(shard, member.name, member.offset, "crc32c differs from the index's"),
    ]


def test_a_flipped_bit_in_a_header_and_in_the_padding(copy: Path) -> None:
    shard, member = first_member(copy)

    def flip(data: bytearray) -> None:
        data[member.offset - 500] ^= 1

    change(copy / shard, flip)
    result = faults(copy)
    assert result[1].offset == member.offset - 512
    assert "no tar header" in result[1].fault
    change(copy / shard, flip)
    assert faults(copy) == []

    def pad(data: bytearray) -> None:
        data[-1] = 1

    change(copy / shard, pad)
    assert [fault.fault for fault in faults(copy)] == [
        "sha256 differs from the manifest's",
        "the tar does not end where the index says",
    ]


@pytest.mark.parametrize("keep", [0, 100, 512, 5000])
def test_a_cut_shard(copy: Path, keep: int) -> None:
    shard, member = first_member(copy)
    size = (copy / shard).stat().st_size
    change(copy / shard, lambda data: data.__delitem__(slice(keep, None)))
    result = faults(copy)
    assert result[0] == ShardFault(shard, None, keep, f"{keep} bytes, but the manifest says {size}")
    assert any("cut after" in fault.fault for fault in result)


def test_a_missing_shard_and_swapped_shards(copy: Path) -> None:
    one, two = copy / "train-000000.tar", copy / "train-000001.tar"
    moved = one.rename(copy / "aside")
    assert faults(copy) == [ShardFault(one.name, None, None, "missing")]
    two.rename(one)
    moved.rename(two)
    result = faults(copy)
    assert {fault.shard for fault in result} == {one.name, two.name}
    assert any("the tar has phantom-" in fault.fault for fault in result)


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("split", "test", "description: split is test, but the index says train"),
        ("patient", "0" * 16, "description: patient is 0000000000000000, but the index says"),
        ("study", "0" * 16, "description: key is phantom-0000000000000000, but the index says"),
        ("images", [{"width": 9, "height": 9}] * 3, "description: number of images is 3, but the index says"),
        ("name", "A. Patient", "description: name: Extra inputs are not permitted"),
    ],
)
def test_an_edited_description(copy: Path, field: str, value: object, fault: str) -> None:
    """Written by somebody who knows tar: the shard is a good tar, but not the one that was built."""
    shard, member = first_member(copy)
    buffer = io.BytesIO()
    with tarfile.open(copy / shard) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for info in old:
            data = old.extractfile(info).read()
            if info.name == member.name:
                data = json.dumps({**json.loads(data), field: value}).encode()
                data = data.ljust(member.length) if len(data) <= member.length else data
                info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    (copy / shard).write_bytes(buffer.getvalue())
    result = faults(copy)
    assert any(one.fault.startswith("crc32c differs") or one.fault.startswith("the tar has") for one in result)
    index = Manifest.load(Store(copy)).load_index(Store(copy))
    lengths = index.length.copy()
    with tarfile.open(copy / shard) as tar:
        lengths[0] = tar.getmember(member.name).size
    rewrite_index(copy, length=lengths)
    assert any(one.fault.startswith(fault) and one.member == member.name for one in faults(copy))


def test_an_index_that_is_not_the_manifests(copy: Path) -> None:
    change(copy / INDEX, lambda data: data.__setitem__(200, data[200] ^ 1))
    (result,) = faults(copy)
    assert (result.shard, "does not match manifest.json" in result.fault) == (INDEX, True)


def test_a_patient_in_two_splits_a_key_twice_and_wrong_counts(copy: Path) -> None:
    index = Manifest.load(Store(copy)).load_index(Store(copy))
    patient, key = index.patient.copy(), index.key.copy()
    patient[:] = patient[0]
    key[1] = key[0]
    rewrite_index(copy, patient=patient, key=key)
    result = [fault.fault for fault in faults(copy) if fault.shard == MANIFEST]
    assert f"patient {patient[0].decode()} is in train and validate and test" in result
    assert f"key {key[0].decode()} occurs 2 times" in result
    assert any("of patients, but" in fault or "patients, but" in fault for fault in result)
    rewrite_index(copy, split=np.zeros_like(index.split), patient=index.patient, key=index.key)
    assert any("samples, but the index has" in fault.fault for fault in faults(copy))


def test_no_manifest_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest.json there"):
        verify(str(tmp_path))
