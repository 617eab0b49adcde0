"""What the scheduler says of a job: by scontrol, which needs no accounting as submitit's sacct does."""

import os
import re
import subprocess
from typing import Any

from radhpc.errors import UserError
from radhpc.run_dir import RunDir, process_alive

_LIVING = {
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "CONFIGURING",
    "COMPLETING",
    "REQUEUED",
    "STOPPED",
    "SIGNALING",
    "RESIZING",
}


def show_job(job_id: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """The fields of `scontrol show job`, such as JobState and PreemptTime; empty where the job is forgotten."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job_id],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    return dict(re.findall(r"(\S+?)=(\S*)", done.stdout)) if done.returncode == 0 else {}


def state(job: dict[str, Any] | None) -> str:
    """PENDING, RUNNING, ... of a run's job; "" where it lives no longer."""
    if job is None:
        return ""
    if job["cluster"] == "slurm":
        found = show_job(job["id"], job.get("environment")).get("JobState", "")
        return found if found in _LIVING else ""
    return "RUNNING" if process_alive(job) else ""


def queue(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The state of each of this user's jobs in the queue, by id; an array's elements one by one, as 12_3."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **(environment or {})}
        )
    except FileNotFoundError as error:
        raise UserError("squeue is not found: ask from a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise UserError("squeue does not answer; try again") from error
    if done.returncode:
        raise UserError(f"squeue: {done.stderr.strip()}")
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())


def refuse_if_alive(run: RunDir) -> None:
    """Raise UserError while a job still works, or waits to work, on the run."""
    job = run.job()
    if found := state(job):
        assert job is not None
        raise UserError(
            f"{run.path}: in use by {job['cluster']} job {job['id']} ({found.lower()}); "
            f"end it with 'launch.py stop {run.path}'"
        )


def cancel(job: dict[str, Any]) -> None:
    """Take a job that has not started out of the queue."""
    subprocess.run(["scancel", job["id"]], check=False, env={**os.environ, **job.get("environment", {})})
