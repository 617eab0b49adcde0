"""Commit or nothing: a checkpoint that is torn, damaged or half deleted does not count, and never blocks."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from radhpc.checkpoint import Checkpoints, Cursor
from radhpc.errors import UserError
from radhpc.storage import Folder

CURSOR = Cursor(
    stage=0, step=0, stage_step=0, samples=0, stage_done=False, lineage=(), recipe="r", base="b", data=("d",), world=1,
    engine="fsdp",
)  # fmt: skip


def save(checkpoints: Checkpoints, step: int, done: bool = False, size: int = 100) -> str:
    tensors = {"a.weight": torch.full((size,), float(step)), "exp_avg/a.weight": torch.zeros(size)}
    cursor = Cursor(**{**CURSOR.__dict__, "step": step, "stage_step": step, "stage_done": done})
    return checkpoints.save(tensors, cursor)[0]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(Folder(tmp_path))


def test_what_is_saved_is_read(checkpoints: Checkpoints, tmp_path: Path) -> None:
    name = save(checkpoints, 7)
    assert checkpoints.newest() == (name, [])
    assert checkpoints.cursor(name).step == 7
    assert torch.equal(checkpoints.tensors(name, moments=True)["a.weight"], torch.full((100,), 7.0))
    assert list(checkpoints.tensors(name, moments=False)) == ["a.weight"]
    assert (tmp_path / name / "state.safetensors").stat().st_mode & 0o777 in (0o600, 0o640, 0o644)


@pytest.mark.parametrize("name", ["COMMITTED", "manifest.json", "cursor.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_one_is_skipped_by_name(checkpoints: Checkpoints, tmp_path: Path, name: str, damage: str) -> None:
    good, bad = save(checkpoints, 1), save(checkpoints, 2)
    file = tmp_path / bad / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-3])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    newest, skipped = checkpoints.newest()
    assert newest == good
    assert [name for name, _ in skipped] == ["step-000002"]
    save(checkpoints, 2)  # the step is reached again, and the torn one is in nobody's way
    assert checkpoints.newest()[0] == bad
    assert checkpoints.verify(bad) is None


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    """A process that saves without end is killed; whatever it left verifies or is skipped."""
    code = (
        "from tests.radhpc.test_checkpoint import *\n"
        f"c = Checkpoints(Folder(Path({str(tmp_path)!r})))\n"
        "print('ready', flush=True)\n"
        "for step in range(1, 10**6): save(c, step, size=200_000); c.prune(2)\n"
    )
    import random
    import sys
    import time

    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.3 + random.random() * 0.3)
            process.kill()
        newest, _ = Checkpoints(Folder(tmp_path)).newest()
        assert newest is not None


def test_retention_keeps_the_newest_and_every_stages_last(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in range(1, 8):
        save(checkpoints, step, done=step == 3)
    (tmp_path / "step-000002" / "COMMITTED").unlink()
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
