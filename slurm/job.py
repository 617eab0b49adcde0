"""What every rank of a job starts with: the scheduler's variables become PyTorch's, then radhpc.worker takes over."""

import os
import socket
import sys
from typing import Any

import submitit

from radhpc.errors import UserError
from slurm.study import Trial


def main(run: str) -> Any:
    """Run one rank. Raises UserError inline; elsewhere it ends the process with status 2 after one line."""
    environment = submitit.JobEnvironment() if "SUBMITIT_EXECUTOR" in os.environ else None
    if environment is not None:
        os.environ.update(
            RANK=str(environment.global_rank),
            WORLD_SIZE=str(environment.num_tasks),
            LOCAL_RANK=str(environment.local_rank),
            LOCAL_WORLD_SIZE=str(max(1, environment.num_tasks // environment.num_nodes)),
            MASTER_ADDR=address(environment.hostnames[0]),
            MASTER_PORT=str(port(environment.raw_job_id)),
        )
    import radhpc.worker  # the one import of what needs torch, inside the job

    try:
        trial = Trial.of(run)
        outcome = radhpc.worker.run(run, trial)
        if trial is not None and os.environ.get("RANK", "0") == "0":
            trial.close()
        return outcome
    except UserError as error:
        if environment is None:
            raise
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def address(first_host: str) -> str:
    """Where rank 0 is reached: the first node's name, or where that does not resolve the address srun was called on."""
    try:
        socket.getaddrinfo(first_host, None)
        return first_host
    except OSError:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", first_host)


def port(job_id: str) -> int:
    """A port that two jobs on one node hardly share, below the range from which systems pick their own."""
    lives = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return 12000 + (int(job_id) * 7 + lives) % 20000
