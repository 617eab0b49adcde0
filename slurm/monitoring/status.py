"""Tell where runs stand, and why: from their folders and one look at each cluster's queue.

status(RunFolder.open("runs/padchest-1"))          # the keys of `radhpc status --json`
look = Statuses([RunFolder.open(path) for path in paths])
look.now()                                      # of all of them, in their order; again a second later, cheaply
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from radhpc.core import formats
from radhpc.core.errors import first_line
from radhpc.core.files import read_json, read_record, write_atomically
from radhpc.core.protocol import JOB_BEGINNINGS, LIFE_BEGINNINGS, LIFE_ENDS, Event, RunState
from radhpc.core.run_folder import RunFolder, by_step
from slurm import scheduler
from slurm.monitoring import goodput, logs, pending_reasons
from slurm.monitoring.goodput import Life, TimeAccount
from slurm.scheduler import QueueEntry

# Causes that are named even where there were none.
_RESTARTS = (
    Event.PREEMPTED, Event.TIME_LIMIT, Event.NODE_LOST, Event.RANK_LOST, Event.HUNG, Event.CRASHED,
)  # fmt: skip
_THREADS = 16  # a shared file system answers slowly, and many questions at once
_QUIET = 120.0  # seconds without a step after which a running job is said to make none, or twenty of its steps
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
LIVING = (RunState.PENDING, RunState.RUNNING)


def status(run: RunFolder) -> dict[str, Any]:
    """Return where one run stands."""
    return Statuses([run]).now()[0]


@dataclass
class _Digest:
    """A summary of a run's events. They are append-only, so a file of the same size and time is the same file."""

    key: str = ""  # of events.jsonl: inode, size, time of change
    newest: str = ""  # the last event's name
    end: dict[str, Any] | None = None  # the last of LIFE_ENDS
    end_since: dict[str, Any] | None = None  # the same, since the job was last submitted, put back or started
    begun: str = ""  # the name of that beginning
    stepped: bool = False  # a step was made since then
    saved: dict[str, Any] | None = None  # the last save
    evaluation: dict[str, Any] | None = None
    books: TimeAccount = field(default_factory=TimeAccount)

    @classmethod
    def of(cls, key: str, run: RunFolder) -> "_Digest":
        events = run.events()
        names = [event["event"] for event in events]
        begun = max((n for n, name in enumerate(names) if name in JOB_BEGINNINGS), default=-1)

        def last(*names: Event, since: int = 0) -> dict[str, Any] | None:
            return next((event for event in reversed(events[since:]) if event["event"] in names), None)

        return cls(
            key=key,
            newest=names[-1] if names else "",
            end=last(*LIFE_ENDS),
            end_since=last(*LIFE_ENDS, since=begun + 1),
            begun=names[begun] if begun >= 0 else "",
            stepped=Event.FIRST_STEP in names[begun + 1 :],
            saved=last(Event.SAVED),
            evaluation=_newest_evaluation(run),
            books=goodput.account(events),
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "_Digest":
        books = data.pop("books")
        lives = [Life(**life) for life in books.pop("lives")]
        return cls(**data, books=TimeAccount(**books, lives=lives))


class _Digests:
    """The digests of all runs that this user has looked at, in one file beside other programs' caches.

    What it holds of a run counts while the run's events.jsonl is the same; a file that cannot be read or written, or is
    an older release's, is no error: then all events are read.
    """

    def __init__(self) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = home / "radhpc" / "status.json"
        self._stored: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            cache = read_json(self.path) or {}
            self._stored = cache["runs"] if cache.get("version") == formats.STATUS_CACHE else {}

    def get(self, run: RunFolder, key: str) -> _Digest | None:
        data = self._stored.get(str(run.path))
        if data is None or data["key"] != key:
            return None
        return _Digest.from_json({**data, "books": dict(data["books"])})

    def keep(self, reads: Sequence["_Read"]) -> None:
        """Add the digests of these runs; of others only those that are still there."""
        new = {str(read.run.path): read.digest for read in reads if read.digest.key}
        if all(self._stored.get(path, {}).get("key") == digest.key for path, digest in new.items()):
            return
        kept = {path: data for path, data in self._stored.items() if path not in new and os.path.exists(path)}
        data = {"version": formats.STATUS_CACHE, "runs": kept | {path: asdict(digest) for path, digest in new.items()}}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(data).encode(), 0o600)


@dataclass
class _Read:
    """The files of a run's folder as they were last read."""

    run: RunFolder
    job: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    digest: _Digest = field(default_factory=_Digest)

    problem: str = ""  # why the files cannot be understood

    def read_safely(self, digests: _Digests) -> None:
        """Read, and note what is wrong: one run's files are no reason to say nothing of the others."""
        try:
            self.read(digests)
            self.problem = ""
        except _DAMAGE as error:
            self.problem = first_line(error)

    def read(self, digests: _Digests) -> None:
        self.job, self.progress = self.run.job(), self.run.progress()
        try:
            about = os.stat(self.run.path / "events.jsonl")
        except FileNotFoundError:
            self.digest = _Digest()
            return
        key = f"{about.st_ino} {about.st_size} {about.st_mtime_ns}"
        if key != self.digest.key:
            self.digest = digests.get(self.run, key) or _Digest.of(key, self.run)


class Statuses:
    """The states of several runs. Reads the queue at most every `queue_seconds`, and a run's events when they grow."""

    def __init__(self, runs: Sequence[RunFolder], queue_seconds: float = 0.0) -> None:
        self.queue_seconds = queue_seconds
        self._read = [_Read(run) for run in runs]
        self._entries: list[QueueEntry] = []
        self._jobs: list[dict[str, Any] | None] = []
        self._asked = float("-inf")
        self._digests = _Digests()

    def now(self) -> list[dict[str, Any]]:
        """Return the keys of `radhpc status --json`, for each run."""
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda read: read.read_safely(self._digests), self._read))
        if self._asked == float("-inf"):  # once: whoever watches has all in memory
            self._digests.keep(self._read)
        jobs = [read.job for read in self._read]
        if jobs != self._jobs or time.monotonic() - self._asked >= self.queue_seconds:
            self._jobs, self._asked = jobs, time.monotonic()
            self._entries = scheduler.queue_entries([None if _has_finished(read) else read.job for read in self._read])
        now = time.time()
        return [
            _describe_safely(read, QueueEntry() if _has_finished(read) else entry, now)
            for read, entry in zip(self._read, self._entries, strict=True)
        ]


def _has_finished(read: _Read) -> bool:
    """Return whether the run is over for certain: no life follows, and the scheduler need not be asked."""
    return read.digest.newest == Event.FINISHED and "process_start" not in (read.job or {})


def _describe_safely(read: _Read, entry: QueueEntry, now: float) -> dict[str, Any]:
    problem = read.problem
    if not problem:
        try:
            return _describe(read, entry, now)
        except _DAMAGE as error:
            problem = first_line(error)
    blank = _describe(_Read(read.run), QueueEntry(), now)
    return {**blank, "state": RunState.FAILED, "why": f"its files cannot be understood: {problem}"}


def _describe(read: _Read, entry: QueueEntry, now: float) -> dict[str, Any]:
    progress = read.progress
    state, why = _state(read, entry)
    living = state == RunState.RUNNING
    books = read.digest.books.living(now) if living else read.digest.books
    lives = books.lives
    stepping = living and bool(lives) and progress.get("time", 0.0) >= lives[-1].started
    if living:
        why = why or _running(lives, progress, now)
    last, saved = read.digest.end, read.digest.saved
    world = progress.get("world") or (lives[-1].world if lives else None)
    rate = progress.get("samples_per_second", 0.0) if stepping else 0.0
    return {
        "run": str(read.run.path),
        "job": (read.job or {}).get("id"),
        "state": state,
        "cause": "" if last is None else last.get("cause") or last.get("why") or last["event"],
        "why": why,
        "starts_in_seconds": round(max(0.0, entry.start - now)) if state == RunState.PENDING and entry.start else None,
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
        "checkpoint_age_seconds": round(max(0.0, now - goodput.seconds(saved)), 1) if saved else None,
        "restarts": dict.fromkeys(_RESTARTS, 0) | books.restarts,
        "goodput": None if books.goodput is None else round(books.goodput, 3),
        "gpu_hours": round(books.used / 3600, 4),
        "gpu_hours_lost": round(books.lost / 3600, 4),
        "evaluation": read.digest.evaluation,
    }


def _state(read: _Read, entry: QueueEntry) -> tuple[RunState, str]:
    """Return the state of a run and the reason."""
    if entry.living:
        if entry.state in scheduler.WAITING:
            return RunState.PENDING, pending_reasons.words(entry.reason)
        return RunState.RUNNING, "" if entry.state in ("RUNNING", "COMPLETING") else f"SLURM says {entry.state.lower()}"
    if end := read.digest.end_since:
        state = LIFE_ENDS[end["event"]]
        why = end.get("why") or end.get("cause") or end["event"]
        return state, "" if state == RunState.FINISHED else str(why).replace("_", " ")
    started = read.digest.begun in LIFE_BEGINNINGS
    if entry.problem:
        return (
            RunState.RUNNING if started else RunState.PENDING,
            f"{entry.problem}; this is what the run's own files say",
        )
    if read.job is None:
        return RunState.FAILED, "never submitted"
    return _gone(read, entry, started, read.digest.stepped)


def _gone(read: _Read, entry: QueueEntry, started: bool, stepped: bool) -> tuple[RunState, str]:
    """Explain a job that is gone without an event that says why: the scheduler and the log may know."""
    assert read.job is not None
    if entry.state == "CANCELLED":
        return RunState.STOPPED, "cancelled while it ran" if started else "cancelled while it waited in the queue"
    when = "" if stepped else "before its first step: " if started else "before it started: "
    reasons = [pending_reasons.words(entry.reason)] if entry.reason not in ("", "None") else []
    reasons += [entry.status] if entry.status else []
    if words := logs.last_words(read.run, read.job["id"], first=not started):
        reasons.append(words)
    return RunState.FAILED, when + (", ".join(reasons) or "its job is gone without a word; see 'radhpc logs'")


def _running(lives: list[Life], progress: dict[str, Any], now: float) -> str:
    """Return what people should know about a running job; nothing while it makes steps."""
    if not lives or progress.get("time", 0.0) < lives[-1].started:
        return "starting up"
    quiet = now - progress["time"]
    if quiet > max(_QUIET, 20 * progress.get("step_seconds", 0.0)):
        return f"no step for {quiet / 60:.0f} min: evaluating, saving, or stuck"
    if slowest := progress.get("slowest"):
        return f"rank {slowest['rank']} on {slowest['host']} takes {slowest['ratio']:.1f} times as long as the others"
    return ""


def _eta(progress: dict[str, Any], now: float) -> float | None:
    """Return the seconds to the last step at the pace of the last minute."""
    if not progress.get("step_seconds") or not progress.get("steps"):
        return None
    left: float = (progress["steps"] - progress["step"]) * progress["step_seconds"] - (now - progress["time"])
    return round(max(0.0, left), 1)


def _newest_evaluation(run: RunFolder) -> dict[str, Any] | None:
    paths = sorted((run.path / "evaluation").glob("step-*/scores.json"), key=lambda path: by_step(path.parent))
    if not paths:
        return None
    scores = read_record(paths[-1])
    if scores is None:
        return None
    return {"step": scores["step"], "split": scores["split"], **{n: s["value"] for n, s in scores["scores"].items()}}


def find_runs(paths: Sequence[Path] | None, strict: bool = True) -> list[RunFolder]:
    """Return the runs at these paths, and of a folder that is none (a sweep) those in it; by default all in runs/.

    Raises UserError for a path without any, if `strict`.
    """
    if not paths:
        paths, strict = sorted(Path("runs").glob("*/")), False
    return [run for path in paths for run in _runs_in(path) or ([RunFolder.open(path)] if strict else [])]


def _runs_in(path: Path) -> list[RunFolder]:
    recipes = [path / "recipe.yaml"] if (path / "recipe.yaml").exists() else []
    return [
        RunFolder(recipe.parent)
        for recipe in recipes or sorted([*path.glob("*/recipe.yaml"), *path.glob("trials/*/recipe.yaml")])
    ]
