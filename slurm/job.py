"""Start a rank of a job: the scheduler's variables become PyTorch's, then radhpc.worker takes over."""

import contextlib
import gc
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import submitit

from radhpc.core.errors import UserError
from radhpc.core.ownership.lease import EXIT_STATUS, Life, Superseded, life_name, take
from radhpc.core.protocol import Event
from radhpc.core.run_folder import RunFolder
from slurm import compat_submitit, requeue
from slurm.monitoring import logs
from slurm.sweep.trial import SweepTrial


def main(run: str) -> Any:
    """Run one rank. Raises UserError inline; elsewhere it ends the process with status 2 after one line."""
    try:
        inside = join_ranks(folder := RunFolder(run))
    except Superseded as superseded:
        print(superseded, file=sys.stderr, flush=True)
        raise SystemExit(EXIT_STATUS) from superseded  # with it srun ends the other ranks, too
    from radhpc.distributed.stop import Stop

    try:
        with Stop() as stop:  # what comes while PyTorch is imported must not meet submitit's handlers
            with without_garbage_collection():
                import radhpc.worker  # the one import of what needs torch, inside the job

            trial = SweepTrial.of(run)
            outcome = radhpc.worker.run(run, stop, trial, folder.lease)
            if trial is not None and os.environ.get("RANK", "0") == "0":
                trial.close()
            return outcome
    except UserError as error:
        if not inside:
            raise
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    finally:
        if inside:
            gc.freeze()


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import without garbage collection: what is imported here stays until the process ends and is never searched.

    PyTorch and transformers make half a million objects: without searching them a rank starts 10% sooner. The same
    search at the end of a process takes a second or more, which a preempted job waits for before it is requeued.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def probe(folder: str) -> None:
    """Run one rank of `doctor --probe`."""
    join_ranks()
    import radhpc.probe

    radhpc.probe.run(folder)


def join_ranks(run: RunFolder | None = None) -> bool:
    """Take the run's lease, set the variables by which PyTorch's ranks find each other, begin a life.

    Returns whether this is a job. Raises Superseded where the run is another job's.
    """
    environment = submitit.JobEnvironment() if compat_submitit.in_job() else None
    first = environment is None or environment.global_rank == 0
    if run is not None:
        owner = run.job()
        life = Life.here(owner, environment.job_id if environment is not None else "")
        if first and owner is not None:
            run.lease = take(run.path, life)
        else:
            life.refuse(run.path, owner)
    if environment is not None:
        logs.mark(environment.global_rank, socket.gethostname())
        if environment.global_rank == 0 and run is not None:
            _begin(run, environment)
        os.environ.update(
            RANK=str(environment.global_rank),
            WORLD_SIZE=str(environment.num_tasks),
            LOCAL_RANK=str(environment.local_rank),
            LOCAL_WORLD_SIZE=str(max(1, environment.num_tasks // environment.num_nodes)),
            MASTER_ADDR=master_address(environment.hostnames[0]),
            MASTER_PORT=str(master_port(environment.raw_job_id)),
        )
    return environment is not None


def _begin(run: RunFolder, environment: submitit.JobEnvironment) -> None:
    """Record that a life begins, long before "started", for which all ranks and their libraries must be there."""
    if life := life_name():
        run.clear_ends(life)
        requeue.record_unseen_end(run)
    nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
    run.record(Event.STARTING, job=environment.job_id, world=environment.num_tasks, nodes=nodes)


def master_address(first_host: str) -> str:
    """Return rank 0's address: the first node's name, or where that does not resolve the address of srun's call."""
    try:
        socket.getaddrinfo(first_host, None)
        return first_host
    except OSError:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", first_host)


def master_port(job_id: str) -> int:
    """Return a port that two jobs on one node hardly share, below the range from which systems pick their own."""
    lives = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return 12000 + (int(job_id) * 7 + lives) % 20000
