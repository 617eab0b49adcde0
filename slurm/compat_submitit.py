"""Collect what radhpc takes from submitit that submitit does not promise to keep.

Nothing else in radhpc names these. Each function says what to do when a new submitit no longer has it, and
tests/slurm/test_compat_submitit.py says so first. The rest of radhpc uses submitit's public names: its executors, Job,
JobEnvironment and the errors of submitit.core.utils.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def batch_script(command: str, logs: Path, parameters: Mapping[str, Any], elements: int = 0) -> str:
    """Return the very batch script that submitit would hand to sbatch, for `sbatch --test-only`.

    `parameters`: what the executor's update_parameters takes; `elements`: of a job array, 0 for a job.
    Wraps submitit.slurm.slurm._make_sbatch_string. When it is gone: submitit writes the script to
    `JobPaths(folder).submission_file` while it submits; or leave the check to sbatch itself, which then refuses the
    real submission with the same words (make slurm.precheck._refused return no problem).
    """
    from submitit.slurm.slurm import _make_sbatch_string

    array = {"map_count": elements} if elements else {}
    return str(_make_sbatch_string(command, logs.absolute(), **{**parameters, **array}))


@contextlib.contextmanager
def already_submitted(job: str) -> Iterator[None]:
    """Let submitit take a job or an array that is in the queue for the one that it submits in here.

    Wraps SlurmExecutor._make_submission_command, whose output submitit reads the id from. When it is gone: cancel such
    a job instead (slurm/submission.py).
    """
    from submitit import SlurmExecutor

    make = SlurmExecutor._make_submission_command
    SlurmExecutor._make_submission_command = (  # type: ignore[method-assign]
        lambda self, submission_file_path: ["echo", f"Submitted batch job {job}"]
    )
    try:
        yield
    finally:
        SlurmExecutor._make_submission_command = make  # type: ignore[method-assign]


def in_job() -> bool:
    """Return whether submitit has started this process as a rank of a job.

    Wraps the variable SUBMITIT_EXECUTOR, which the batch script and the local controller set. When it is gone:
    submitit.JobEnvironment() raises RuntimeError outside a job; but inside an interactive `salloc` it might not.
    """
    return "SUBMITIT_EXECUTOR" in os.environ


def log_name(job: str, rank: int, stream: str) -> str:
    """Return the name of the file to which a rank's output goes; `stream`: out or err.

    Wraps the pattern of submitit.core.utils.JobPaths. When it has changed: change it here and in `parse_log_name`,
    where names of the old pattern must go on to be read, because old run folders have them.
    """
    return f"{job}_{rank}_log.{stream}"


def parse_log_name(name: str) -> tuple[str, int, str] | None:
    """Return job, rank and stream of a log's name as `log_name` makes it; None for the name of another file."""
    match = re.fullmatch(r"(\d+(?:_\d+)?)_(\d+)_log\.(out|err)", name)
    return (match[1], int(match[2]), match[3]) if match else None


def remove_partial_results(logs: Path, job: str = "") -> None:
    """Delete results that killed ranks of a job left half written, of all jobs by default.

    submitit refuses to write a rank's result where one of these is left, so that a life after a kill would end in an
    error. Wraps the ending `.save_tmp` of submitit.core.utils.temporary_save_path. When it has changed: change it
    here; when submitit deletes them by itself: drop the function.
    """
    for path in logs.glob(f"{job}_*.save_tmp" if job else "*.save_tmp"):
        path.unlink()
