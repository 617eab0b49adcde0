"""What the jobs of a run have printed, and of a failed one the lines that matter first.

submitit leaves two files for each job and rank in <run>/logs: JOB_RANK_log.out and JOB_RANK_log.err. All lives of a job
append to the same ones. What the batch script itself prints, before the ranks start, stands in those of rank 0.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from radhpc.run_dir import RunDir

_TAIL = 32768  # bytes at the end of a file in which the last words are looked for
# What tells of the end of a job rather than of its cause.
_ECHO = re.compile(
    r"srun: (Job step aborted|Terminating|launch/slurm)|slurmstepd.*CANCELLED"
    r"|srun: error: .*: tasks? .*(Exited|Killed|Terminated)|submitit (INFO|WARNING)|slurm\.requeue: "
)
_TELLING = re.compile(r"error|cannot|not found|no such|denied|killed|oom|fatal|exception", re.IGNORECASE)


@dataclass(frozen=True)
class Log:
    """One file of a job."""

    path: Path
    job: str
    rank: int
    kind: str  # out or err


def files(run: RunDir, job: str | None = None) -> list[Log]:
    """The files of a run's jobs, by job and rank."""
    found = []
    for path in (run.path / "logs").glob("*_log.*"):
        if match := re.fullmatch(r"(\d+(?:_\d+)?)_(\d+)_log\.(out|err)", path.name):
            found.append(Log(path, match[1], int(match[2]), match[3]))
    return sorted((log for log in found if job in (None, log.job)), key=lambda log: (log.job, log.rank, log.kind))


def last_words(run: RunDir, job: str) -> str:
    """The line of a job's logs that says best why it died, or ""."""
    for kind in ("err", "out"):
        for log in files(run, job):
            if log.kind == kind and (line := _telling(tail(log.path))):
                return line
    return ""


def tail(path: Path) -> list[str]:
    """The last lines of a file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        text = file.read().decode(errors="replace")
    lines = text.splitlines()
    return lines[1:] if size > _TAIL else lines


def _telling(lines: list[str]) -> str:
    """The last line that names an error; else the last line at all."""
    said = [line.strip() for line in lines if line.strip() and not _ECHO.search(line)]
    errors = [line for line in said if _TELLING.search(line)]
    return (errors or said or [""])[-1]
