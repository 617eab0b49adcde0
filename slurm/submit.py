"""A frozen run and a profile to a job, through submitit's executors.

The pickle that submitit leaves for the job holds the run folder's path and nothing else, so a job that SLURM starts
again, days later, reads the run as it is then.
"""

import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import submitit
import yaml

from radhpc.errors import UserError, first_line
from radhpc.files import write_atomically
from radhpc.run_dir import RunDir, process_start
from slurm import job as slurm_job, scheduler
from slurm.profile import Profile

CHECKOUT = Path(__file__).resolve().parent.parent


def submit(run: RunDir, profile: Profile) -> submitit.Job[Any]:
    """Submit, and make the job the run's owner. An inline job runs when its outcome is asked for."""
    scheduler.refuse_if_alive(run)
    run.clear_stop()
    write_atomically(run.path / "profile.yaml", yaml.safe_dump(profile.model_dump(mode="json")).encode(), 0o600)
    with environment(profile), apart(run) if profile.cluster == "local" else nullcontext(), explain():
        job = executor(run, profile).submit(slurm_job.main, str(run.path))
    pid = os.getpid() if profile.cluster == "inline" else int(job.job_id) if profile.cluster == "local" else None
    owner: dict[str, Any] = {"cluster": profile.cluster, "id": str(job.job_id), "host": socket.gethostname()}
    if pid is not None:
        owner |= {"pid": pid, "process_start": process_start(pid)}
    run.write_job(**owner, environment=profile.environment)
    run.record("submitted", job=str(job.job_id), cluster=profile.cluster, nodes=profile.nodes, world=profile.world)
    return job


def executor(run: RunDir, profile: Profile) -> submitit.Executor:
    """The submitit executor that a profile describes."""
    folder = run.folder("logs")
    if profile.cluster == "inline":
        if profile.world > 1:
            raise UserError(f"an inline profile has one rank, not {profile.world}: use cluster 'local'")
        return submitit.DebugExecutor(folder)
    python = profile.python or shlex.quote(sys.executable)
    if profile.cluster == "local":
        if profile.nodes > 1:
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
    slurm.update_parameters(**slurm_parameters(run, profile, python))
    return slurm


def slurm_parameters(run: RunDir, profile: Profile, python: str) -> dict[str, Any]:
    """What submitit shall put into the batch script."""
    gpus: dict[str, Any] = {}
    if profile.gpus_per_node:
        by_gres = profile.gpu_request == "gres"
        gpus = {"gres": f"gpu:{profile.gpus_per_node}"} if by_gres else {"gpus_per_node": profile.gpus_per_node}
    return {
        **site_parameters(profile),
        **gpus,
        **({"exclusive": True} if profile.exclusive else {}),
        "job_name": run.path.name,
        "nodes": profile.nodes,
        "ntasks_per_node": profile.tasks_per_node,
        "additional_parameters": {"requeue" if profile.requeue else "no-requeue": True, **profile.sbatch},
        "srun_args": ["--kill-on-bad-exit=1", *profile.srun],  # no GPU waits for a dead peer
        "setup": [
            # The batch shell outlives the ranks, so that slurm.requeue can decide what follows when all are gone.
            "trap : TERM USR2",
            f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            *profile.setup,
        ],
        # From here on a signal must not end the decision half way.
        "teardown": ["status=$?; trap '' TERM USR2", f"{python} -m slurm.requeue {shlex.quote(str(run.path))} $status"],
    }


def site_parameters(profile: Profile) -> dict[str, Any]:
    """What any job of this profile asks for, whatever it does."""
    wanted = {
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
    return {name: value for name, value in wanted.items() if value is not None}


@contextmanager
def explain() -> Iterator[None]:
    """Turn a scheduler's refusal into one line."""
    try:
        yield
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, RuntimeError) as error:
        raise UserError(f"submission failed: {_reason(error)}") from error


@contextmanager
def apart(run: RunDir) -> Iterator[None]:
    """What the processes started in here inherit: their output goes to the run's logs, so that nobody waits for the end
    of a pipe that they hold; and Ctrl-C passes submitit's controller by, which would kill the ranks before they save.
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
def environment(profile: Profile) -> Iterator[None]:
    """The profile's variables, for submitit's own calls of sbatch and for the processes it starts."""
    threads = profile.threads or profile.cpus_per_task
    wanted = {**profile.environment, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    if profile.cluster == "slurm":  # elsewhere nobody kills after a signal
        wanted |= {"RADHPC_GRACE_SECONDS": str(profile.grace_seconds)}
        wanted |= {"RADHPC_SIGNAL_SECONDS": str(profile.signal_seconds)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _reason(error: Exception) -> str:
    """What sbatch said, without its own banner."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line.removeprefix("sbatch: error: ") for line in lines if line.startswith("sbatch: error: ")]
    return "; ".join(said) or first_line(error)
