"""Submit a frozen run on a profile, through submitit's executors.

The pickle that submitit leaves for the job holds the run folder's path and nothing else, so a job that SLURM starts
again, days later, reads the run as it is then; and imports the code that was frozen into the run folder
(frozen_code.py).
"""

import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit

from radhpc.core.errors import UserError
from radhpc.core.files import write_atomically
from radhpc.core.ownership.lease import SUBMISSION
from radhpc.core.process import started_at
from radhpc.core.protocol import Event
from radhpc.core.run_folder import RunFolder
from slurm import container, frozen_code, job as slurm_job, precheck, scheduler
from slurm.profile import Profile
from slurm.submission import NothingSubmitted, Submission, ignored_shell_options, refusals_as_user_errors

log = logging.getLogger("radhpc")


def submit(
    run: RunFolder, profile: Profile, current_code: bool = False, prepare: Callable[[], None] = lambda: None
) -> submitit.Job[Any]:
    """Submit, and make the job the run's owner. An inline job runs when its result is requested.

    The job runs the code in the run folder, which is this process's where there is none yet, or where
    `current_code` is asked for. An inline job cannot but run this process's. `prepare` is called once the run is known
    to be free. Raises UserError where a job works on the run, or another command does.
    """
    with run.lock("submit"):
        scheduler.refuse_if_alive(run)
        prepare()
        return _submit(run, profile, current_code)


def _submit(run: RunFolder, profile: Profile, current_code: bool) -> submitit.Job[Any]:
    if profile.container is not None:
        container.check(profile.container)
    submission = Submission(profile)
    for name in ignored_shell_options() if profile.cluster == "slurm" else ():
        log.warning("%s=%s of this shell is not used: options of sbatch belong to the profile", name, os.environ[name])
    precheck.refuse(run, profile, slurm_parameters(run, profile, host_python(profile)))
    same_python = profile.python is None and profile.container is None
    if current_code and run.code.exists():
        was, is_now, kept = frozen_code.replace(run.code, same_python)
        run.record(Event.CODE_REPLACED, was=was, now=is_now, kept=kept)
    frozen = frozen_code.freeze(run.code, same_python)
    write_atomically(run.path / "profile.yaml", profile.to_yaml(), 0o600)
    if profile.cluster != "inline":
        frozen_code.check_profile(run.code, run.path / "profile.yaml")
    run.clear_stop()
    run.clear_ends()
    try:
        run.reserve_space()
    except OSError as error:
        raise UserError(f"{run.path}: {error.strerror}") from error
    before = run.job()
    owner = {**submission.owner, "host": socket.gethostname()}
    run.write_job(**owner)  # before the scheduler hears of it: a job without an id is looked for by its token
    try:
        with submission_environment(run, profile, submission), refusals_as_user_errors():
            job = submission.send(lambda: executor(run, profile, submission).submit(slurm_job.main, str(run.path)))
    except NothingSubmitted as refusal:
        run.write_job(**before) if before is not None else (run.path / "job.json").unlink()
        raise UserError(str(refusal)) from refusal
    pid = os.getpid() if profile.cluster == "inline" else int(job.job_id) if profile.cluster == "local" else None
    owner["id"] = str(job.job_id)
    if pid is not None:
        owner |= {"pid": pid, "process_start": started_at(pid) or "gone"}
    run.write_job(**owner)
    run.record(
        Event.SUBMITTED, job=str(job.job_id), cluster=profile.cluster, nodes=profile.nodes, world=profile.world,
        code=frozen["code"] if profile.cluster != "inline" else frozen_code.current(), commit=frozen["commit"],
    )  # fmt: skip
    return job


def executor(run: RunFolder, profile: Profile, submission: Submission | None = None) -> submitit.Executor:
    """Return the submitit executor that a profile describes."""
    folder = run.folder("logs")
    if profile.cluster == "inline":
        if profile.world > 1:
            raise UserError(f"an inline profile has one rank, not {profile.world}: use cluster 'local'")
        if profile.container is not None:
            raise UserError("an inline profile has no container, its job runs in this process: use cluster 'local'")
        return submitit.DebugExecutor(folder)
    python = rank_python(profile, run.path, container.required_binds(run) if profile.container else [])
    if profile.cluster == "local":
        if profile.container is not None and profile.container.pyxis:
            raise UserError("container.pyxis belongs to srun: a local profile takes container.apptainer")
        if profile.most_nodes > 1:
            raise UserError(f"a local profile has one node, not {profile.nodes}")
        local = submitit.LocalExecutor(folder, python=python)
        local.update_parameters(
            tasks_per_node=profile.tasks_per_node,
            gpus_per_node=profile.gpus_per_node or 0,
            timeout_min=profile.minutes,
            signal_delay_s=profile.signal_seconds,
        )
        return local
    try:
        slurm = submitit.SlurmExecutor(folder, python=python)
    except RuntimeError as error:
        raise UserError("srun is not found: submit from a login node of the cluster") from error
    slurm.update_parameters(**slurm_parameters(run, profile, host_python(profile), submission=submission))
    return slurm


def host_python(profile: Profile) -> str:
    """Return the shell words for Python in the batch script itself, outside any container."""
    return profile.python or shlex.quote(sys.executable)


def rank_python(profile: Profile, folder: Path, binds: list[str]) -> str:
    """Return the shell words for a rank's Python; `folder` and `binds` are for a container (slurm/container.py)."""
    return container.python_command(profile, binds, folder) if profile.container else host_python(profile)


def setup_lines(profile: Profile, frozen: Path) -> list[str]:
    """Return lines of any batch script of this profile: its own, then what makes a job import the frozen code."""
    inside = container.variables(profile.container, frozen)
    return [
        *profile.setup,
        frozen_code.exports(frozen),
        *(f"export {name}={shlex.quote(value)}" for name, value in inside.items()),
    ]


def slurm_parameters(
    run: RunFolder,
    profile: Profile,
    python: str,
    frozen: Path | None = None,
    submission: Submission | None = None,
) -> dict[str, Any]:
    """Return what submitit puts into the batch script.

    `python`: the shell words for slurm.requeue's Python, outside any container; `frozen`: the code that the job runs,
    the run's own by default; `submission`: whose token the job bears, none in a mere check.
    """
    frozen = frozen or run.code
    decide = f"{python} -m slurm.requeue {shlex.quote(str(run.path))} $status"
    binds = container.required_binds(run) if profile.container else []
    fixed: dict[str, Any] = {"ntasks_per_node": profile.tasks_per_node}
    elastic, more, tasks = _elastic(profile) if profile.least_nodes < profile.most_nodes else (fixed, {}, [])
    gpus: dict[str, Any] = {}
    if profile.gpus_per_node:
        by_gres = profile.gpu_request == "gres"
        gpus = {"gres": f"gpu:{profile.gpus_per_node}"} if by_gres else {"gpus_per_node": profile.gpus_per_node}
    return {
        **site_parameters(profile),
        **gpus,
        **({"exclusive": True} if profile.exclusive else {}),
        "job_name": run.path.name,
        "nodes": profile.most_nodes,
        **elastic,
        "additional_parameters": {
            **more,
            "requeue" if profile.requeue else "no-requeue": True,
            **profile.sbatch,
            **({"comment": submission.comment} if submission else {}),
        },
        "srun_args": [
            "--kill-on-bad-exit=1",  # no GPU waits for a dead peer
            *container.srun_options(profile, binds, run.path, frozen),
            *profile.srun,
        ],
        "setup": [
            # The batch shell outlives the ranks, so that slurm.requeue can decide what follows when all are gone.
            "trap : TERM USR2",
            "export RADHPC_JOB_STARTED=$(date +%s)",  # radhpc/distributed/stop.py
            *([submission.export] if submission else []),
            *setup_lines(profile, frozen),
            *tasks,
        ],
        # From here on a signal must not end the decision half way; where it fails nevertheless, the run would be lost.
        "teardown": [
            "status=$?; trap '' TERM USR2",
            f"{decide} || {{ sleep 3; {decide}; }}",
        ],
    }


def _elastic(profile: Profile) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return, for a range of nodes: parameters of submitit, options of sbatch, and lines of the batch script.

    SLURM gives as many nodes as the tasks need. Asked for tasks per node, it counts those of the fewest nodes and never
    gives more than these; asked for the tasks of the most nodes, it never gives fewer. So the job asks for the tasks of
    the most nodes and allows them to be overcommitted, which makes the range hold, and for the CPUs of a whole node,
    which are then counted once a node. srun starts the tasks of the nodes that it got, each with its own CPUs.
    """
    tasks, cpus = profile.tasks_per_node, profile.cpus_per_task or 1
    lines = [
        "unset SLURM_OVERCOMMIT",
        f"export SLURM_NTASKS_PER_NODE={tasks} SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * {tasks}))",
        f"export SLURM_NPROCS=$SLURM_NTASKS SLURM_CPUS_PER_TASK={cpus} SRUN_CPUS_PER_TASK={cpus}",
    ]
    # submitit multiplies with its own number of nodes; sbatch gets the range.
    return {"cpus_per_task": cpus * tasks}, {"nodes": profile.nodes, "ntasks": profile.world, "overcommit": True}, lines


def site_parameters(profile: Profile) -> dict[str, Any]:
    """Return what any job of this profile asks for, whatever it does."""
    requested = {
        "cpus_per_task": profile.cpus_per_task,
        "mem": f"{profile.memory_gb}GB" if profile.memory_gb else None,
        "time": profile.minutes,
        "signal_delay_s": profile.signal_seconds,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
    }
    return {name: value for name, value in requested.items() if value is not None}


@contextmanager
def detached_output(run: RunFolder) -> Iterator[None]:
    """Redirect the output of processes started in here to the run's logs: nobody waits for the end of a pipe they hold.

    Ctrl-C is hidden from submitit's controller, which would kill the ranks before they save.
    """
    log = os.open(run.folder("logs") / "controller.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    ours = os.dup(1), os.dup(2)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        for number, descriptor in zip((1, 2), ours, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(log)
        signal.signal(signal.SIGINT, before)


@contextmanager
def submission_environment(run: RunFolder, profile: Profile, submission: Submission | None = None) -> Iterator[None]:
    """Set what submission needs: the profile's variables, and for local ranks the code they import and their token."""
    if profile.cluster != "local":
        with profile_environment(profile):
            yield
        return
    inside = {**frozen_code.variables(run.code), **container.variables(profile.container, run.code)}
    if submission is not None:
        inside[SUBMISSION] = submission.token
    with profile_environment(profile, inside), detached_output(run):
        yield


@contextmanager
def profile_environment(profile: Profile, more: dict[str, str] | None = None) -> Iterator[None]:
    """Set the profile's variables, for submitit's own calls of sbatch and for the processes it starts.

    Options of SLURM's commands that this shell holds (SBATCH_PARTITION, SQUEUE_USERS, ...) do not reach them.
    """
    threads = profile.threads or profile.cpus_per_task
    limits = {
        "RADHPC_HANG_SECONDS": str(profile.hang_seconds),
        "RADHPC_HANG_SLOW_SECONDS": str(profile.hang_slow_seconds),
    }
    variables = limits | profile.environment | ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | (more or {})
    if profile.cluster == "slurm":  # elsewhere nobody kills after a signal
        variables |= {"RADHPC_GRACE_SECONDS": str(profile.grace_seconds)}
        variables |= {"RADHPC_SIGNAL_SECONDS": str(profile.signal_seconds)}
        variables |= {"RADHPC_LIMIT_SECONDS": str(profile.minutes * 60)}
    hidden = [name for name in os.environ if name.startswith(scheduler.SHELL_OPTIONS)]
    before = {name: os.environ.get(name) for name in [*variables, *hidden]}
    for name in hidden:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
