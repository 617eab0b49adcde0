"""Where runs stand, and why: read from their folders and from one look at each cluster's queue.

status(RunDir.open("runs/padchest-1"))          # the keys of `launch.py status --json`
look = Statuses([RunDir.open(path) for path in paths])
look.now()                                      # of all of them, in their order; again a second later, cheaply
"""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radhpc.files import read_json
from radhpc.run_dir import RunDir
from slurm import goodput, logs, reasons, scheduler
from slurm.goodput import ENDS, Account as Books, Life
from slurm.scheduler import Found

_WAITING = {"PENDING", "REQUEUED", "CONFIGURING", "REQUEUE_HOLD", "SPECIAL_EXIT"}
# Causes that are named even where there were none.
_RESTARTS = ("preempted", "time_limit", "node_lost", "rank_lost", "hung", "crashed")
_THREADS = 16  # a shared file system answers slowly, and many questions at once
_QUIET = 120.0  # seconds without a step after which a running job is said to make none, or twenty of its steps
_BEGINNINGS = ("submitted", "starting", "started", "requeued")
LIVING = ("pending", "running")


def status(run: RunDir) -> dict[str, Any]:
    """Where one run stands."""
    return Statuses([run]).now()[0]


@dataclass
class _Read:
    """What was read of a run's folder. Events are append-only, so a file of the same size is the same file."""

    run: RunDir
    job: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    size: int = -1
    evaluation: dict[str, Any] | None = None
    books: Books | None = None  # of these events, for a run that does not live

    def read(self) -> None:
        self.job, self.progress = self.run.job(), self.run.progress()
        try:
            size = os.stat(self.run.path / "events.jsonl").st_size
        except FileNotFoundError:
            size = 0
        if size != self.size:
            self.size, self.events = size, _events(self.run)
            self.books = None
            self.evaluation = _newest_evaluation(self.run)


class Statuses:
    """Where several runs stand. Looks at the queue at most every so many seconds, at a run's events when they grow."""

    def __init__(self, runs: Sequence[RunDir], queue_seconds: float = 0.0) -> None:
        self.queue_seconds = queue_seconds
        self._read = [_Read(run) for run in runs]
        self._found: list[Found] = []
        self._jobs: list[dict[str, Any] | None] = []
        self._asked = float("-inf")

    def now(self) -> list[dict[str, Any]]:
        """The keys of `launch.py status --json`, for each run."""
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(_Read.read, self._read))
        jobs = [read.job for read in self._read]
        if jobs != self._jobs or time.monotonic() - self._asked >= self.queue_seconds:
            self._jobs, self._asked = jobs, time.monotonic()
            self._found = scheduler.states([None if _has_finished(read) else read.job for read in self._read])
        now = time.time()
        return [
            _describe(read, Found() if _has_finished(read) else found, now)
            for read, found in zip(self._read, self._found, strict=True)
        ]


def _has_finished(read: _Read) -> bool:
    """The scheduler need not be asked: after this event no life follows."""
    return bool(read.events) and read.events[-1]["event"] == "finished" and "process_start" not in (read.job or {})


def _describe(read: _Read, found: Found, now: float) -> dict[str, Any]:
    events, progress = read.events, read.progress
    state, why = _state(read, found)
    living = state == "running"
    books = read.books = (None if living else read.books) or goodput.account(events, now if living else None)
    lives = books.lives
    stepping = living and bool(lives) and progress.get("time", 0.0) >= lives[-1].started
    if living:
        why = why or _running(lives, progress, now)
    ends = [event for event in events if event["event"] in ENDS]
    last = ends[-1] if ends else None
    saved = next((event for event in reversed(events) if event["event"] == "saved"), None)
    world = progress.get("world") or (lives[-1].world if lives else None)
    rate = progress.get("samples_per_second", 0.0) if stepping else 0.0
    return {
        "run": str(read.run.path),
        "job": (read.job or {}).get("id"),
        "state": state,
        "cause": "" if last is None else last.get("cause") or last.get("why") or last["event"],
        "why": why,
        "starts_in_seconds": round(max(0.0, found.start - now)) if state == "pending" and found.start else None,
        "stage": progress.get("stage"),
        "step": progress.get("step", 0),
        "steps": progress.get("steps"),
        "loss": progress.get("loss"),
        "samples_per_second": rate,
        "samples_per_second_per_rank": round(rate / world, 3) if world else 0.0,
        "world": world,
        "device": progress.get("device"),
        "data_wait": progress.get("data_wait") if stepping else None,
        "eta_seconds": _eta(progress, now) if stepping else None,
        "checkpoint_step": saved["step"] if saved else None,
        "checkpoint_age_seconds": round(now - goodput.seconds(saved), 1) if saved else None,
        "restarts": dict.fromkeys(_RESTARTS, 0) | books.restarts,
        "goodput": None if books.goodput is None else round(books.goodput, 3),
        "gpu_hours": round(books.used / 3600, 4),
        "gpu_hours_lost": round(books.lost / 3600, 4),
        "evaluation": read.evaluation,
    }


def _state(read: _Read, found: Found) -> tuple[str, str]:
    """pending, running, finished, stopped or failed, and why."""
    if found.living:
        if found.state in _WAITING:
            return "pending", reasons.words(found.reason)
        return "running", "" if found.state in ("RUNNING", "COMPLETING") else f"SLURM says {found.state.lower()}"
    names = [event["event"] for event in read.events]
    begun = max((n for n, name in enumerate(names) if name in _BEGINNINGS), default=-1)
    ends = [event for event in read.events[begun + 1 :] if event["event"] in ENDS]
    if ends:
        state = ENDS[ends[-1]["event"]]
        why = ends[-1].get("why") or ends[-1].get("cause") or ends[-1]["event"]
        return state, "" if state == "finished" else str(why).replace("_", " ")
    started = begun >= 0 and names[begun] in ("starting", "started")
    if found.problem:
        return "running" if started else "pending", f"{found.problem}; this is what the run's own files say"
    if read.job is None:
        return "failed", "never submitted"
    return _gone(read, found, started, "first_step" in names[begun + 1 :])


def _gone(read: _Read, found: Found, started: bool, stepped: bool) -> tuple[str, str]:
    """The job is gone, and the run's events do not say why: the scheduler and the log may."""
    assert read.job is not None
    if found.state == "CANCELLED":
        return "stopped", "cancelled while it ran" if started else "cancelled while it waited in the queue"
    when = "" if stepped else "before its first step: " if started else "before it started: "
    said = [reasons.words(found.reason)] if found.reason not in ("", "None") else []
    said += [found.status] if found.status else []
    if words := logs.last_words(read.run, read.job["id"], first=not started):
        said.append(words)
    return "failed", when + (", ".join(said) or "its job is gone without a word; see 'launch.py logs'")


def _running(lives: list[Life], progress: dict[str, Any], now: float) -> str:
    """What a person should know of a job that runs: nothing while it makes steps."""
    if not lives or progress.get("time", 0.0) < lives[-1].started:
        return "starting up"
    quiet = now - progress["time"]
    if quiet > max(_QUIET, 20 * progress.get("step_seconds", 0.0)):
        return f"no step for {quiet / 60:.0f} min: evaluating, saving, or stuck"
    if slowest := progress.get("slowest"):
        return f"rank {slowest['rank']} on {slowest['host']} takes {slowest['ratio']:.1f} times as long as the others"
    return ""


def _eta(progress: dict[str, Any], now: float) -> float | None:
    """Seconds to the last step at the pace of the last minute."""
    if not progress.get("step_seconds") or not progress.get("steps"):
        return None
    left: float = (progress["steps"] - progress["step"]) * progress["step_seconds"] - (now - progress["time"])
    return round(max(0.0, left), 1)


def _events(run: RunDir) -> list[dict[str, Any]]:
    """All events, parsed in one go: there may be a thousand runs with hundreds of checkpoints each."""
    try:
        data = (run.path / "events.jsonl").read_text()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind("\n") + 1].split("\n")  # a last line that was cut by a crash is left out
    found: list[dict[str, Any]] = json.loads(f"[{','.join(filter(None, whole))}]")
    return found


def _newest_evaluation(run: RunDir) -> dict[str, Any] | None:
    found = sorted((run.path / "evaluation").glob("step-*/scores.json"))
    if not found:
        return None
    scores = read_json(found[-1])
    return {"step": scores["step"], "split": scores["split"], **{n: s["value"] for n, s in scores["scores"].items()}}


def find_runs(paths: Sequence[Path] | None) -> list[RunDir]:
    """The runs at these paths, and of a folder that is none (a sweep) those in it; by default all in runs/.

    Raises UserError for a path without any.
    """
    if not paths:
        return [run for path in sorted(Path("runs").glob("*/")) for run in _runs_in(path)]
    return [run for path in paths for run in _runs_in(path) or [RunDir.open(path)]]


def _runs_in(path: Path) -> list[RunDir]:
    found = [path / "recipe.yaml"] if (path / "recipe.yaml").exists() else []
    return [
        RunDir(recipe.parent)
        for recipe in found or sorted([*path.glob("*/recipe.yaml"), *path.glob("trials/*/recipe.yaml")])
    ]
