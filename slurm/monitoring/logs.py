"""Show what the jobs of a run have printed, and of a failed one first the lines that matter.

submitit leaves two files for each job and rank in <run>/logs: JOB_RANK_log.out and JOB_RANK_log.err. All lives of a job
append to the same ones; `mark` writes a line into both where a life begins. What the batch script itself prints,
before the ranks start and when they are gone, stands in the files of rank 0.
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from radhpc.core.errors import UserError
from radhpc.core.protocol import JOB_BEGINNINGS, LIFE_BEGINNINGS, Event, OutcomeState
from radhpc.core.run_folder import RunFolder, now
from slurm import compat_submitit, scheduler

_TAIL = 32768  # bytes at the end of a file in which the last words are looked for
_MARK = re.compile(r"^slurm\.job: (\S+) rank \d+ ", re.MULTILINE)
# What tells of the end of a job rather than of its cause.
_ECHO = re.compile(
    r"srun: (Job step aborted|Terminating|launch/slurm)|slurmstepd.*CANCELLED"
    r"|srun: error: .*: tasks? .*(Exited|Killed|Terminated)|submitit (INFO|WARNING|ERROR)|slurm\.(requeue|job): "
)
_TELLING = re.compile(r"error|cannot|not found|no such|denied|killed|oom|fatal|exception", re.IGNORECASE)
_SCRIPT = re.compile(r"^\S*slurm_script: line \d+: ")
# The first of these is the cause, the others follow from it.
_CULPRITS = (OutcomeState.MISTAKE, OutcomeState.CRASHED, OutcomeState.HUNG, OutcomeState.LOST_PEER)


@dataclass(frozen=True)
class Log:
    """One file of a job."""

    path: Path
    job: str
    rank: int
    kind: str  # err or out


def mark(rank: int, host: str) -> None:
    """Called by each rank as it starts: from here on what it prints belongs to a new life."""
    for stream in (sys.stdout, sys.stderr):
        print(f"slurm.job: {now()} rank {rank} starts on {host}", file=stream, flush=True)


def files(run: RunFolder, job: str | None = None) -> list[Log]:
    """Return the files of a run's jobs, by age of the job, rank and kind."""
    logs = []
    for path in (run.path / "logs").glob("*_log.*"):
        parsed = compat_submitit.parse_log_name(path.name)
        if parsed and job in (None, parsed[0]):
            logs.append(Log(path, *parsed))
    order = {event["job"]: number for number, event in enumerate(run.events(Event.SUBMITTED))} if job is None else {}
    return sorted(logs, key=lambda log: (order.get(log.job, -1), log.job, log.rank, log.kind))


def show(run: RunFolder, console: Console, rank: int | None, life: int | None, follow: bool) -> None:
    """Print the files of rank 0 and the errors of all, or those of one rank, after the error that ended the run."""
    logs = _chosen(run, rank)
    if not logs:
        raise UserError(_no_logs(run, rank))
    window = None if life is None else _window(run, life)
    printed: dict[Path, int] = {}
    if not follow and (error := first_error(run)):
        for text in error:
            console.print(text, soft_wrap=True)
    for log in logs:
        printed[log.path] = _print(log, console, window)
    while follow:
        living = bool(scheduler.state(run.job()))
        try:
            for _ in range(10 if living else 1):
                for log in _chosen(run, rank):
                    printed[log.path] = _print_more(log, console, printed.get(log.path, 0))
                time.sleep(0.5 if living else 0)
        except KeyboardInterrupt:
            return
        follow = living


def _chosen(run: RunFolder, rank: int | None) -> list[Log]:
    return [log for log in files(run) if (log.rank == rank if rank is not None else log.rank == 0 or log.kind == "err")]


def _no_logs(run: RunFolder, rank: int | None) -> str:
    ranks = sorted({log.rank for log in files(run)})
    if ranks:
        return f"--rank {rank}: allowed are {ranks[0]} to {ranks[-1]}"
    job = run.job()
    if job is not None and job["cluster"] == "inline":
        return f"{run.path}: it ran in the process that started it, and printed there; no logs were kept"
    return f"{run.path}: no logs yet: no job of this run has started"


def _window(run: RunFolder, life: int) -> tuple[str, str]:
    """Return when a life began and ended, as the times of events: from its start until that of the next."""
    starts = run.events(Event.STARTED)
    if life > len(starts):
        raise UserError(
            f"--life {life}: allowed are 1 to {len(starts)}" if starts else f"--life {life}: none has begun"
        )
    return starts[life - 1]["time"], starts[life]["time"] if life < len(starts) else "9"


def _print(log: Log, console: Console, window: tuple[str, str] | None) -> int:
    """Print a file, or the part of it that belongs to a life; returns how many bytes it has."""
    data = log.path.read_bytes()
    text = data.decode(errors="replace")
    if window is not None:
        text = _life(text, *window)
    if text.strip():
        console.print(Text(f"── {log.path.name}", style="bold cyan"))
        console.print(Text(text.rstrip("\n")), soft_wrap=True)
    return len(data)


def _life(text: str, start: str, end: str) -> str:
    """Return what lies between the last mark before a life's "started" and the last mark before the next one's."""
    marks = [(match[1], match.start()) for match in _MARK.finditer(text)]
    begins = [place for at, place in marks if at <= start]
    ends = [place for at, place in marks if start < at <= end]
    return text[begins[-1] if begins else 0 : ends[-1] if ends and end != "9" else None] if begins else ""


def _print_more(log: Log, console: Console, done: int) -> int:
    with log.path.open("rb") as file:
        file.seek(done)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]  # a line that is being written waits for its end
    for line in whole.decode(errors="replace").splitlines():
        console.print(Text(line if log.rank == 0 else f"rank {log.rank}: {line}"), soft_wrap=True)
    return done + len(whole)


# The error that matters


def first_error(run: RunFolder) -> list[Text]:
    """Return who failed first in a failed run, how, and the traceback. Empty for a run that did not fail."""
    last = run.events(
        *JOB_BEGINNINGS, Event.FINISHED, Event.STOPPED, Event.CANCELLED, Event.PREEMPTED, Event.TIME_LIMIT
    )
    if last and last[-1]["event"] not in (Event.SUBMITTED, *LIFE_BEGINNINGS):
        return []
    end = culprit(run)
    job = run.job()
    if end is None:
        words = (
            ""
            if job is None or scheduler.state(job)
            else last_words(run, job["id"], first=last[-1]["event"] == Event.SUBMITTED if last else True)
        )
        return [Text(words, style="bold red")] if words else []
    title = Text(f"rank {end['rank']} on {end['host']}: {end['cause']}", style="bold red")
    return [title, Text(end["traceback"])] if end.get("traceback") else [title]


def culprit(run: RunFolder) -> dict[str, Any] | None:
    """Return the end file of the rank that ended the newest life by an error; its peers' errors follow from its own."""
    starts = run.events(Event.STARTED)
    ends = []
    for rank, end in run.ends().items():
        if end["state"] in _CULPRITS and (not starts or rank < starts[-1]["world"]):
            written = run.end_path(rank).stat().st_mtime
            ends.append((_CULPRITS.index(end["state"]), written, {**end, "rank": rank}))
    return min(ends, key=lambda one: one[:2])[2] if ends else None


def last_words(run: RunFolder, job: str, first: bool) -> str:
    """Return the line of a job's logs that says best why it died, or "".

    `first`: the first one that names an error, as what follows follows from it. Otherwise the last one: a job that had
    started has earlier errors and lives in the same files.
    """
    for kind in ("err", "out"):
        for log in files(run, job):
            if log.kind == kind and (line := _telling(tail(log.path), first)):
                return _SCRIPT.sub("", line)
    return ""


def tail(path: Path) -> list[str]:
    """Return the last lines of a file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[1:] if size > _TAIL else lines


def _telling(lines: list[str], first: bool) -> str:
    """Return the line that names an error: of a traceback its last one; else the last line at all."""
    telling = [line for line in lines if line.strip() and not _ECHO.search(line)]
    errors = [line.strip() for line in telling if _TELLING.search(line) and not line.startswith((" ", "Traceback"))]
    return (errors[0 if first else -1] if errors else telling[-1] if telling else "").strip()
