"""Define the protocol of a run: the events, outcomes, causes and files by which its processes speak to each other.

    run.record(Event.SAVED, step=40)                             # a line of events.jsonl
    Outcome(OutcomeState.INTERRUPTED, Cause.SIGTERM, step=40)    # how a rank ended; with more, its end file:

    logs/end.rank-00003.json   {"state": "interrupted", "cause": "SIGTERM", "step": 40, "host": "node7",
                                "traceback": "", "culprits": []}

Ranks write, and slurm.requeue, `status`, `logs` and goodput read, often with newer code than that which wrote. So the
strings are a format: they never change, and new ones are only added.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypedDict


class Event(StrEnum):
    """The events of a run, by their names in events.jsonl. The comments name an event's own fields."""

    # The job
    SUBMITTED = "submitted"  # job, cluster, nodes, world, code, commit
    STARTING = "starting"  # job, world, nodes: rank 0 is there, its libraries are not loaded yet
    STARTED = "started"  # life, job, world, engine, nodes: all ranks have met; ledger: bytes of each life before
    REQUEUED = "requeued"  # job, cause
    EXCLUDED = "excluded"  # job, nodes: left out from now on
    GAVE_UP = "gave_up"  # job, after, why: the run does not come back, though its cause would allow it
    CODE_REPLACED = "code_replaced"  # was, now, kept: by `resume --current-code`
    ENGINE_CHANGED = "engine_changed"  # was, engine: by `resume --engine`
    ENVIRONMENT_CHANGED = "environment_changed"  # what

    # The training
    RESUMED = "resumed"  # checkpoint, step
    SKIPPED_CHECKPOINT = "skipped_checkpoint"  # name, fault
    TAKEN_OVER = "taken_over"  # origin, checkpoints, step, ...: the run begins where a stage of another ended
    NEIGHBOURS = "neighbours"  # stage, sha256: of the library that retrieval prompts with
    COMPILED = "compiled"  # stage, seconds
    FIRST_STEP = "first_step"  # stage, step, seconds: of a stage in this life
    SAVED = "saved"  # step, stage, bytes, seconds, blocked_seconds, ...
    EVALUATED = "evaluated"  # step, split, samples, seconds
    STAGE_FINISHED = "stage_finished"  # stage, number, step, loss
    QUARANTINED = "quarantined"  # key, fault: a sample that is left out
    STRAGGLER = "straggler"  # step, rank, host, ratio, ...: a rank is slower than the others
    PROFILED = "profiled"  # first, last, trace: a trace that was asked for
    STUCK = "stuck"  # cause, culprits, step: a rank has found out who hangs

    # How a life ends: in the words of the ranks,
    FINISHED = "finished"  # step
    INTERRUPTED = "interrupted"  # cause, step, committed_step, ...
    PRUNED = "pruned"  # the same: a sweep has ended its trial
    # and in those of slurm.requeue or `radhpc stop`: job, step, why
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    NODE_LOST = "node_lost"
    RANK_LOST = "rank_lost"
    HUNG = "hung"
    CRASHED = "crashed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    FAILED = "failed"


class RunState(StrEnum):
    """The state of a run, as `status` names it."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    # Of a sweep's trials alone:
    PRUNED = "pruned"
    MISSING = "missing"


class OutcomeState(StrEnum):
    """The ways in which a rank's life ends."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    PRUNED = "pruned"
    MISTAKE = "mistake"  # a UserError: something for the user to mend
    CRASHED = "crashed"
    HUNG = "hung"
    LOST_PEER = "lost_peer"
    SUPERSEDED = "superseded"  # leaves no end file: the run is not its own any more


class Cause(StrEnum):
    """The causes of an interruption. A mistake, a crash or a hang has the error's first line in its place."""

    NONE = ""
    SIGUSR2 = "SIGUSR2"
    SIGTERM = "SIGTERM"
    SIGINT = "SIGINT"
    STOP = "stop"  # `radhpc stop`
    SAVE_FAILED = "save failed"
    PRUNED = "pruned"  # no signal came, but a sweep has seen enough
    TAKEN_OUT = "taken out of the queue"  # `radhpc stop`, before the job began
    SUPERSEDED = "superseded"  # the run is another job's, or a later life's: nothing is written any more


@dataclass(frozen=True)
class Outcome:
    """The outcome of a rank's life: what radhpc.worker.run returns."""

    state: OutcomeState
    cause: str = Cause.NONE  # or the first line of an error; or who hangs, and where
    step: int = 0


# Every event that ends a life, and the state of a run whose last life ended so.
LIFE_ENDS: Mapping[Event, RunState] = {
    Event.FINISHED: RunState.FINISHED,
    Event.STOPPED: RunState.STOPPED,
    Event.CANCELLED: RunState.STOPPED,
    Event.FAILED: RunState.FAILED,
    Event.CRASHED: RunState.FAILED,
    Event.INTERRUPTED: RunState.STOPPED,
    Event.RANK_LOST: RunState.FAILED,
    Event.PREEMPTED: RunState.STOPPED,
    Event.TIME_LIMIT: RunState.STOPPED,
    Event.HUNG: RunState.FAILED,
    Event.NODE_LOST: RunState.FAILED,
    Event.GAVE_UP: RunState.FAILED,
    Event.PRUNED: RunState.STOPPED,
}
# The ends that slurm.requeue decides on when all ranks are gone: it records one for each life and counts lives by them;
# "interrupted" and "pruned" are the ranks' own words before it, "finished" needs no verdict, "gave_up" follows one.
REQUEUE_VERDICTS: tuple[Event, ...] = (
    Event.PREEMPTED,
    Event.TIME_LIMIT,
    Event.NODE_LOST,
    Event.RANK_LOST,
    Event.HUNG,
    Event.CRASHED,
    Event.CANCELLED,
    Event.STOPPED,
    Event.FAILED,
)
LIFE_BEGINNINGS = (Event.STARTING, Event.STARTED)
JOB_BEGINNINGS = (Event.SUBMITTED, *LIFE_BEGINNINGS, Event.REQUEUED)


# What those who read an event count on, beside its name and its time.
_NEEDED: Mapping[str, Mapping[str, type]] = {
    Event.SUBMITTED: {"job": str},
    Event.STARTED: {"world": int},
    Event.ENGINE_CHANGED: {"engine": str},
    Event.RESUMED: {"step": int},
    Event.TAKEN_OVER: {"step": int, "number": int},
    Event.SAVED: {"step": int},
    Event.STAGE_FINISHED: {"number": int},
    Event.QUARANTINED: {"key": str},
}


def is_whole(event: Mapping[str, Any]) -> bool:
    """Return whether a line of events.jsonl is an event that can be read: with a name, a time and what it must tell."""
    try:
        datetime.fromisoformat(event["time"])
        needed = _NEEDED.get(event["event"], {})
    except (KeyError, ValueError, TypeError):
        return False
    return isinstance(event["event"], str) and all(isinstance(event.get(key), kind) for key, kind in needed.items())


class CulpritRecord(TypedDict):
    """A rank that is to blame; its host is "" where it never started."""

    rank: int
    host: str


class RankEnd(TypedDict):
    """The end file of a rank: its outcome and where it happened. A killed rank leaves none."""

    state: OutcomeState
    cause: str
    step: int
    host: str
    traceback: str
    culprits: list[CulpritRecord]
    life: str  # of which job and start; "" outside SLURM


def is_whole_end(end: Mapping[str, Any]) -> bool:
    """Return whether an end file says what it must."""
    kinds: Mapping[str, type] = {"state": str, "cause": str, "step": int}
    return all(isinstance(end.get(key), kind) for key, kind in kinds.items())


END_FILES = "end.rank-*.json"  # in logs/


def end_file(rank: int) -> str:
    """Return the name of a rank's end file in logs/."""
    return END_FILES.replace("*", f"{rank:05d}")


def rank_of(end: Path) -> int:
    """Return the rank that an end file is of."""
    return int(end.stem.rpartition("-")[2])


# A trace of a living job: `radhpc profile` writes the request, rank 0 takes it and writes the trace beside it.
TRACE_FOLDER, TRACE_REQUEST = "profile", "request.json"
