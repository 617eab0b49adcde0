"""Ask the scheduler about a job: by scontrol, which needs no accounting as submitit's sacct does.

A question has three answers: the job lives, it is gone, or nobody says (NoAnswer). The last is never taken for the
second: a busy controller or a login node without SLURM would otherwise let a second job onto a run.
"""

import contextlib
import os
import re
import socket
import subprocess
import tempfile
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
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
    "STOPPED",
    "SIGNALING",
    "RESIZING",
    "STAGE_OUT",
}
WAITING = frozenset(
    ("PENDING", "REQUEUED", "CONFIGURING", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
)
# Options of SLURM's commands that a shell may hold: they would filter what we ask, and change what we submit.
SHELL_OPTIONS = ("SQUEUE_", "SCONTROL_", "SINFO_", "SCANCEL_", "SBATCH_")
_GONE = "Invalid job id"


class NoAnswer(UserError):
    """Nobody says whether a job lives."""


_PATIENCE = 60  # seconds for one question
_PAUSES = (1, 2, 4, 8, 16)  # seconds between questions that must be answered


def show_job(job_id: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return the fields of `scontrol show job`, such as JobState and PreemptTime; empty where the job is forgotten.

    `job_id`: of an array's element as ARRAY_TASK, as the array's id alone means all of its elements. Raises NoAnswer.
    """
    text = ask(["scontrol", "show", "job", "--oneliner", job_id], environment, gone=_GONE)
    lines = text.strip().splitlines()
    if len(lines) > 1 and "_" not in job_id:  # an array that waits as a whole, or its elements: take the job's own line
        lines = [line for line in lines if line.startswith(f"JobId={job_id} ")] or lines[:1]
    return fields(lines[0]) if lines else {}


def own_job(name: str) -> dict[str, str]:
    """Return the fields of the job that this process is part of, however long the controller takes to answer.

    `name`: its id, of an array's element ARRAY_TASK. Raises RuntimeError where there is no answer: if the job's state
    is unknown, do not requeue it.
    """
    for pause in (*_PAUSES, 0):
        with contextlib.suppress(NoAnswer):
            if job := show_job(name):
                return job
        time.sleep(pause)
    raise RuntimeError(f"scontrol show job {name}: no answer")


def find(submission: str, environment: dict[str, str] | None = None) -> list[str]:
    """Return the ids of the jobs in the queue, arrays as one, whose comment has the token of a submission.

    Raises NoAnswer.
    """
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--states=all", "--Format=ArrayJobID:|,Comment:|"]
    rows = [line.split("|") for line in ask(command, environment).splitlines() if line.count("|") >= 2]
    return sorted({row[0].strip() for row in rows if comment(submission) in row[1].split()})


def comment(submission: str) -> str:
    """Return the word in a job's comment by which `find` knows it."""
    return f"radhpc:{submission}"


def requeue(name: str) -> str:
    """Put a running job back into the queue; a controller that is away may come back. Returns "" or the refusal."""
    for pause in (*_PAUSES, 0):
        done = subprocess.run(
            ["scontrol", "requeue", name], capture_output=True, text=True, check=False, env=clean_environment()
        )
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
    return sorted(
        {
            name
            for name, state in map(str.split, filter(str.strip, lines))
            if state.startswith("down") or state.endswith("*")
        }
    )


def usable_nodes(partition: str) -> list[str]:
    """Return the nodes of a partition that jobs can run on, now or later."""
    lines = _output(["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T"]).splitlines()
    return sorted(
        {
            name
            for name, state in map(str.split, filter(str.strip, lines))
            if re.match(r"idle|mix|alloc|comp|plan", state)
        }
    )


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
        ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}"],
        capture_output=True,
        check=False,
        env=clean_environment(),
    )
    return done.returncode == 0


def clean_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return the variables for one of SLURM's commands: this process's without the options of its shell, and more."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(SHELL_OPTIONS)
    } | (environment or {})  # fmt: skip


def ask(command: list[str], environment: dict[str, str] | None = None, gone: str | None = None) -> str:
    """Return what one of SLURM's commands prints; nothing where it fails with the message `gone`. Raises NoAnswer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False, env=clean_environment(environment)
        )
    except FileNotFoundError:
        raise NoAnswer(f"{command[0]} is not found: look from a login node of its cluster") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"the scheduler does not answer within {_PATIENCE} s ({command[0]}); try again") from None
    if done.returncode == 0:
        return done.stdout
    if gone is not None and gone in done.stderr:
        return ""
    message = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise NoAnswer(f"the scheduler does not answer: {command[0]}: {message}; try again")


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Return what one of SLURM's commands prints; nothing where it fails or is missing."""
    try:
        return ask(command, environment)
    except NoAnswer:
        return ""


def fields(line: str) -> dict[str, str]:
    """Parse what scontrol writes as KEY=VALUE in one line."""
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def state(job: dict[str, Any] | None) -> str:
    """Return PENDING, RUNNING, ... of a run's job; "" where it lives no longer. Raises NoAnswer where nobody says."""
    if job is None:
        return ""
    if job["cluster"] != "slurm":
        if job.get("host") != socket.gethostname():
            raise NoAnswer(f"its ranks are on host {job.get('host')} and cannot be seen from here")
        return "RUNNING" if process_alive(job) else ""
    states = [show_job(name, job.get("environment")).get("JobState", "") for name in ids(job)]
    return next((shown for shown in states if shown in _LIVING), "")


def ids(job: dict[str, Any]) -> list[str]:
    """Return the ids of a run's job in SLURM. Raises NoAnswer.

    Where a submission was cut short and the id was never written down, its token in the jobs' comments tells.
    """
    if job["id"]:
        return [job["id"]]
    return find(job["submission"], job.get("environment")) if job.get("submission") else []


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
        if job is not None and job["cluster"] == "slurm" and job["id"]:
            clusters.setdefault(_variables(job), {})[job["id"]] = QueueEntry()
    for variables, entries in clusters.items():
        entries.update(_squeue(list(entries), dict(variables)))
    return [_entry(job, clusters) for job in jobs]


def _entry(job: dict[str, Any] | None, clusters: dict[frozenset[tuple[str, str]], dict[str, QueueEntry]]) -> QueueEntry:
    if job is None:
        return QueueEntry()
    if job["cluster"] == "slurm" and not job["id"]:
        try:
            return QueueEntry(state(job))
        except NoAnswer as error:
            return QueueEntry(problem=str(error))
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
            command, capture_output=True, text=True, timeout=_TIMEOUT, check=False, env=clean_environment(environment)
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
    """Raise UserError while a job still works, or waits to work, on the run, and while nobody says whether it does."""
    job = run.job()
    try:
        alive = state(job)
    except NoAnswer as error:
        assert job is not None
        if job["cluster"] == "slurm":
            raise NoAnswer(f"{run.path}: nobody says whether {_name(job)} still lives: {error}") from error
        if (silent := _silence(run)) > _SILENT:
            return
        raise NoAnswer(
            f"{run.path}: {_name(job)} gave a sign of life {silent:.0f} s ago: {error}; look there, or wait {_SILENT} s"
        ) from error
    if alive:
        assert job is not None
        raise UserError(f"{run.path}: in use by {_name(job)} ({alive.lower()}); end it with 'radhpc stop {run.path}'")


_SILENT = 600  # seconds without a heartbeat after which ranks on a host that cannot be seen count as gone


def _silence(run: RunFolder) -> float:
    """Return the seconds since a rank wrote its heartbeat, by the clock of the file server."""
    beats = [path.stat().st_mtime for path in (run.path / "logs").glob("heartbeat.rank-*.json")]
    with tempfile.NamedTemporaryFile(dir=run.path) as now:
        return os.stat(now.name).st_mtime - max(beats, default=0.0)


def _name(job: dict[str, Any]) -> str:
    return f"{job['cluster']} job {job['id'] or 'of a submission that was cut short'}"


def cancel(job: dict[str, Any]) -> None:
    """End a job, or take it out of the queue where it waits. Raises NoAnswer where that may not have happened."""
    for name in ids(job):
        ask(["scancel", name], job.get("environment"), gone=_GONE)
