"""Commit or nothing: a checkpoint that is torn, damaged or half deleted does not count, and never blocks."""

import contextlib
import itertools
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from radhpc.core.errors import UserError
from radhpc.engine.checkpoint import Checkpoints, Cursor, SaveCancelled, _serialised
from radhpc.storage.checkpoint_storage import FolderStorage, ObjectStorage
from radhpc.storage.store import Store
from tests.conftest import Moto, reach
from tests.crash_disk import CrashDisk, Killed, crashes
from tests.faults import Faults

CURSOR = Cursor(
    stage=0, step=0, stage_step=0, samples=0, stage_done=False, lineage=(), recipe="r", base="b", data=("d",), world=1,
    engine="fsdp",
)  # fmt: skip


def save(checkpoints: Checkpoints, step: int, done: bool = False, size: int = 100) -> str:
    tensors = {"a.weight": torch.full((size,), float(step)), "exp_avg/a.weight": torch.zeros(size)}
    cursor = Cursor(**{**CURSOR.__dict__, "step": step, "stage_step": step, "stage_done": done})
    return checkpoints.save(tensors, cursor)[0]


@pytest.fixture(params=["folder", "bucket"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoints:
    """Those of a run: in its folder, and in an object store."""
    if request.param == "folder":
        return Checkpoints(FolderStorage(tmp_path))
    return Checkpoints(ObjectStorage(request.getfixturevalue("s3")))


def content(checkpoints: Checkpoints, name: str, file: str) -> bytes:
    return b"".join(checkpoints.storage.pieces(name, file))


def replace(checkpoints: Checkpoints, name: str, file: str, data: bytes | None) -> None:
    """Damage a file from outside; None deletes it."""
    storage = checkpoints.storage
    store = Store(storage.path / name if isinstance(storage, FolderStorage) else storage.where(name))
    if data is None:
        store.delete(file)
    else:
        store.write(file, data)


def test_what_is_saved_is_read(checkpoints: Checkpoints) -> None:
    name = save(checkpoints, 7)
    assert checkpoints.newest() == (name, [])
    assert checkpoints.cursor(name).step == 7
    assert torch.equal(checkpoints.tensors(name, moments=True)["a.weight"], torch.full((100,), 7.0))
    assert list(checkpoints.tensors(name, moments=False)) == ["a.weight"]
    if isinstance(checkpoints.storage, FolderStorage):
        for file in (checkpoints.storage.path / name).iterdir():
            assert file.stat().st_mode & 0o777 == 0o600


def test_the_format_is_the_one_that_safetensors_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "a/transposed": torch.randn(7, 3, generator=generator).T,
        "double": torch.randn(2, 1, generator=generator, dtype=torch.float64),
    }
    found = safetensors.torch.load(b"".join(_serialised(tensors, {"step": "1"})))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("name", ["COMMITTED", "manifest.json", "cursor.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_one_is_skipped_by_name(checkpoints: Checkpoints, name: str, damage: str) -> None:
    good, bad = save(checkpoints, 1), save(checkpoints, 2)
    data = bytearray(content(checkpoints, bad, name))
    data[len(data) // 2] ^= 1
    replace(checkpoints, bad, name, {"missing": None, "cut": bytes(data[:-3]), "flipped": bytes(data)}[damage])
    newest, skipped = checkpoints.newest()
    assert newest == good
    assert [name for name, _ in skipped] == ["step-000002"]
    save(checkpoints, 2)  # the step is reached again, and the torn one is in nobody's way
    assert checkpoints.newest()[0] == bad
    assert checkpoints.verify(bad) is None


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """Makes a new folder with the checkpoints of steps 1 and 2 in it."""
    numbers = itertools.count()

    def make() -> Path:
        folder = tmp_path / f"disk-{next(numbers)}"
        folder.mkdir()
        for step in (1, 2):
            save(Checkpoints(FolderStorage(folder)), step)
        return folder

    return make


def assert_sound(folder: Path, newest: set[str]) -> None:
    """Every checkpoint that has a marker verifies, the newest one is one of these, and the run can go on saving."""
    checkpoints = Checkpoints(FolderStorage(folder))
    assert {name: checkpoints.verify(name) for name in checkpoints.committed()} == dict.fromkeys(
        checkpoints.committed()
    )
    assert checkpoints.newest()[0] in newest
    assert save(checkpoints, 3) == checkpoints.newest()[0]


def test_a_save_that_is_killed_at_any_call_leaves_the_old_or_the_new_one(
    fresh: Callable[[], Path], tmp_path: Path
) -> None:
    old, new = "step-000002", "step-000003"
    for number, disk in crashes(fresh, lambda folder: save(Checkpoints(FolderStorage(folder)), 3)):
        cut = disk.after_power_cut(tmp_path / f"cut-{number}")
        assert_sound(cut, {old, new})
        assert_sound(disk.folder, {old, new})


def test_what_save_has_returned_survives_a_power_cut(fresh: Callable[[], Path], tmp_path: Path) -> None:
    folder = fresh()
    with CrashDisk(folder) as disk:
        name = save(Checkpoints(FolderStorage(folder)), 3)
    checkpoints = Checkpoints(FolderStorage(disk.after_power_cut(tmp_path / "cut")))
    assert checkpoints.newest() == (name, [])
    disk.close()


def test_the_marker_is_the_last_thing_that_a_save_writes(fresh: Callable[[], Path]) -> None:
    """After the folder has its name and its name is on the disk; only flushes follow."""
    folder = fresh()
    with CrashDisk(folder) as disk:
        save(Checkpoints(FolderStorage(folder)), 3)
    disk.close()
    place = str(folder / "step-000003")
    (unfinished,) = {path for call, path in disk.calls if call == "fsync" and path.endswith(".writing")}
    filled = disk.calls.index(("fsync", unfinished))
    named = disk.calls.index(("rename", place))
    flushed = disk.calls.index(("fsync", str(folder)), named)
    marked = disk.calls.index(("replace", f"{place}/COMMITTED"))
    assert filled < named < flushed < marked
    assert ("open", f"{unfinished}/COMMITTED") not in disk.calls
    assert {call for call, _ in disk.calls[marked + 1 :]} == {"fsync"}


def test_a_prune_that_is_killed_at_any_call_leaves_no_marker_without_its_files(
    fresh: Callable[[], Path], tmp_path: Path
) -> None:
    for number, disk in crashes(fresh, lambda folder: Checkpoints(FolderStorage(folder)).prune(1)):
        cut = disk.after_power_cut(tmp_path / f"cut-{number}")
        assert Checkpoints(FolderStorage(cut)).newest()[0] == "step-000002"
        assert_sound(disk.folder, {"step-000002"})


@pytest.mark.parametrize("work", ["save", "prune"])
def test_an_object_store_that_fails_after_any_request_leaves_the_old_or_the_new_one(
    moto: Moto, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """The process is killed there: no request follows."""
    moto.bucket(f"kill-{work}")
    reach(monkeypatch, moto.environment)
    requests = {name: getattr(Store, name) for name in ("write", "write_pieces", "delete")}
    for fail_at in range(100):
        checkpoints = Checkpoints(ObjectStorage(f"s3://kill-{work}/run-{fail_at}"))
        for step in (1, 2):
            save(checkpoints, step)
        seen: list[str] = []

        def counted(name: str, seen: list[str] = seen, fail_at: int = fail_at) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                if len(seen) >= fail_at:
                    raise Killed
                seen.append(name)
                return requests[name](*arguments)

            return call

        killed = True
        with monkeypatch.context() as patch:
            for name in requests:
                patch.setattr(Store, name, counted(name))
            with contextlib.suppress(Killed):
                save(checkpoints, 3) if work == "save" else checkpoints.prune(1)
                killed = False
        assert all(checkpoints.verify(name) is None for name in checkpoints.committed())
        assert checkpoints.newest()[0] in ({"step-000002", "step-000003"} if work == "save" else {"step-000002"})
        if not killed:
            return
    raise AssertionError("it never got through")


def test_retention_keeps_the_newest_and_every_stages_last(checkpoints: Checkpoints) -> None:
    for step in range(1, 8):
        save(checkpoints, step, done=step == 3)
    replace(checkpoints, "step-000002", "COMMITTED", None)
    checkpoints.prune(2)
    assert checkpoints.names() == ["step-000007", "step-000006", "step-000003"]


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    """From step 1,000,000 on a name has one digit more, and comes before the others in the alphabet."""
    checkpoints = Checkpoints(FolderStorage(tmp_path))
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(checkpoints, step)
    replace(checkpoints, "step-999999", "COMMITTED", None)  # torn, and older than the newest: it goes
    replace(checkpoints, "step-1000001", "COMMITTED", None)  # torn, and newer: it may be the one that is being written
    assert checkpoints.committed() == ["step-1000000", "step-999998"]
    assert checkpoints.newest()[0] == "step-1000000"
    assert checkpoints.prune(1) == ["step-999998"]
    assert checkpoints.names() == ["step-1000001", "step-1000000"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small file system")
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], check=True)
    try:
        checkpoints = Checkpoints(FolderStorage(tmp_path))
        first = save(checkpoints, 1, size=20_000)
        with pytest.raises(UserError, match=r"step-000002.*No space left on device"):
            save(checkpoints, 2, size=20_000)
        assert [path.name for path in tmp_path.iterdir()] == [first]
        assert checkpoints.newest() == (first, [])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_dropped_save_leaves_nothing_and_the_one_before(checkpoints: Checkpoints) -> None:
    first = save(checkpoints, 1)
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(SaveCancelled):
        checkpoints.save({"a": torch.zeros(10)}, Cursor(**{**CURSOR.__dict__, "step": 2}), given_up)
    assert checkpoints.names() == [first]
    assert checkpoints.newest() == (first, [])


def test_in_an_object_store_the_marker_comes_last_and_goes_first(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    moto.bucket("order")
    with Faults("127.0.0.1", moto.port) as faults:
        reach(monkeypatch, {**moto.environment, "AWS_ENDPOINT_URL": faults.url})
        checkpoints = Checkpoints(ObjectStorage("s3://order/run"))
        save(checkpoints, 1)
        save(checkpoints, 2)
        written = [one.path.rsplit("/", 2)[-2:] for one in faults.requests if one.method == "PUT"]
        assert [file for name, file in written if name == "step-000001"][-1] == "COMMITTED"
        assert written[-1] == ["step-000002", "COMMITTED"]
    deleted: list[str] = []
    before = Store.delete
    monkeypatch.setattr(Store, "delete", lambda store, name: (deleted.append(name), before(store, name)))
    reach(monkeypatch, moto.environment)
    checkpoints = Checkpoints(ObjectStorage("s3://order/run"))
    checkpoints.prune(1)
    assert deleted[0] == "step-000001/COMMITTED"
    assert len(deleted) == 4
    assert checkpoints.names() == ["step-000002"]
