"""One run has one owner, whatever is said twice and whoever does not answer (promise 11)."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.ownership.lease import Life, take
from radhpc.core.run_folder import RunFolder
from tests.conftest import ROOT
from tests.slurm.test_preemption import LONGER, events, step
from tests.waiting import wait_for

pytestmark = [pytest.mark.box, pytest.mark.timeout(400)]

Launch = Callable[..., Any]
Slurm = Callable[..., str]
LONG = [*LONGER, "stages.scratch.steps=4000", "checkpoint.every=10"]

GHOST = """#!/bin/bash
for a; do [ "$a" = --test-only ] && exec /usr/bin/sbatch "$@"; done
/usr/bin/sbatch "$@" >/dev/null
echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
exit 1
"""
PARSABLE = """#!/bin/bash
for a; do [ "$a" = --test-only ] && exec /usr/bin/sbatch "$@"; done
exec /usr/bin/sbatch --parsable "$@"
"""
SILENT = """#!/bin/bash
for a; do [ "$a" = job ] && { echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2; exit 1; }; done
exec /usr/bin/scontrol "$@"
"""


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a script of one's own before one of SLURM's commands; an empty one takes it away again."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, script: str) -> None:
        (folder / name).unlink(missing_ok=True)
        if script:
            (folder / name).write_text(script)
            (folder / name).chmod(stat.S_IRWXU)

    return put


def together(*arguments: object, count: int = 3) -> list[tuple[int, str]]:
    """Say one command several times at once; return the exit status and the errors of each."""
    command = [sys.executable, ROOT / "launch.py", *map(str, arguments)]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    return [(process.wait(120), process.stderr.read()) for process in started if process.stderr is not None]


def jobs(slurm: Slurm) -> list[str]:
    return slurm("squeue", "--noheader", "--format=%i").split()


def test_a_submission_whose_answer_is_lost_has_one_job_and_no_question_without_answer_starts_another(
    launch: Launch, launch_json: Launch, slurm: Slurm, box_profile: Path, recipe_file: Path, tmp_path: Path,
    instead: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    instead("sbatch", GHOST)
    job = launch_json("train", recipe_file, *LONG, "--on", box_profile, "--run", run)["job"]
    assert jobs(slurm) == [job]
    instead("sbatch", "")
    wait_for(lambda: step(run) >= 3, 120)

    for status, errors in together("resume", run):
        assert (status, errors.count("\n")) == (2, 1), errors
        assert "in use by slurm job" in errors or "is at work here" in errors
    instead("scontrol", SILENT)
    assert "nobody says" in launch("resume", run, status=2).stderr
    monkeypatch.setenv("SQUEUE_PARTITION", "urgent")
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    assert launch_json("status", run)["state"] == "running"
    assert jobs(lambda *words: slurm(*words) if "SQUEUE_PARTITION" not in os.environ else "") == []
    monkeypatch.undo()

    # The lease goes to another job, as when two had been submitted by an older release.
    before = {path: path.read_bytes() for path in run.rglob("step-*/COMMITTED")}
    (run / "job.json").write_text(json.dumps({"cluster": "slurm", "id": "999", "submission": "theirs"}))
    take(run, Life("theirs", "999"))
    told = (run / "events.jsonl").read_bytes()
    wait_for(lambda: jobs(slurm) == [], 60)
    assert (run / "events.jsonl").read_bytes() == told, "the old job has written beside the new one"
    assert {path: path.read_bytes() for path in run.rglob("step-*/COMMITTED")}.items() >= before.items()
    assert list((run / "logs").glob("end.rank-*.json")) == []


def test_of_three_who_resume_at_once_one_does_and_a_stop_without_answer_is_noted(
    launch: Launch, launch_json: Launch, slurm: Slurm, box_profile: Path, recipe_file: Path, tmp_path: Path,
    instead: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    instead("sbatch", PARSABLE)
    monkeypatch.setenv("SBATCH_PARTITION", "no-such-partition")
    done = launch("train", recipe_file, *LONG, "--on", box_profile, "--run", run, "--json")
    assert "SBATCH_PARTITION=no-such-partition of this shell is not used" in done.stderr
    monkeypatch.delenv("SBATCH_PARTITION")
    instead("sbatch", "")
    wait_for(lambda: bool(events(run, "started")), 120)
    instead("scontrol", SILENT)
    assert "the request to stop is noted" in launch("stop", run, status=2).stderr
    instead("scontrol", "")
    wait_for(lambda: jobs(slurm) == [], 60)
    assert launch_json("status", run)["state"] == "stopped"

    answers = together("resume", run)
    assert sorted(status for status, _ in answers) == [0, 2, 2], answers
    (job,) = jobs(slurm)
    assert RunFolder(run).job()["id"] == job  # type: ignore[index]
    wait_for(lambda: len(events(run, "started")) == 2, 120)
    slurm("scontrol", "requeuehold", "State=SpecialExit", job)
    wait_for(lambda: "SPECIAL_EXIT" in slurm("squeue", "--noheader", "--format=%T", f"--jobs={job}"), 60)
    assert "in use by slurm job" in launch("resume", run, status=2).stderr
    launch("stop", run)
    wait_for(lambda: jobs(slurm) == [], 60)
    time.sleep(0.1)
    assert launch_json("status", run, "--audit")["overlaps"] == []
