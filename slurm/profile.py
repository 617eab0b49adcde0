"""Where a job runs: a YAML file in slurm/profiles/, or anywhere else.

profile = load("local")          # slurm/profiles/local.yaml
profile = load("~/a100.yaml")    # a file of one's own
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from radhpc.errors import UserError, nearest
from radhpc.recipe import Section, read_yaml, validate

FOLDER = Path(__file__).parent / "profiles"


class Profile(Section):
    """One way to run a job: which scheduler, how many nodes and tasks, for how long."""

    cluster: Literal["inline", "local", "slurm"] = Field(
        description="inline: in this process; local: ranks on this machine; slurm: by sbatch and srun"
    )
    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1, description="ranks on each node: one per GPU")
    gpus_per_node: int | None = Field(None, ge=1, description="none: the job asks for no GPU and computes on CPUs")
    gpu_request: Literal["gpus_per_node", "gres"] = Field(
        "gpus_per_node", description="how the site wants GPUs asked for"
    )
    cpus_per_task: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1, description="OMP_NUM_THREADS of each rank; default: cpus_per_task")
    memory_gb: int | None = Field(None, ge=1, description="per node; none: the site's default")
    minutes: int = Field(60 * 24, ge=1, description="time limit of one life; a run may have many")
    signal_seconds: int = Field(
        120, ge=1, description="warning before the time limit (SIGUSR2); longer than a save takes"
    )
    grace_seconds: float = Field(
        30, gt=0, description="from SIGTERM to the kill: the partition's GraceTime, or the site's KillWait"
    )
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    exclusive: bool = False
    requeue: bool = Field(True, description="come back after a preemption, the time limit or a lost rank")
    retries: int = Field(
        3, ge=0, description="requeues after a lost rank (killed, out of memory) without a new checkpoint"
    )
    python: str | None = Field(
        None, description="how to start Python in the job, a container for instance; default: this one"
    )
    setup: tuple[str, ...] = Field((), description="lines of the batch script before the ranks start: modules, a venv")
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables for sbatch and the job; $NAME and ~ are expanded"
    )
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict, description="any other option of sbatch")
    srun: tuple[str, ...] = Field((), description="any other option of srun")

    @field_validator("environment")
    @classmethod
    def _expand(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: os.path.expanduser(os.path.expandvars(text)) for name, text in value.items()}

    @property
    def world(self) -> int:
        return self.nodes * self.tasks_per_node


def load(name: str) -> Profile:
    """Find a profile by its name or path. Raises UserError with the names there are."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        if name not in names:
            raise UserError(f"--on {name}: no such profile{nearest(name, names)}; there are {', '.join(names)}")
    return validate(Profile, read_yaml(path), path)
