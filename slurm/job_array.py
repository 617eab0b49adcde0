"""Run independent calls as one job array: each element is one process on one node, and comes back after a preemption.

    array = submit(profile, folder, "build", function, [first, second, ...])       # function(first), ...
    array.alive(), array.cancel()

A newer array from the same folder takes the place of one that a killed command has left in the queue.
"""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from radhpc.core.errors import UserError
from radhpc.core.files import write_atomically
from radhpc.core.run_folder import RunFolder
from slurm import container, frozen_code, precheck, scheduler
from slurm.profile import Profile
from slurm.submission import Submission
from slurm.submit import profile_environment, rank_python, setup_lines, site_parameters

OWNER = "array"  # file in the folder: the id of the array that works for it


@dataclass(frozen=True)
class JobArray:
    """A job array in the queue."""

    id: str
    environment: dict[str, str]

    def alive(self) -> bool:
        """Return whether any element runs, or waits to run; also while the scheduler does not answer."""
        done = self._call("squeue", "--noheader", "--array", f"--jobs={self.id}", "--format=%i")
        if done.returncode:
            return "Invalid job id" not in done.stderr
        return bool(done.stdout.strip())

    def cancel(self) -> None:
        """End all elements."""
        self._call("scancel", self.id)

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=scheduler.clean_environment(self.environment)
        )


def submit(
    profile: Profile, folder: Path, name: str, function: Callable[[Any], Any], arguments: Sequence[Any]
) -> JobArray:
    """Submit one call per argument. Raises UserError where the site refuses."""
    if profile.cluster != "slurm":
        raise UserError(f"a job array needs a profile of cluster 'slurm', not '{profile.cluster}'")
    owner, submission = folder / OWNER, Submission(profile)
    if owner.exists():
        _cancel_left(owner.read_text().strip(), profile.environment)
    frozen = folder / f"code-{frozen_code.current()}"  # by its hash: elements of an older array may still import theirs
    frozen_code.freeze(frozen)
    binds = [f"{folder}:{folder}"]
    parameters = {
        **site_parameters(profile),
        "job_name": name,
        "nodes": 1,
        "ntasks_per_node": 1,
        "array_parallelism": len(arguments),
        "additional_parameters": {"requeue": True, **profile.sbatch, "comment": submission.comment},
        "srun_args": [*container.srun_options(profile, binds, folder, frozen), *profile.srun],
        "setup": [submission.export, *setup_lines(profile, frozen)],
    }
    one = profile.model_copy(update={"nodes": 1, "tasks_per_node": 1})  # of each element
    precheck.refuse(RunFolder(folder), one, parameters, len(arguments))
    write_atomically(owner, scheduler.comment(submission.token).encode(), 0o600)
    with profile_environment(profile):
        try:
            executor = submitit.SlurmExecutor(folder / "logs", python=rank_python(profile, folder, binds))
        except RuntimeError as error:
            raise UserError("srun is not found: submit from a login node of the cluster") from error
        executor.update_parameters(**parameters)
        jobs = submission.send(lambda: executor.map_array(function, arguments))
    array = JobArray(str(jobs[0].job_id).split("_")[0], profile.environment)
    write_atomically(owner, array.id.encode(), 0o600)
    return array


def _cancel_left(owner: str, environment: dict[str, str]) -> None:
    """Cancel the array that a killed command has left: by its id, or where it never learnt that, by its token."""
    submission = owner.removeprefix(scheduler.comment(""))
    job = {"id": owner} if submission == owner else {"id": "", "submission": submission}
    scheduler.cancel({**job, "environment": environment})
