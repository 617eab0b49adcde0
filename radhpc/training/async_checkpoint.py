"""Saving beside the training: the step waits for a copy in host memory, a thread of rank 0 writes and commits it.

Between a hook of the loop (or the end of a stage, or a signal) and Checkpoints.save. At most one save is in flight: one
that comes due meanwhile waits for it, so that no more is ever lost than `checkpoint.every` steps and the save in
flight, and so that the host never holds two copies. A save that fails raises the flag of stop.py, which ends the run
at the next step. When the run is told to stop, grace_period.py says what can still be committed.
"""

import logging
import math
import threading
import time
from dataclasses import dataclass

from radhpc.core.errors import UserError
from radhpc.core.protocol import Cause, Event
from radhpc.distributed.grace_period import RESERVE, SAFETY, Plan, RecentMaximum, choose
from radhpc.distributed.stop import CAUSES, Interrupted
from radhpc.engine.checkpoint import Cursor, SaveCancelled
from radhpc.models.adapters import Tensors
from radhpc.training.context import StageContext
from radhpc.training.loop import Position, Report
from radhpc.training.sources import open_source

log = logging.getLogger("radhpc")

_POLL = 0.1  # seconds between two agreements while all wait for a commit
_UNWIND = 2.0  # seconds that a save which is given up may take to clear up behind itself


@dataclass(frozen=True)
class Ending:
    """What a run that was told to stop has committed; complete on rank 0 only."""

    committed_step: int | None  # the next life goes on from here; None: from the beginning
    planned: Plan
    margin_seconds: float | None  # that were left until the kill once all was committed; None: nobody kills
    waited_seconds: float  # from the first signal until the ranks could leave

    def __str__(self) -> str:
        margin = "" if self.margin_seconds is None else f", with {self.margin_seconds:.1f} s left before the kill"
        step = "nothing" if self.committed_step is None else f"step {self.committed_step}"
        return f"committed is {step} ({self.planned}){margin}"


class _Save(threading.Thread):
    """One write in the background, on rank 0."""

    def __init__(self, saving: "Saving", tensors: Tensors, cursor: Cursor, times: dict[str, float]) -> None:
        super().__init__(name=f"save step {cursor.step}", daemon=True)  # a process that must end does not wait for it
        self.started = time.perf_counter()
        self.given_up = threading.Event()
        self._saving, self._tensors, self._cursor, self._times = saving, tensors, cursor, times
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            self._write()
        except SaveCancelled:
            pass
        except BaseException as error:  # for the main thread to raise
            self.problem = error
            self._saving.stage.context.stop.tell(Cause.SAVE_FAILED)
        finally:
            self._tensors = {}

    def _write(self) -> None:
        saving, cursor, context = self._saving, self._cursor, self._saving.stage.context
        _, size = context.checkpoints.save(self._tensors, cursor, self.given_up)
        saving.committed_step = cursor.step
        seconds = time.perf_counter() - self.started
        saving.writing.add(seconds)
        times = {**self._times, "seconds": self._times["blocked_seconds"] + seconds}
        rounded = {name: round(value, 3) for name, value in times.items()}
        context.run.record(Event.SAVED, step=cursor.step, stage=cursor.stage, bytes=size, **rounded)
        if self.given_up.is_set():
            return  # it landed after all, and nobody listens any more
        saving.stage.board.scalars(
            cursor.step, {"checkpoint/megabytes": size / 1e6, **{f"checkpoint/{n}": s for n, s in times.items()}}
        )
        try:
            context.checkpoints.prune(context.recipe.checkpoint.keep)
        except UserError as error:  # the checkpoint stands, and the next one prunes again
            log.warning("old checkpoints stay for now: %s", error)


class Saving:
    """Writes checkpoints, says so, and deletes old ones. All ranks call each method alike."""

    def __init__(self, stage: StageContext) -> None:
        self.stage, self.ranks, self.stop = stage, stage.context.ranks, stage.context.stop
        self.saved_step = -1  # the newest one that was copied
        self.committed_step: int | None = None
        self._save: _Save | None = None
        self.stepping, self.copying, self.writing = RecentMaximum(), RecentMaximum(), RecentMaximum()
        self._warned = False

    def start_at(self, step: int) -> None:
        """The run goes on from a checkpoint of this step, which must not be written over."""
        self.saved_step = self.committed_step = step

    def expect(self) -> None:
        """Take the estimates from what saves of this stage took in earlier lives."""
        if self.ranks.first:
            for event in self.stage.context.run.events(Event.SAVED):
                if event["stage"] == self.stage.number:
                    self.copying.add(event["copy_seconds"])
                    self.writing.add(event["seconds"] - event["blocked_seconds"])

    def __call__(self, position: Position, report: Report) -> None:
        """The hook: what comes due is copied and left to the background."""
        self.stepping.add(report.seconds)
        if not position.stage_done:  # the end of a stage saves by finish()
            self._begin(position)
            self._warn()
            if not self.stage.context.recipe.checkpoint.asynchronous:
                self._wait()

    def _warn(self) -> None:
        """Say once that a preemption will cost steps, while something can still be done about it."""
        grace = self.stop.grace
        need = RESERVE + SAFETY * (self.stepping.seconds + self.copying.seconds + self.writing.seconds)
        if self.ranks.first and grace is not None and need > grace and not self._warned:
            self._warned = True
            log.warning(
                "a step of %.1f s and a save of %.1f s do not fit into the grace of %.0f s: a preemption goes back to "
                "the last checkpoint; a smaller checkpoint.every makes that less (grace_seconds is in the profile)",
                self.stepping.seconds,
                self.copying.seconds + self.writing.seconds,
                grace,
            )

    def finish(self, position: Position) -> None:
        """The end of a stage: nothing goes on before it is committed."""
        self._begin(position)
        self._wait()

    def _begin(self, position: Position) -> None:
        """Copy the state, after the save before is done, and start to write."""
        if position.step == self.saved_step:
            return
        context, started = self.stage.context, time.perf_counter()
        context.ranks.watchdog.beat("saving", slow=True)
        self._wait()
        free = time.perf_counter()
        if free - started > 1:
            log.warning(
                "the checkpoint of step %d waited %.0f s for the one before: checkpoint.every is short for this disk",
                position.step,
                free - started,
            )
        cursor = Cursor(
            stage=position.stage,
            step=position.step,
            stage_step=position.stage_step,
            samples=position.samples,
            stage_done=position.stage_done,
            lineage=self.stage.lineage,
            recipe=context.recipe.hash,
            base=self.stage.base_hash,
            data=open_source(context, position.stage, "train").hashes,
            world=context.ranks.world,
            engine=context.recipe.engine,
        )
        tensors = self.stage.engine.state()
        self.saved_step = position.step
        now = time.perf_counter()
        self.copying.add(now - free)
        if context.ranks.first:
            self._save = _Save(self, tensors, cursor, {"blocked_seconds": now - started, "copy_seconds": now - free})
            self._save.start()

    def _wait(self, until: float = math.inf, poll: bool = True) -> bool:
        """Wait for the save in flight: True when none is left, False when it is `until` by time.monotonic().

        Raises UserError on all ranks when it failed, and Interrupted, with `poll`, when any is told to stop.
        """
        with self.ranks.watchdog.poll():
            while True:
                if self._save is not None:
                    self._save.join(max(0.0, min(_POLL, until - time.monotonic())))
                busy = self._save is not None and self._save.is_alive()
                self.ranks.watchdog.polling = not busy
                failed = self._save is not None and not busy and self._save.problem is not None
                flags = [float(busy), float(failed), float(time.monotonic() > until), float(self.stop.poll())]
                any_busy, any_failed, over, code = self.ranks.max(flags)
                if any_failed:
                    self._fail()
                if not any_busy:
                    self._save = None
                    return True
                if over:
                    return False
                if poll and code:
                    raise Interrupted(CAUSES[int(code)])

    def _fail(self) -> None:
        """End all ranks in the same way."""
        problem = self._save.problem if self._save is not None else None
        said = self.ranks.broadcast((isinstance(problem, UserError), str(problem)))
        if problem is not None and not isinstance(problem, UserError):
            raise problem
        if said[0]:
            raise UserError(said[1])
        raise RuntimeError(f"rank 0 could not save: {said[1]}")

    def interrupted(self, position: Position) -> Ending:
        """Commit what the grace allows, at a step boundary. Raises UserError when a save failed."""
        ranks = self.ranks
        negative, waited = ranks.max([-self.stop.left, self.stop.waited])
        left = -negative
        deadline = time.monotonic() + left
        until = deadline - RESERVE
        plan = ranks.broadcast(self._plan(position, left))
        landed = self._wait(-math.inf if plan == "last checkpoint" else until, poll=False)
        if plan == "this step" and landed and position.step != self.saved_step:
            self._begin(position)
            self._wait(until, poll=False)
        if self._save is not None:  # it has not landed
            self._save.given_up.set()
            self._save.join(max(0.0, min(_UNWIND, deadline - time.monotonic())))
        margin = None if math.isinf(left) else round(deadline - time.monotonic(), 3)
        return Ending(self.committed_step, plan, margin, round(waited, 3))

    def _plan(self, position: Position, left: float) -> Plan:
        """Rank 0's choice."""
        in_flight = None
        if self._save is not None and self._save.is_alive():
            in_flight = max(0.0, self.writing.seconds - (time.perf_counter() - self._save.started))
        here = position.step == self.saved_step
        return choose(left, here, in_flight, self.copying.seconds + self.writing.seconds)
