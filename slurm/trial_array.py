"""Run the trials of a sweep as jobs: the elements of one array on SLURM, one after the other elsewhere.

    submit(study, profile)       # all that are missing or failed, and none that runs, waits or is done

An element of the array is a job like any other: its ranks, its requeue. Before its ranks start, its batch script calls
slurm/trials.py, which draws the trial's parameters or finds them drawn.
"""

import json
import os
import shlex
import socket
import time
from pathlib import Path
from typing import Any

import submitit

from radhpc.core.errors import UserError, first_line
from radhpc.core.files import write_atomically
from radhpc.core.ownership.folder_lock import hold
from radhpc.core.ownership.lease import LOCK, SUBMISSION
from radhpc.core.protocol import Cause, Event, OutcomeState, RunState
from radhpc.core.recipe import Recipe
from radhpc.core.run_folder import RunFolder
from slurm import frozen_code, job as slurm_job, precheck, scheduler
from slurm.profile import Profile
from slurm.submission import NothingSubmitted, Submission
from slurm.submit import (
    host_python,
    profile_environment,
    slurm_parameters,
    submit as submit_run,
)
from slurm.sweep.definition import Sweep
from slurm.sweep.standing import live_jobs, live_states, submitted_jobs, trial_state
from slurm.sweep.study import SweepStudy

ENDED = 3  # exit status of `python -m slurm.trials` where there is nothing left to train
_ANY = "/the-run-folder-of-this-element"  # in the one batch script of all; no shell would quote it


def newest(runs: Path, name: str, sweep: Sweep, base: Recipe) -> Path | None:
    """Return the newest folder in `runs` of this very sweep: the command, called again, goes on with it."""
    folders = sorted((path.parent for path in runs.glob(f"sweep-{name}-*/sweep.yaml")), key=lambda path: path.name)
    return next((path for path in reversed(folders) if not SweepStudy(path).difference(sweep, base)), None)


def due(study: SweepStudy) -> list[int]:
    """Return the trials that need a job: those without one that never began, failed or were cancelled.

    Not those that `radhpc stop` has ended: a user's word.
    """
    living = live_states(study)
    states = {number: trial_state(study, number, living.get(number, ""))[0] for number in range(study.sweep.count)}
    return [
        number
        for number, state in states.items()
        if state in (RunState.MISSING, RunState.FAILED)
        or (state == RunState.STOPPED and not _stopped_by_user(study, number))
    ]


def submit(study: SweepStudy, profile: Profile) -> str | None:
    """Submit what is due to SLURM. Returns the array's id, None where nothing is due. Raises UserError."""
    with hold(study.path / LOCK, "sweep", 60):
        return _submit(study, profile)


def _submit(study: SweepStudy, profile: Profile) -> str | None:
    numbers = due(study)
    if not numbers:
        return None
    if profile.container is not None:
        raise UserError("container: a sweep's jobs start none; allowed is `python`, installed on the nodes")
    # A file of its own for each array: an older one may still wait, with other nodes.
    folder = study.path / "profiles"
    folder.mkdir(mode=0o700, exist_ok=True)
    frozen = folder / f"{len(list(folder.iterdir())):03d}.yaml"
    python = host_python(profile)
    submission = Submission(profile)
    parameters = _array_parameters(study, profile, python, numbers, frozen, submission)
    precheck.refuse(RunFolder(study.path), profile, parameters, len(numbers))
    write_atomically(frozen, profile.to_yaml(), 0o600)
    frozen_code.freeze(study.path / "code", same_python=profile.python is None)
    jobs_by_trial = submitted_jobs(study)
    intent = {**submission.owner, "host": socket.gethostname()}
    names = [study.run_path(number).name for number in numbers]
    _write_jobs(study, jobs_by_trial | dict.fromkeys(names, intent))
    with profile_environment(profile):
        try:
            executor = submitit.SlurmExecutor(study.path / "logs", python=python)
        except RuntimeError as error:
            raise UserError("srun is not found: submit from a login node of the cluster") from error
        executor.update_parameters(**parameters)
        paths = [str(study.run_path(number)) for number in numbers]
        try:
            jobs = submission.send(lambda: executor.map_array(slurm_job.main, paths))
        except NothingSubmitted:
            _write_jobs(study, jobs_by_trial)
            raise
    owners = {number: {**intent, "id": str(job.job_id)} for number, job in zip(numbers, jobs, strict=True)}
    _write_jobs(study, jobs_by_trial | dict(zip(names, owners.values(), strict=True)))
    for number, owner in owners.items():
        if (run := RunFolder(study.run_path(number))).recipe_path.exists():
            with run.lock("sweep"):
                take_ownership(run, owner, profile)
    return str(jobs[0].job_id).split("_")[0]


def _write_jobs(study: SweepStudy, jobs: dict[str, dict[str, Any]]) -> None:
    write_atomically(study.path / "jobs.json", json.dumps(jobs).encode(), 0o600)


def stop(study: SweepStudy) -> list[str]:
    """Cancel the jobs of all trials that wait or run: those save and end, and come back when the sweep is submitted
    again. Returns the jobs' ids. Raises NoAnswer, which names those that may go on.
    """
    unsure: list[str] = []
    with hold(study.path / LOCK, "radhpc stop", 60):
        jobs = live_jobs(study)
        for number, (job, _) in jobs.items():
            if job["cluster"] != "slurm":
                RunFolder(study.run_path(number)).request_stop()
                continue
            try:
                scheduler.cancel(job)
            except scheduler.NoAnswer as error:
                unsure.append(f"{job['id']} ({error})")
    if unsure:
        raise scheduler.NoAnswer(f"{study.path}: these jobs may go on: {', '.join(unsure)}; say it again")
    return [str(job["id"]) for job, _ in jobs.values()]


def run_here(study: SweepStudy, profile: Profile, say: Any) -> bool:
    """Run the trials that are due one after the other on this machine. Returns whether it was not interrupted."""
    for number in due(study):
        run = study.prepare(number)
        say(f"trial {run.path.name}")
        job = submit_run(run, profile)
        if profile.cluster == "inline":
            with profile_environment(profile):
                error = job.exception()
            if error is not None:
                say(f"trial {run.path.name} failed: {first_line(error)}")
            elif job.result().state == OutcomeState.INTERRUPTED:
                return False
        elif not _wait(run):
            return False
    return True


def _wait(run: RunFolder) -> bool:
    """Wait for a local job. Ctrl-C lets it save and end."""
    try:
        while scheduler.state(run.job()):
            time.sleep(0.5)
        return True
    except KeyboardInterrupt:
        run.request_stop()
        while scheduler.state(run.job()):
            time.sleep(0.5)
        return False


def _array_parameters(
    study: SweepStudy, profile: Profile, python: str, numbers: list[int], frozen: Path, submission: Submission
) -> dict[str, Any]:
    """Return what submitit puts into the batch script: that of one run, with the run as a variable of the shell."""
    parameters = slurm_parameters(RunFolder(_ANY), profile, python, study.path / "code", submission)
    for part in ("setup", "teardown"):
        parameters[part] = [line.replace(_ANY, '"$trial"') for line in parameters[part]]
    names = " ".join(study.run_path(number).name for number in numbers)
    folder = shlex.quote(str(study.path))
    parameters["setup"] = [
        f"trials=({names})",
        "number=${trials[${SLURM_ARRAY_TASK_ID:-0}]}",
        f'trial={folder}/trials/"$number"',
        *parameters["setup"],
        f"{python} -m slurm.trials {folder} $number {frozen.name}",
        f"case $? in 0) ;; {ENDED}) exit 0 ;; *) exit 1 ;; esac",
    ]
    return {**parameters, "job_name": study.path.name, "array_parallelism": study.sweep.concurrent}


def owner_record(job_id: str, profile: Profile) -> dict[str, Any]:
    """Return the owner that an element is, by its own account."""
    submission = os.environ.get(SUBMISSION, "")
    return {
        "cluster": "slurm", "id": job_id, "submission": submission, "host": socket.gethostname(),
        "environment": profile.environment,
    }  # fmt: skip


def take_ownership(run: RunFolder, owner: dict[str, Any], profile: Profile) -> None:
    """Make a job the owner of a run, once: a life that comes back is the owner already. Call it under its lock."""
    if (run.job() or {}).get("id") == owner["id"]:
        return
    run.clear_stop()
    write_atomically(run.path / "profile.yaml", profile.to_yaml(), 0o600)
    run.write_job(**owner)
    run.record(Event.SUBMITTED, job=owner["id"], cluster="slurm", nodes=profile.nodes, world=profile.world)


def _stopped_by_user(study: SweepStudy, number: int) -> bool:
    events = RunFolder(study.run_path(number)).events(
        Event.STOPPED, Event.CANCELLED, Event.INTERRUPTED, Event.SUBMITTED
    )
    return bool(events) and (events[-1]["event"] == Event.STOPPED or events[-1].get("cause") == Cause.STOP)
