"""A build that is killed, stopped or out of room leaves no half file, and goes on to the same bytes."""

import errno
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import psutil
import pytest

from radhpc.core.errors import UserError
from shards.build import BuildSettings, build
from shards.execution import writer
from shards.execution.output import WORK
from tests.shards.helpers import PHANTOM, ROOT, SMALL, contents, records
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(120)


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """Build phantoms in a process of its own, with two workers."""
    code = f"""
import signal, sys
from radhpc.core.errors import UserError
from shards.build import BuildSettings, build
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        settings = BuildSettings(workers=2, shard_samples=8)
        build("phantom", None, {str(out)!r}, {{"studies": "600", "size": "64"}}, settings)
    except UserError as error:
        sys.exit(f"UserError: {{error}}")
"""
    script = out.with_suffix(".py")
    script.write_text(code)
    return subprocess.Popen(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def test_a_build_killed_three_times_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    options, out = {"studies": "600", "size": "64"}, tmp_path / "killed"
    for finished in (3, 12, 30):  # while the test split is made, behind it, and in the middle of train
        process = start(out)
        wait_for(lambda: len(records(out)) >= finished)  # noqa: B023
        orphans = workers(process)
        process.kill()
        process.wait()
        assert orphans
        psutil.wait_procs(orphans, timeout=10)
        assert not any(orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE for orphan in orphans)
        assert not (out / "manifest.json").exists()
    kept = {name.removesuffix(".json"): (out / name.removesuffix(".json")).stat().st_ino for name in records(out)}
    (out / ".train-000000.tar.abc").write_bytes(b"what a killed writer leaves")
    progress: list[int] = []
    result = build("phantom", None, str(out), options, SMALL, lambda done, total: progress.append(done))
    assert progress[0] >= 30 * 4  # what was finished is not built again
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())
    build("phantom", None, str(tmp_path / "whole"), options, SMALL)
    assert contents(out) == contents(tmp_path / "whole")
    assert result.samples == 600


def test_a_killed_worker_is_one_line_and_no_hang(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    wait_for(lambda: len(records(tmp_path / "out")) >= 1 and workers(process))
    workers(process)[0].kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith(f"UserError: {tmp_path}/out: a worker process was killed")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_ctrl_c_ends_all_at_once(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    wait_for(lambda: len(records(tmp_path / "out")) >= 1)
    children = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in stderr
    psutil.wait_procs(children, timeout=10)
    left = [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert left == [WORK]


def test_two_builds_do_not_write_to_one_folder(tmp_path: Path) -> None:
    def intrude(done: int, total: int) -> None:
        if done == 20:
            with pytest.raises(UserError, match="another build is writing there"):
                build("phantom", None, str(tmp_path / "out"), PHANTOM, SMALL)

    assert build("phantom", None, str(tmp_path / "out"), PHANTOM, SMALL, intrude).samples == 60


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = os.fsync

    def full(descriptor: int) -> None:
        if "train-000002" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(UserError, match=f"{tmp_path}/out: no space left; finished shards are kept"):
        build("phantom", None, str(tmp_path / "out"), PHANTOM, SMALL)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    held_out = ["test-000000.tar", "validate-000000.tar"]  # they are made first
    assert names == [WORK, held_out[0], "train-000000.tar", "train-000001.tar", held_out[1]]
    monkeypatch.undo()
    assert build("phantom", None, str(tmp_path / "out"), PHANTOM, SMALL).samples == 60


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for workers in (1, 2):
            with pytest.raises(UserError, match="no space left"):
                build("phantom", None, str(disk / "out"), PHANTOM, BuildSettings(workers=workers, shard_samples=8))
            assert not (disk / "out" / "manifest.json").exists()
            tars = list((disk / "out").glob("*.tar"))
            assert tars
            for path in tars:
                with tarfile.open(path) as tar:
                    assert tar.getnames()
    finally:
        subprocess.run(["umount", disk], check=True)
