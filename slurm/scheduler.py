"""Ask the scheduler about a job: by scontrol, which needs no accounting as submitit's sacct does."""

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from radhpc.core.errors import UserError
from radhpc.core.run_folder import RunFolder, process_alive

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

_PAUSES = (1, 2, 4, 8, 16)  # seconds between questions that must be answered


def show_job(job_id: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return the fields of `scontrol show job`, such as JobState and PreemptTime; empty where the job is forgotten."""
    return fields(_output(["scontrol", "show", "job", "--oneliner", job_id], environment))


def own_job(job_id: str) -> dict[str, str]:
    """Return the fields of the job that this process is part of, however long the controller takes to answer.

    Raises RuntimeError where it does not answer: if the job's state is unknown, do not requeue it.
    """
    for pause in (*_PAUSES, 0):
        if job := show_job(job_id):
            return job
        time.sleep(pause)
    raise RuntimeError(f"scontrol show job {job_id}: no answer")


def requeue(name: str) -> str:
    """Put a running job back into the queue; a controller that is away may come back. Returns "" or the refusal."""
    for pause in (*_PAUSES, 0):
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
        if not done.returncode:
            return ""
        time.sleep(pause)
    return done.stderr.strip()


def hostnames(nodes: str) -> list[str]:
    """Expand `node[1-2]` to node1, node2."""
    return _output(["scontrol", "show", "hostnames", nodes]).split() if nodes else []


def down_nodes(nodes: str) -> list[str]:
    """Return those of `node[1-2]` that are down, or that the controller cannot reach (a star after the state)."""
    lines = (
        _output(["sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N %T"]).splitlines() if nodes else []
    )
    return sorted({name for name, state in map(str.split, lines) if state.startswith("down") or state.endswith("*")})


def usable_nodes(partition: str) -> list[str]:
    """Return the nodes of a partition that jobs can run on, now or later."""
    lines = _output(["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T"]).splitlines()
    return sorted({name for name, state in map(str.split, lines) if re.match(r"idle|mix|alloc|comp|plan", state)})


def node_restarted(node: str, since: datetime) -> bool:
    """Return whether a node is down, or its slurmd was started after `since`."""
    shown = fields(_output(["scontrol", "show", "node", "--oneliner", node]))
    if shown.get("State", "").startswith("DOWN") or shown.get("State", "").endswith("*"):
        return True
    with contextlib.suppress(KeyError, ValueError):  # "None" for one that has never answered
        return datetime.fromisoformat(shown["SlurmdStartTime"]).astimezone() > since
    return False


def exclude_nodes(job_id: str, nodes: str) -> bool:
    """Tell a job that waits, or is about to, which nodes to avoid. Returns whether it was accepted."""
    done = subprocess.run(
        ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}"], capture_output=True, check=False
    )
    return done.returncode == 0


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Return what one of SLURM's commands prints; nothing where it fails or is missing."""
    variables = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=variables)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def fields(line: str) -> dict[str, str]:
    """Parse what scontrol writes as KEY=VALUE in one line."""
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def state(job: dict[str, Any] | None) -> str:
    """Return PENDING, RUNNING, ... of a run's job; "" where it lives no longer."""
    if job is None:
        return ""
    if job["cluster"] == "slurm":
        shown = show_job(job["id"], job.get("environment")).get("JobState", "")
        return shown if shown in _LIVING else ""
    return "RUNNING" if process_alive(job) else ""


@dataclass(frozen=True)
class QueueEntry:
    """A run's job as the queue shows it."""

    state: str = ""  # PENDING, RUNNING, ...; one that has ended stays for some minutes; "" where it is forgotten
    reason: str = ""  # SLURM's code of why it waits or has ended
    start: float | None = None  # when this life began, or of a pending job, is expected to
    status: str = ""  # how it ended: "exit 127", "signal 9"
    problem: str = ""  # why the job cannot be seen from here

    @property
    def living(self) -> bool:
        return self.state in _LIVING


def queue_entries(jobs: Sequence[dict[str, Any] | None]) -> list[QueueEntry]:
    """Return the entries of many jobs (what job.json holds), by one squeue for each cluster that they are on."""
    clusters: dict[frozenset[tuple[str, str]], dict[str, QueueEntry]] = {}
    for job in jobs:
        if job is not None and job["cluster"] == "slurm":
            clusters.setdefault(_variables(job), {})[job["id"]] = QueueEntry()
    for variables, entries in clusters.items():
        entries.update(_squeue(list(entries), dict(variables)))
    return [_entry(job, clusters) for job in jobs]


def _entry(job: dict[str, Any] | None, clusters: dict[frozenset[tuple[str, str]], dict[str, QueueEntry]]) -> QueueEntry:
    if job is None:
        return QueueEntry()
    if job["cluster"] == "slurm":
        return clusters[_variables(job)][job["id"]]
    if job.get("host") != socket.gethostname():
        return QueueEntry(problem=f"its ranks are on host {job.get('host')} and cannot be seen from here")
    return QueueEntry("RUNNING" if process_alive(job) else "")


def _variables(job: dict[str, Any]) -> frozenset[tuple[str, str]]:
    return frozenset(job.get("environment", {}).items())


_TIMEOUT = 15  # seconds; a busy controller may take some, and squeue itself tries for a minute
_FIELDS = ("JobArrayID", "State", "exit_code", "StartTime", "Reason")


def _squeue(ids: list[str], environment: dict[str, str]) -> dict[str, QueueEntry]:
    """Return the entries of squeue for these jobs, without those it has forgotten."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}"]
    command.append("--Format=" + ",".join(f"{field}:|" for field in _FIELDS))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, check=False, env={**os.environ, **environment}
        )
    except FileNotFoundError:
        return dict.fromkeys(ids, QueueEntry(problem="squeue is not found: look from a login node of its cluster"))
    except subprocess.TimeoutExpired:
        return dict.fromkeys(ids, QueueEntry(problem=f"the scheduler does not answer within {_TIMEOUT} s"))
    if done.returncode and "Invalid job id" not in done.stderr:
        lines = done.stderr.strip().splitlines()
        return dict.fromkeys(
            ids, QueueEntry(problem=f"the scheduler does not answer: {lines[-1] if lines else 'squeue'}")
        )
    rows = [line.split("|", len(_FIELDS) - 1) for line in done.stdout.splitlines() if line.count("|") >= len(_FIELDS)]
    return {
        job.strip(): QueueEntry(state, reason.rstrip("|"), _time(start), _status(code))
        for job, state, code, start, reason in rows
    }


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # N/A
        return None


def _status(code: str) -> str:
    """Explain a wait status, 32512, or as newer releases write it, 127:0."""
    exit_status, _, signal = code.partition(":")
    if not exit_status.isdigit():
        return ""
    number = int(exit_status) if signal else int(exit_status) >> 8
    killed = int(signal) if signal.isdigit() else int(exit_status) & 127
    return f"signal {killed}" if killed else f"exit {number}" if number else ""


def refuse_if_alive(run: RunFolder) -> None:
    """Raise UserError while a job still works, or waits to work, on the run."""
    job = run.job()
    if alive := state(job):
        assert job is not None
        raise UserError(
            f"{run.path}: in use by {job['cluster']} job {job['id']} ({alive.lower()}); "
            f"end it with 'radhpc stop {run.path}'"
        )


def cancel(job: dict[str, Any]) -> None:
    """Take a job that has not started out of the queue."""
    subprocess.run(["scancel", job["id"]], check=False, env={**os.environ, **job.get("environment", {})})
