"""Keep a run: all of it is files in its folder, which outlive every job that worked on it.

    recipe.yaml     the frozen recipe            checkpoints/   step-N/, see checkpoint.py
    events.jsonl    what happened, append-only   tensorboard/   event files
    job.json        the job that owns the run    logs/          output, heartbeats, stacks and ends by rank
    lease.json      the life that may write      lock           while a command or a start is at work
    progress.json   step, loss, rate             ledger/        keys of the samples trained on
    tokenizer/      where it was trained here    evaluation/    step-N/: reports, scores
    base.json       identity of the frozen base  adapter/       the newest stage's adapter, for PEFT
    neighbours-*.npz  training images, small     evaluation/step-N-SPLIT/job/  a run folder of `evaluate`'s own
    code/           what the jobs run            code-N/        what `resume --current-code` replaced
    index/          training studies by looks    profile/       traces of steps that were asked for

Only rank 0 writes, except to ledger/, logs/, code/ and the event of a hang. Only the owner may read it.
logs/reserve.* keep some room for the last records of a life that fills the disk.
"""

import json
import os
import re
import socket
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from radhpc.core.errors import UserError, nearest
from radhpc.core.files import (
    append_line,
    open_append,
    read_json,
    read_lines,
    read_record,
    write_atomically,
    write_with_reserve,
)
from radhpc.core.ownership.folder_lock import Lock, hold
from radhpc.core.ownership.lease import LOCK, Lease, life_name
from radhpc.core.process import started_at
from radhpc.core.protocol import (
    END_FILES,
    CulpritRecord,
    Event,
    Outcome,
    RankEnd,
    end_file,
    is_whole,
    is_whole_end,
    rank_of,
)
from radhpc.core.recipe import Recipe, load

EVALUATION = "evaluation.json"  # in the folder of a job that evaluates another run, see job.py

_NUMBER = (int, float)
# What those who read progress.json count on.
_PROGRESS: dict[str, type | tuple[type, ...]] = {
    "time": _NUMBER, "stage": str, "step": int, "steps": int, "loss": _NUMBER, "world": int, "slowest": dict,
    "samples_per_second": _NUMBER, "step_seconds": _NUMBER,
}  # fmt: skip
_RESERVE = 1 << 16  # bytes
Speaker = Literal["ranks", "decision"]
_SPEAKERS: tuple[Speaker, ...] = ("ranks", "decision")


class RunFolder:
    """The paths and small files of one run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.lease: Lease | None = None  # of the life that this process belongs to: nothing is written without it

    def lock(self, purpose: str, patience: float = 60.0) -> AbstractContextManager[Lock]:
        """Keep other commands, and the start of lives, from this run. Raises UserError where one is at work."""
        return hold(self.path / LOCK, purpose, patience)

    def check_lease(self) -> None:
        """Raise Superseded once another life has taken the run."""
        if self.lease is not None:
            self.lease.check()

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> "RunFolder":
        """Create the folder and freeze the recipe. Raises UserError if it already holds a run."""
        run = cls(path)
        if run.recipe_path.exists():
            raise UserError(f"{path}: a run is there already; go on with 'radhpc resume {path}' or name another folder")
        try:
            run.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(run.path.iterdir()):
                raise UserError(f"{path}: the folder is not empty, and no run; name another one")
            run.path.chmod(0o700)
            for name in ("checkpoints", "tensorboard", "logs", "ledger", "evaluation"):
                (run.path / name).mkdir()
            write_atomically(run.recipe_path, recipe.to_yaml().encode())
        except FileExistsError as error:
            raise UserError(f"{path}: another command makes a run there at this moment; name another folder") from error
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "RunFolder":
        """Open an existing run. Raises UserError if there is none."""
        run = cls(path)
        if not run.recipe_path.exists():
            siblings = [p.parent.name for p in run.path.parent.glob("*/recipe.yaml")]
            raise UserError(f"{path}: no run there (no recipe.yaml){nearest(run.path.name, siblings)}")
        return run

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def code(self) -> Path:
        """Return the folder of the code that its jobs run, with environment.json: origin and versions of libraries."""
        return self.path / "code"

    def recipe(self) -> Recipe:
        """Return the frozen recipe, under the engine that the run was last resumed with."""
        recipe, changed = load(self.recipe_path), self.events(Event.ENGINE_CHANGED)
        return recipe.under(changed[-1]["engine"], self.recipe_path) if changed else recipe

    def change_engine(self, name: str) -> None:
        """Let the next lives run under another engine."""
        was = self.recipe().engine
        if name != was:
            self.record(Event.ENGINE_CHANGED, was=was, engine=name)

    @property
    def evaluated_run(self) -> "RunFolder | None":
        """Return the run that this job evaluates, or None if this folder is a run's own."""
        task = read_json(self.path / EVALUATION)
        return None if task is None else RunFolder(task["run"])

    def folder(self, name: str) -> Path:
        """Return a subfolder, created if it is missing."""
        folder = self.path / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    # What happened

    def record(self, event: Event, **details: Any) -> None:
        """Append one line to events.jsonl: one write, so that lines of two processes never mix on a local disk.

        Raises ValueError for an event that the protocol does not have, Superseded where the run is another life's.
        """
        self.check_lease()
        line = json.dumps({"time": now(), "event": Event(event), **details}) + "\n"
        descriptor = open_append(self.path / "events.jsonl")
        try:
            append_line(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def reserve_space(self) -> None:
        """Reserve some of the disk for the last records of a life that fills it up. Raises OSError if it is full."""
        for speaker in _SPEAKERS:
            if not self.reserve_path(speaker).exists():
                # Random, as some file systems compress.
                write_atomically(self.reserve_path(speaker), os.urandom(_RESERVE), 0o600)

    def release_space(self) -> None:
        """Delete the reserve: nothing is left to be recorded."""
        for speaker in _SPEAKERS:
            self.reserve_path(speaker).unlink(missing_ok=True)

    def reserve_path(self, speaker: Speaker) -> Path:
        """Return the reserve for write_with_reserve: of the ranks, or of slurm.requeue, which decides after them."""
        return self.folder("logs") / f"reserve.{speaker}"

    def events(self, *names: Event) -> list[dict[str, Any]]:
        """Return the events so far, or those of some names, oldest first; lines that cannot be read are left out."""
        events = read_lines(self.path / "events.jsonl", is_whole)
        return [event for event in events if not names or event["event"] in names]

    @property
    def lives(self) -> int:
        """Return how many times a job has started on this run."""
        return len(self.events(Event.STARTED))

    # How ranks ended

    def end_path(self, rank: int) -> Path:
        """Return the path of a rank's end file."""
        return self.path / "logs" / end_file(rank)

    def end_paths(self) -> dict[int, Path]:
        """Return the end files that exist, by rank."""
        return {rank_of(path): path for path in sorted((self.path / "logs").glob(END_FILES))}

    def ends(self) -> dict[int, dict[str, Any]]:
        """Return what ranks have written on their way out, by rank; what cannot be read is left out."""
        ends = {rank: read_record(path) for rank, path in self.end_paths().items()}
        return {rank: {"host": "", **end} for rank, end in ends.items() if end is not None and is_whole_end(end)}

    def clear_ends(self, life: str = "") -> None:
        """Delete the end files of the lives before this one; of all by default."""
        ends = self.ends()
        for rank, path in self.end_paths().items():
            if not life or ends.get(rank, {}).get("life") != life:
                path.unlink(missing_ok=True)

    def record_end(self, rank: int, outcome: Outcome, trace: str = "", culprits: Sequence[CulpritRecord] = ()) -> None:
        """Write a rank's end file; nothing where the run is another life's.

        Raises OSError if the disk is full and the reserve of the ranks is used up.
        """
        if self.lease is not None and not self.lease.held:
            return
        end: RankEnd = {
            "state": outcome.state, "cause": outcome.cause, "step": outcome.step,
            "host": node_name(), "traceback": trace, "culprits": list(culprits), "life": life_name(),
        }  # fmt: skip
        self.folder("logs")
        write_with_reserve(
            self.reserve_path("ranks"), lambda: write_atomically(self.end_path(rank), json.dumps(end).encode(), 0o600)
        )

    # Who owns it

    def write_job(self, **job: Any) -> None:
        """Name the job that may work on this run: executor, id, host, pid."""
        write_atomically(self.path / "job.json", json.dumps(job).encode(), 0o600)

    def job(self) -> dict[str, Any] | None:
        """Return the job that may work on this run; None where it was never given to one.

        Where job.json cannot be read, the last submission that was recorded counts: a job may live.
        """
        path = self.path / "job.json"
        job = read_record(path)
        if job is not None and isinstance(job.get("cluster"), str) and isinstance(job.get("id"), str):
            return job
        submitted = self.events(Event.SUBMITTED) if path.exists() else []
        return {"cluster": submitted[-1].get("cluster", "slurm"), "id": submitted[-1]["job"]} if submitted else None

    # Where it stands

    def write_progress(self, **progress: Any) -> None:
        self.check_lease()
        write_atomically(self.path / "progress.json", json.dumps({"time": time.time(), **progress}).encode(), 0o600)

    def progress(self) -> dict[str, Any]:
        progress = read_record(self.path / "progress.json") or {}
        return {key: value for key, value in progress.items() if isinstance(value, _PROGRESS.get(key, object))}

    # A request to stop

    def request_stop(self) -> None:
        """Ask the running job to save at its next step and to end for good."""
        write_atomically(self.path / "stop", now().encode(), 0o600)

    def stop_requested(self) -> bool:
        return (self.path / "stop").exists()

    def clear_stop(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint (step-000430) or of an evaluation (step-000430-test), -1 without one.

    Compare steps, never names: from step 1,000,000 on a name has one digit more.
    """
    match = re.match(r"step-(\d+)", name)
    return int(match[1]) if match else -1


def by_step(path: Path) -> tuple[int, str]:
    """Return the sorting key of a folder that is named by a step: the step, then the name."""
    return step_of(path.name), path.name


def process_alive(job: dict[str, Any]) -> bool:
    """Return whether the process that job.json names still runs on this machine; another host's cannot be seen."""
    if job.get("host") != socket.gethostname() or not isinstance(job.get("pid"), int):
        return False
    start = started_at(job["pid"])
    return start is not None and job.get("process_start") in (None, start)


def node_name() -> str:
    """Return the scheduler's name of this machine, or else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
