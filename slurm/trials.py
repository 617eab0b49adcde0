"""Prepare a trial of a sweep in its batch script, before its ranks start.

    python -m slurm.trials SWEEP NUMBER PROFILE

The path and the arguments never change: batch scripts that wait in a queue name them. Exit status 0: the ranks can
start; ENDED: there is nothing left to train; 2: a mistake, which is printed in one line.
"""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError
from radhpc.core.protocol import RunState
from slurm import compat_submitit, profile as profiles, scheduler
from slurm.sweep.standing import trial_state
from slurm.sweep.study import SweepStudy
from slurm.trial_array import ENDED, owner_record, take_ownership


def main(folder: str, number: int, frozen: str) -> int:
    """Prepare an element's trial. Returns 0, or ENDED where there is nothing left to train."""
    study = SweepStudy.open(folder)
    study.settle()
    run = study.prepare(number)
    if trial_state(study, number, "")[0] in (RunState.FINISHED, RunState.PRUNED):
        return ENDED
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job_id = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    profile = profiles.load(str(study.path / "profiles" / frozen))
    with run.lock(f"start of job {job_id}", 600):
        owner, ours = run.job(), owner_record(job_id, profile)
        same = owner is not None and (owner["id"] == job_id or owner.get("submission") == ours["submission"] != "")
        if owner is not None and not same and _lives(owner):
            raise UserError(f"{run.path}: in use by job {owner['id']}")
        take_ownership(run, ours, profile)
    compat_submitit.remove_partial_results(study.path / "logs", job_id)
    for rank in range(profile.world):
        for stream in ("out", "err"):
            name = compat_submitit.log_name(job_id, rank, stream)
            link = run.folder("logs") / name
            if not link.is_symlink():
                link.symlink_to(Path("../../../logs") / name)
    return 0


def _lives(owner: dict[str, Any]) -> bool:
    """Return whether another job works on the trial, however long the controller takes to say. Raises NoAnswer."""
    for pause in (1, 2, 4, 8, 16):
        with contextlib.suppress(scheduler.NoAnswer):
            return bool(scheduler.state(owner))
        time.sleep(pause)
    return bool(scheduler.state(owner))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)
