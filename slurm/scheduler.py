"""What the scheduler says of a job: by scontrol, which needs no accounting as submitit's sacct does."""

import contextlib
import os
import re
import subprocess
from datetime import datetime
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
    return _fields(_asked(["scontrol", "show", "job", "--oneliner", job_id], environment))


def hostnames(nodes: str) -> list[str]:
    """`box[1-2]` -> box1, box2."""
    return _asked(["scontrol", "show", "hostnames", nodes]).split() if nodes else []


def down(nodes: str) -> list[str]:
    """Those of `box[1-2]` that are down, or that the controller cannot reach (a star after the state)."""
    lines = (
        _asked(["sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N %T"]).splitlines() if nodes else []
    )
    return sorted({name for name, found in map(str.split, lines) if found.startswith("down") or found.endswith("*")})


def usable(partition: str) -> list[str]:
    """The nodes of a partition that jobs can run on, now or later."""
    lines = _asked(["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T"]).splitlines()
    return sorted({name for name, found in map(str.split, lines) if re.match(r"idle|mix|alloc|comp|plan", found)})


def restarted(node: str, since: datetime) -> bool:
    """Whether a node is down, or its slurmd was started after `since`."""
    fields = _fields(_asked(["scontrol", "show", "node", "--oneliner", node]))
    if fields.get("State", "").startswith("DOWN") or fields.get("State", "").endswith("*"):
        return True
    with contextlib.suppress(KeyError, ValueError):  # "None" for one that has never answered
        return datetime.fromisoformat(fields["SlurmdStartTime"]).astimezone() > since
    return False


def stay_away(job_id: str, nodes: str) -> bool:
    """Tell a job that waits, or is about to, which nodes not to run on; whether it was accepted."""
    done = subprocess.run(
        ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}"], capture_output=True, check=False
    )
    return done.returncode == 0


def _asked(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What one of SLURM's commands prints; nothing where it fails or is not there."""
    variables = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=variables)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def state(job: dict[str, Any] | None) -> str:
    """PENDING, RUNNING, ... of a run's job; "" where it lives no longer."""
    if job is None:
        return ""
    if job["cluster"] == "slurm":
        found = show_job(job["id"], job.get("environment")).get("JobState", "")
        return found if found in _LIVING else ""
    return "RUNNING" if process_alive(job) else ""


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
