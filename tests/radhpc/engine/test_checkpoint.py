"""Commit or nothing: a checkpoint that is torn, damaged or half deleted does not count, and never blocks."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from radhpc.core.errors import UserError
from radhpc.engine.checkpoint import Checkpoints, Cursor, SaveCancelled, _serialised
from radhpc.storage.checkpoint_storage import Bucket, Folder
from radhpc.storage.store import Store
from tests.conftest import Moto, reach
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
        return Checkpoints(Folder(tmp_path))
    return Checkpoints(Bucket(request.getfixturevalue("s3")))


def content(checkpoints: Checkpoints, name: str, file: str) -> bytes:
    return b"".join(checkpoints.storage.pieces(name, file))


def replace(checkpoints: Checkpoints, name: str, file: str, data: bytes | None) -> None:
    """Damage a file from outside; None deletes it."""
    storage = checkpoints.storage
    store = Store(storage.path / name if isinstance(storage, Folder) else storage.where(name))
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
    if isinstance(checkpoints.storage, Folder):
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


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    """A process that saves without end is killed; whatever it left verifies or is skipped."""
    code = (
        "from tests.radhpc.engine.test_checkpoint import *\n"
        f"c = Checkpoints(Folder(Path({str(tmp_path)!r})))\n"
        "print('ready', flush=True)\n"
        "for step in range(1, 10**6): save(c, step, size=200_000); c.prune(2)\n"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.3 + random.random() * 0.3)
            process.kill()
        newest, _ = Checkpoints(Folder(tmp_path)).newest()
        assert newest is not None


def test_retention_keeps_the_newest_and_every_stages_last(checkpoints: Checkpoints) -> None:
    for step in range(1, 8):
        save(checkpoints, step, done=step == 3)
    replace(checkpoints, "step-000002", "COMMITTED", None)
    checkpoints.prune(2)
    assert checkpoints.names() == ["step-000007", "step-000006", "step-000003"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small file system")
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], check=True)
    try:
        checkpoints = Checkpoints(Folder(tmp_path))
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
        checkpoints = Checkpoints(Bucket("s3://order/run"))
        save(checkpoints, 1)
        save(checkpoints, 2)
        written = [one.path.rsplit("/", 2)[-2:] for one in faults.requests if one.method == "PUT"]
        assert [file for name, file in written if name == "step-000001"][-1] == "COMMITTED"
        assert written[-1] == ["step-000002", "COMMITTED"]
    deleted: list[str] = []
    before = Store.delete
    monkeypatch.setattr(Store, "delete", lambda store, name: (deleted.append(name), before(store, name)))
    reach(monkeypatch, moto.environment)
    checkpoints = Checkpoints(Bucket("s3://order/run"))
    checkpoints.prune(1)
    assert deleted[0] == "step-000001/COMMITTED"
    assert len(deleted) == 4
    assert checkpoints.names() == ["step-000002"]


def test_a_kill_in_an_upload_leaves_the_one_before(s3: str) -> None:
    """A process that saves without end to an object store is killed; what it left verifies or is skipped."""
    code = (
        "from tests.radhpc.engine.test_checkpoint import *\n"
        f"c = Checkpoints(Bucket({s3!r}))\n"
        "save(c, 1, size=9_000_000)\n"
        "print('ready', flush=True)\n"
        "for step in range(2, 10**6): save(c, step, size=9_000_000); c.prune(2)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.random())
        process.kill()
    newest, _ = Checkpoints(Bucket(s3)).newest()
    assert newest is not None
