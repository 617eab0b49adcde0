"""Shards that a SLURM array builds are those that this machine builds, whatever happens to the jobs on the way."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.build import BuildSettings, build
from tests.conftest import ROOT
from tests.shards.helpers import contents, records
from tests.waiting import wait_for

pytestmark = [pytest.mark.box, pytest.mark.heavy, pytest.mark.timeout(240)]
PHANTOMS = {"studies": "300", "size": "512"}  # large enough to be killed in the middle
SETTINGS = BuildSettings(workers=2, shard_samples=10, longest_side=128)
ARGUMENTS = ["studies=300", "size=512", "--shard-samples", "10", "--longest-side", "128", "--jobs", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("array") / "whole"
    build("phantom", None, str(out), PHANTOMS, SETTINGS)
    return contents(out)


def test_an_array_builds_the_same_bytes(
    launch_json: Callable[..., dict[str, Any]], box_profile: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    result = launch_json("build", "phantom", *ARGUMENTS, "--out", out, "--on", box_profile)
    assert (result["samples"], result["skipped"]) == (300, [])
    assert contents(out) == whole


def test_jobs_are_preempted_and_the_command_is_killed(
    launch_json: Callable[..., dict[str, Any]],
    box_profile: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    slurm: Callable[..., str],
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "launch.py", "build", "phantom", *ARGUMENTS, "--out", out, "--on", box_profile]
    log = tmp_path / "log"
    with log.open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
    train = lambda: [name for name in records(out) if name.startswith("train")]  # noqa: E731
    wait_for(lambda: len(train()) >= 2)
    array = (out / ".build" / "array").read_text()
    running = slurm("squeue", "--noheader", "--array", f"--jobs={array}", "--states=running", "--format=%i").split()
    slurm("scontrol", "requeue", running[0])  # what a preemption does
    wait_for(lambda: len(train()) >= 5 or process.poll() is not None)
    assert process.poll() is None, log.read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    kept = {name: (out / name.removesuffix(".json")).stat().st_mtime_ns for name in records(out)}
    launch_json("build", "phantom", *ARGUMENTS, "--out", out, "--on", box_profile)
    assert contents(out) == whole
    assert all((out / name.removesuffix(".json")).stat().st_mtime_ns == time for name, time in kept.items())
    wait_for(lambda: array not in slurm("squeue", "--noheader", "--format=%A"))


def test_what_a_job_cannot_do_is_one_line_here(
    launch: Callable[..., subprocess.CompletedProcess[str]], box_profile: Path, tmp_path: Path
) -> None:
    profile = box_profile.read_text().replace("partition: preemptible", "partition: nowhere")
    box_profile.write_text(profile)
    done = launch("build", "phantom", *ARGUMENTS, "--out", tmp_path / "out", "--on", box_profile, status=2)
    assert done.stderr.splitlines()[-1].startswith("error partition 'nowhere': no such partition")
