"""Read profiles, which say where a job runs: YAML files in slurm/profiles/, or anywhere else.

profile = load("local")          # slurm/profiles/local.yaml
profile = load("~/a100.yaml")    # a file of one's own
"""

import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from radhpc.core import resources
from radhpc.core.errors import UserError, nearest
from radhpc.core.recipe import Section, read_yaml, validate

FOLDER = resources.folder("slurm") / "profiles"


class Container(Section):
    """A container for the ranks: an image for Apptainer, or one for pyxis. The batch script stays outside."""

    apptainer: str | None = Field(None, description="path of a .sif")
    pyxis: str | None = Field(None, description="path of a .sqsh, or a name that enroot knows")
    binds: tuple[str, ...] = Field(
        (),
        description="what the job sees besides the run folder, local shards and weights: PATH, PATH:INSIDE or "
        "PATH:INSIDE:ro; $NAME and ~ are expanded",
    )
    python: str = Field("python3", description="inside the container")
    gpus: Literal["nv", "rocm"] = Field("nv", description="whose GPUs Apptainer shows where the job asks for some")
    command: str = Field("apptainer", description="how the site calls Apptainer: singularity, or a path")
    options: tuple[str, ...] = Field((), description="any other option of 'apptainer exec', or of srun with pyxis")

    @model_validator(mode="after")
    def _check(self) -> "Container":
        if (self.apptainer is None) == (self.pyxis is None):
            raise ValueError("give either 'apptainer' (a .sif) or 'pyxis' (a .sqsh)")
        return self

    @field_validator("apptainer", "pyxis")
    @classmethod
    def _expand_image(cls, value: str | None) -> str | None:
        return value and os.path.expanduser(os.path.expandvars(value))

    @field_validator("binds")
    @classmethod
    def _expand_binds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for bind in value:
            if "," in bind or not 1 <= len(bind.split(":")) <= 3:
                raise ValueError(f"'{bind}': allowed are PATH, PATH:INSIDE and PATH:INSIDE:ro, without commas")
        return tuple(os.path.expanduser(os.path.expandvars(bind)) for bind in value)


class Profile(Section):
    """One way to run a job: which scheduler, how many nodes and tasks, for how long."""

    cluster: Literal["inline", "local", "slurm"] = Field(
        description="inline: in this process; local: ranks on this machine; slurm: by sbatch and srun"
    )
    nodes: int | str = Field(
        1, description="a number, or a range such as 1-4: each life takes what there is, the training is the same"
    )
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
    requeue: bool = Field(True, description="come back by itself, as slurm/requeue.py says; false: never")
    retries: int = Field(
        3,
        ge=0,
        description="lives after a lost rank (killed, out of memory), a lost node or a hang, between checkpoints",
    )
    crash_retries: int = Field(3, ge=0, description="lives after a crash, each with a traceback that is new")
    lives_without_progress: int = Field(8, ge=1, description="lives in a row without a new checkpoint that end the run")
    node_losses: int = Field(2, ge=1, description="losses of a node, or hangs on it, after which it is left out")
    hang_seconds: int = Field(
        600, ge=0, description="a rank without progress for so long in a step hangs, and the job ends; 0: never"
    )
    hang_slow_seconds: int = Field(
        1800, ge=0, description="the same at start-up, in a stage's first step, while saving and scoring"
    )
    python: str | None = Field(
        None,
        description="how to start Python in the job; default: this one. With a container: slurm.requeue's, outside",
    )
    container: Container | None = Field(None, description="run the ranks in Apptainer or pyxis")
    setup: tuple[str, ...] = Field((), description="lines of the batch script before the ranks start: modules, a venv")
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables for sbatch and the job; $NAME and ~ are expanded"
    )
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict, description="any other option of sbatch")
    srun: tuple[str, ...] = Field((), description="any other option of srun")
    shared: bool = Field(
        False, description="the run folders' disk looks local here, but all nodes see it: this machine exports it"
    )

    @field_validator("nodes", mode="before")
    @classmethod
    def _check_nodes(cls, value: Any) -> int | str:
        match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", str(value)) if not isinstance(value, bool) else None
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError("allowed are a number from 1 on, or a range such as 1-4")
        return f"{int(match[1])}-{int(match[2])}" if match[2] and int(match[2]) > int(match[1]) else int(match[1])

    @field_validator("environment")
    @classmethod
    def _expand(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: os.path.expanduser(os.path.expandvars(text)) for name, text in value.items()}

    @property
    def least_nodes(self) -> int:
        return int(str(self.nodes).split("-")[0])

    @property
    def most_nodes(self) -> int:
        return int(str(self.nodes).split("-")[-1])

    @property
    def world(self) -> int:
        """Ranks at the most; a life on a range of nodes may have fewer, and its "started" event says how many."""
        return self.most_nodes * self.tasks_per_node

    def to_yaml(self) -> bytes:
        """Return a file that load() reads, without defaults, so that frozen code reads what a newer radhpc writes."""
        settings = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump({"cluster": self.cluster, **settings}).encode()


def load(name: str) -> Profile:
    """Find a profile by its name or path. Raises UserError with the names there are."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        if name not in names:
            raise UserError(f"--on {name}: no such profile{nearest(name, names)}; there are {', '.join(names)}")
    return validate(Profile, read_yaml(path), path)
