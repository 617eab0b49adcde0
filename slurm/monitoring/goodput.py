"""Account for a run's time by its events: steps that count, steps that were lost, start-up, saving, evaluation.

    ----|=====s=====s==x          |----=====s==      = a step that counts   s a checkpoint   x the life ends
        start-up       lost        start-up          the steps behind the last checkpoint are made again

A *life* is one start of a job on the run, from its first event ("starting": rank 0 is there; or "started": all ranks
have met) to its last word. Of a life whose end nobody recorded, time counts up to its last event. Rank-seconds are
seconds times the ranks of that life, so that lives of different sizes add up: GPU-seconds where each rank has a GPU.

*Goodput* is useful over used: the share of the rank-seconds in which steps were made whose result is still there.
Start-up runs from there to the end of a stage's first step ("first_step"), so loading, compilation and filling
buffers belong to it. *Lost* is start-up and steps that a later life made again. Blocking saves and evaluation are
used, neither useful nor lost.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from radhpc.core.protocol import LIFE_BEGINNINGS, LIFE_ENDS, Event

_GROWS = {"start-up": "lost", "steps": "useful", "way out": "overhead"}  # by what a life is doing
Events = Sequence[dict[str, Any]]


@dataclass
class Life:
    """One start of a job on a run. Times are seconds since 1970."""

    number: int
    job: str
    world: int
    started: float
    ended: float  # of a living one: now
    cause: str = ""  # the last event that ended it; "" where it lives, or nobody saw its end
    came_back: bool = False  # the same job is in the queue again, or was started again

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass
class TimeAccount:
    """Rank-seconds of a run: used = useful + lost + overhead."""

    useful: float = 0.0
    lost: float = 0.0
    overhead: float = 0.0  # evaluation, blocking saves, and the way out
    lives: list[Life] = field(default_factory=list)
    # Where the last life may still be going on: what its time goes into since the last event ("" where it is over), and
    # what of `lost` was not: steps that no checkpoint held by then.
    growing: str = ""
    unsaved: float = 0.0

    @property
    def used(self) -> float:
        return self.useful + self.lost + self.overhead

    def living(self, now: float) -> "TimeAccount":
        """Return the same at the time `now`, where the last life still lives: its steps count until they are lost."""
        if not self.growing:  # the last life is over, though perhaps another is in the queue
            return self
        last = self.lives[-1]
        lives = [*self.lives[:-1], replace(last, ended=max(last.ended, now), cause="")]
        result = replace(self, lives=lives, growing="", unsaved=0.0)
        result.useful, result.lost = self.useful + self.unsaved, self.lost - self.unsaved
        more = (lives[-1].ended - last.ended) * last.world
        setattr(result, self.growing, getattr(result, self.growing) + more)
        return result

    @property
    def restarts(self) -> Counter[str]:
        """Count how often the same job came back, by what had ended its life; "unknown" where nobody recorded that."""
        return Counter(life.cause or "unknown" for life in self.lives if life.came_back)

    @property
    def goodput(self) -> float | None:
        """Return useful over used, from 0 to 1; None before any time was used."""
        return self.useful / self.used if self.used else None


def lives(events: Events, now: float | None = None) -> list[Life]:
    """Return the lives, oldest first; `now` where the last one still lives."""
    return account(events, now).lives


def _lives(events: Events) -> list[Life]:
    lives: list[Life] = []
    inside = False
    for event in events:
        name, at = event["event"], seconds(event)
        if name == Event.STARTED:
            if lives and not lives[-1].came_back:
                lives[-1].came_back = inside
            lives.append(Life(len(lives) + 1, event.get("job", ""), event.get("world", 1), at, at))
            inside = True
        elif name == Event.SUBMITTED:
            inside = False
        elif inside:
            lives[-1].ended = max(lives[-1].ended, at)
            lives[-1].came_back = name == Event.REQUEUED or (lives[-1].came_back and name not in LIFE_ENDS)
            if name in LIFE_ENDS:
                lives[-1].cause = name
    return lives


def restarts(events: Events) -> Counter[str]:
    """Count how often the same job came back, by what had ended its life; "unknown" where nobody recorded that."""
    return account(events).restarts


def account(events: Events, now: float | None = None) -> TimeAccount:
    """Account for the time of all lives; `now` where the last one still lives: its steps count until they are lost.

    A step that no checkpoint holds is lost once its life is over.
    """
    marked = any(event["event"] == Event.FIRST_STEP for event in events)  # runs of an earlier release have none
    books = _Bookkeeper()
    events = _one_start(events)
    books.account.lives = _lives(events)
    begun = iter(books.account.lives)
    for event in events:
        if event["event"] == Event.STARTED:
            books.close()
            books.open(next(begun), "start-up" if marked else "steps")
        elif event["event"] == Event.SUBMITTED:
            books.close()
        elif books.life is not None:
            books.enter(event)
    if books.life is not None:
        books.pass_until(books.life.ended)
        books.account.growing, books.account.unsaved = _GROWS[books.mode], books.pending
    books.close()
    total = books.total()
    return total if now is None else total.living(now)


def _one_start(events: Events) -> list[dict[str, Any]]:
    """Return the events with one "started" for each life, at its very beginning, with the known number of ranks."""
    rows: list[dict[str, Any]] = []
    opening: dict[str, Any] | None = None
    for event in events:
        if event["event"] == Event.STARTED and opening is not None:
            opening["world"] = event.get("world", 1)
            opening = None
        elif event["event"] in LIFE_BEGINNINGS:
            rows.append({**event, "event": Event.STARTED})
            opening = rows[-1] if event["event"] == Event.STARTING else None
        else:
            rows.append(event)
            opening = None if event["event"] in (Event.SUBMITTED, Event.REQUEUED) else opening
    return rows


class _Bookkeeper:
    """A cursor moves along the events; all time that it passes goes into exactly one account."""

    def __init__(self) -> None:
        self.life: Life | None = None
        self.account = TimeAccount()
        self.kept: list[tuple[int, float]] = []  # (step of the checkpoint, rank-seconds of the steps before it)
        self.pending = 0.0  # of steps that no checkpoint holds yet
        self.mode = "start-up"  # or "steps", "way out"
        self.at = 0.0
        self.step = 0
        self.restored = False  # it is known from where this life goes on

    def open(self, life: Life, mode: str) -> None:
        self.life, self.at, self.mode, self.restored = life, life.started, mode, False

    def close(self) -> None:
        """End the life: account for the time up to its end, and for what it had not saved."""
        if self.life is not None:
            self.pass_until(self.life.ended)
            self.account.lost += self.pending
            self.pending, self.life = 0.0, None

    def total(self) -> TimeAccount:
        self.account.useful = sum(seconds for _, seconds in self.kept)
        return self.account

    def enter(self, event: dict[str, Any]) -> None:
        name, at = event["event"], seconds(event)
        if name == Event.RESUMED:
            self.go_on_from(event["step"])
        elif name == Event.FIRST_STEP:
            self.go_on_from(0)
            self.pass_until(at)
            self.mode = "steps"
        elif name == Event.SAVED:
            self.go_on_from(0)
            took = event.get("seconds", 0.0)
            self.pass_until(at - took)
            self.keep(event["step"])
            self.pass_overhead(at - took + event.get("blocked_seconds", took))
        elif name == Event.EVALUATED:
            self.pass_until(at - event.get("seconds", 0.0))
            self.pass_overhead(at)
        elif name == Event.STAGE_FINISHED:
            self.pass_until(at)
            self.mode = "start-up"  # of the next stage
        elif name in LIFE_ENDS:
            if name == Event.FINISHED or (self.mode == "steps" and event.get("step") == self.step):
                self.mode = "way out"  # since the last checkpoint: it holds all steps
            self.pass_until(at)
            self.mode = "way out"

    def go_on_from(self, step: int) -> None:
        """Count as lost what was kept beyond the step from which this life goes on: it is made again."""
        if not self.restored:
            self.account.lost += sum(seconds for kept, seconds in self.kept if kept > step)
            self.kept = [piece for piece in self.kept if piece[0] <= step]
            self.step, self.restored = step, True

    def keep(self, step: int) -> None:
        """Keep all steps so far: a checkpoint holds them."""
        if self.pending:
            self.kept.append((step, self.pending))
            self.pending = 0.0
        self.step = step

    def pass_until(self, at: float) -> None:
        length = self._move(at)
        if self.mode == "steps":
            self.pending += length
        elif self.mode == "way out":
            self.account.overhead += length
        else:
            self.account.lost += length

    def pass_overhead(self, at: float) -> None:
        self.account.overhead += self._move(at)

    def _move(self, at: float) -> float:
        """Rank-seconds from the cursor to `at`; a clock that was set back does not move it."""
        assert self.life is not None
        until = min(max(at, self.at), self.life.ended)
        length, self.at = (until - self.at) * self.life.world, until
        return length


def seconds(event: dict[str, Any]) -> float:
    """Return the time of an event, in seconds since 1970."""
    return _seconds(event["time"])


@lru_cache(100_000)
def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
