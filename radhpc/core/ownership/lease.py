"""Hold a run's lease: which life may write to its folder.

    lease = take(run.path, run.job(), Life.here(run.job()))    # rank 0, first of all; or Superseded
    lease.check()                                                # before each save and each record; or Superseded

job.json names the submission that a run belongs to, and lease.json the life of that submission which works on it now:

    {"submission": "4fd0…", "restart": 2, "job": "4711", "token": "91aa…", "host": "node7", "time": "…"}

A life takes the lease under the folder's lock, the one that submit, resume and stop hold while they ask, submit and
write job.json. Who finds another submission in job.json, or a later life in lease.json, leaves before it writes: the
ghost of a submission that seemed to fail, a second `resume`, a node that SLURM gave up and that came back.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radhpc.core.files import read_record, write_atomically
from radhpc.core.ownership.folder_lock import hold
from radhpc.core.process import process_start

SUBMISSION = "RADHPC_SUBMISSION"  # variable of a job: the token of its submission, which job.json has, too
LOCK, LEASE = "lock", "lease.json"
EXIT_STATUS = 75  # of a rank that leaves because the run is not its own
_PATIENCE = 600.0  # seconds: a submission may wait for a busy scheduler


class Superseded(Exception):
    """The run belongs to another job or to a later life; nothing of it may be touched any more."""


@dataclass(frozen=True)
class Life:
    """One life of a job, as the scheduler's variables tell it."""

    submission: str
    job: str
    restart: int = 0  # how often SLURM has put the job back before

    @classmethod
    def here(cls, owner: Mapping[str, Any] | None, job: str = "") -> "Life":
        """Return this process's. `owner`: what job.json says, which an inline job takes from there; `job`: its id."""
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        submission = os.environ.get(SUBMISSION, "")
        if owner is not None and owner.get("pid") == os.getpid():
            here = owner.get("process_start") in (None, process_start(os.getpid()))
            submission = owner.get("submission", "") if here else submission
            job = owner.get("id", "") if here else job
        job = f"{array}_{task}" if array else job or os.environ.get("SLURM_JOB_ID", "")
        return cls(submission, job, int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    def owns(self, owner: Mapping[str, Any] | None) -> bool:
        """Return whether the run is this job's. One that no file names may work: an older release submitted it."""
        if owner is None:
            return True
        if self.submission and owner.get("submission"):
            return bool(self.submission == owner["submission"])
        return str(owner.get("id", "")) in ("", self.job)

    def refuse(self, folder: Path, owner: Mapping[str, Any] | None) -> None:
        """Raise Superseded where the run is another job's."""
        if not self.owns(owner):
            assert owner is not None
            raise Superseded(
                f"{folder}: belongs to job {owner.get('id') or 'that is being submitted'}, not to {self.job}"
            )


class Lease:
    """A lease that was taken: by this rank, or by rank 0 for all."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self.token = folder, token

    @property
    def held(self) -> bool:
        """Return whether no other life has taken the run. A file that cannot be read says nothing."""
        return bool(_holder(self.folder).get("token", self.token) == self.token)

    def check(self) -> None:
        """Raise Superseded once another life has taken the run."""
        holder = _holder(self.folder)
        if holder.get("token", self.token) != self.token:
            raise Superseded(
                f"{self.folder}: job {holder.get('job')}, life {holder.get('restart')}, has taken over the run"
            )


def take(folder: Path, life: Life) -> Lease:
    """Take the lease for a life. Raises Superseded where the run is another job's, or a later life has it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with hold(folder / LOCK, f"start of job {life.job}", _PATIENCE):
        owner = read_record(folder / "job.json")
        life.refuse(folder, owner)
        if later_life(folder, life):
            raise Superseded(f"{folder}: a later life of job {life.job} has the run")
        if owner is not None and not owner.get("id"):  # whoever submitted was killed before it could write this down
            write_atomically(folder / "job.json", json.dumps({**owner, "id": life.job}).encode(), 0o600)
        token = secrets.token_hex(8)
        record = {"submission": life.submission, "restart": life.restart, "job": life.job, "token": token}
        write_atomically(folder / LEASE, json.dumps(record).encode(), 0o600)
    return Lease(folder, token)


def life_name() -> str:
    """Return the name of this process's life for its end file, "" where no scheduler starts lives."""
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return f"{job}.{restart}" if job else ""


def later_life(folder: Path, life: Life) -> bool:
    """Return whether a later life of the same submission has the lease."""
    holder = _holder(folder)
    same = bool(holder.get("submission") == life.submission and holder.get("job") == life.job)
    restart = holder.get("restart")
    return same and isinstance(restart, int) and restart > life.restart


def _holder(folder: Path) -> dict[str, Any]:
    return read_record(folder / LEASE) or {}
