"""Save checkpoints asynchronously: a step waits for a copy in host memory, a thread of rank 0 writes and commits it.

    checkpointer = AsyncCheckpointer(stage)
    checkpointer(position, metrics)                # the hook of every `checkpoint.every` steps
    checkpointer.finish(position)                  # the end of a stage: returns once all is committed
    checkpointer.commit_before_exit(position)      # told to stop: commits what the grace allows

Stands between the loop and Checkpoints.save. At most one save is in flight: the next one that comes due waits for it,
so that never more than `checkpoint.every` steps and the save in flight are lost, and the host never holds two copies.
A save that fails raises the flag of stop.py, which ends the run at the next step. When the run is told to stop,
grace_period.py decides what can still be committed.
"""

import logging
import math
import threading
import time
from dataclasses import dataclass

from radhpc.core.errors import UserError
from radhpc.core.ownership.lease import Superseded
from radhpc.core.protocol import Cause, Event
from radhpc.distributed.grace_period import RESERVE, SAFETY, Plan, RecentMaximum, choose
from radhpc.distributed.stop import CAUSES, Interrupted
from radhpc.engine.checkpoint import Cursor, SaveCancelled
from radhpc.models.adapters import Tensors
from radhpc.training.context import StageContext
from radhpc.training.loop import Position, StepMetrics
from radhpc.training.sources import open_source

log = logging.getLogger("radhpc")

_POLL = 0.1  # seconds between two agreements while all wait for a commit
_UNWIND = 2.0  # seconds that a cancelled save may take to remove what it has written


@dataclass(frozen=True)
class FinalCommit:
    """The last commit of a run that was told to stop; complete on rank 0 only."""

    committed_step: int | None  # the next life goes on from here; None: from the beginning
    planned: Plan
    margin_seconds: float | None  # that were left until the kill once all was committed; None: nobody kills
    waited_seconds: float  # from the first signal until the ranks could leave

    def __str__(self) -> str:
        margin = "" if self.margin_seconds is None else f", with {self.margin_seconds:.1f} s left before the kill"
        step = "nothing" if self.committed_step is None else f"step {self.committed_step}"
        return f"committed is {step} ({self.planned}){margin}"


class AsyncCheckpointer:
    """Writes checkpoints, records them, and deletes old ones. All ranks make the same calls."""

    def __init__(self, stage: StageContext) -> None:
        self.stage, self.ranks, self.stop = stage, stage.context.ranks, stage.context.stop
        self.saved_step = -1  # the newest one that was copied
        self.committed_step: int | None = None
        self._save: _BackgroundSave | None = None
        self.step_seconds, self.copy_seconds = RecentMaximum(), RecentMaximum()
        self.write_seconds = RecentMaximum()
        self._warned = False

    def start_at(self, step: int) -> None:
        """Go on from a checkpoint of this step, which must not be overwritten."""
        self.saved_step = self.committed_step = step

    def load_estimates(self) -> None:
        """Estimate the seconds of a save from those of this stage in earlier lives."""
        if self.ranks.first:
            for event in self.stage.context.run.events(Event.SAVED):
                if event.get("stage") == self.stage.number:
                    self.copy_seconds.add(event.get("copy_seconds", 0.0))
                    self.write_seconds.add(event.get("seconds", 0.0) - event.get("blocked_seconds", 0.0))

    def __call__(self, position: Position, metrics: StepMetrics) -> None:
        """Copy the state and leave the writing to the background; a hook of the loop."""
        self.step_seconds.add(metrics.seconds)
        if not position.stage_done:  # the end of a stage saves by finish()
            self._start_save(position)
            self._warn_of_short_grace()
            if not self.stage.context.recipe.checkpoint.asynchronous:
                self._wait()

    def finish(self, position: Position) -> None:
        """Save the end of a stage, and return once it is committed."""
        self._start_save(position)
        self._wait()

    def commit_before_exit(self, position: Position) -> FinalCommit:
        """Commit what the grace allows, at a step boundary. Raises UserError when a save failed."""
        ranks = self.ranks
        negative, waited = ranks.max([-self.stop.left, self.stop.waited])
        left = -negative
        deadline = time.monotonic() + left
        until = deadline - RESERVE
        plan = ranks.broadcast(self._choose_plan(position, left))
        landed = self._wait(-math.inf if plan == "last checkpoint" else until, poll=False)
        if plan == "this step" and landed and position.step != self.saved_step:
            self._start_save(position)
            self._wait(until, poll=False)
        if self._save is not None:  # it has not landed
            self._save.cancelled.set()
            self._save.join(max(0.0, min(_UNWIND, deadline - time.monotonic())))
        margin = None if math.isinf(left) else round(deadline - time.monotonic(), 3)
        return FinalCommit(self.committed_step, plan, margin, round(waited, 3))

    def abandon(self) -> None:
        """Leave without a commit: the run is another life's, and so is the place where the save in flight writes."""
        if self._save is not None:
            self._save.cancelled.set()
            self._save.join(_UNWIND)

    def _warn_of_short_grace(self) -> None:
        """Warn once that a preemption will cost steps, while something can still be done about it."""
        grace = self.stop.grace
        save = self.copy_seconds.seconds + self.write_seconds.seconds
        need = RESERVE + SAFETY * (self.step_seconds.seconds + save)
        if self.ranks.first and grace is not None and need > grace and not self._warned:
            self._warned = True
            log.warning(
                "a step of %.1f s and a save of %.1f s do not fit into the grace of %.0f s: a preemption goes back to "
                "the last checkpoint; a smaller checkpoint.every makes that less (grace_seconds is in the profile)",
                self.step_seconds.seconds,
                save,
                grace,
            )

    def _start_save(self, position: Position) -> None:
        """Copy the state, after the save before is done, and start to write."""
        if position.step == self.saved_step:
            return
        started = time.perf_counter()
        self.ranks.watchdog.beat("saving", slow=True)
        self._wait()
        free = time.perf_counter()
        if free - started > 1:
            log.warning(
                "the checkpoint of step %d waited %.0f s for the one before: checkpoint.every is short for this disk",
                position.step,
                free - started,
            )
        cursor = self._cursor(position)
        tensors = self.stage.engine.state()
        self.saved_step = position.step
        now = time.perf_counter()
        self.copy_seconds.add(now - free)
        if self.ranks.first:
            times = {"blocked_seconds": now - started, "copy_seconds": now - free}
            self._save = _BackgroundSave(self, tensors, cursor, times)
            self._save.start()

    def _cursor(self, position: Position) -> Cursor:
        context = self.stage.context
        return Cursor(
            stage=position.stage,
            step=position.step,
            stage_step=position.stage_step,
            samples=position.samples,
            stage_done=position.stage_done,
            lineage=self.stage.lineage,
            recipe=context.recipe.hash,
            base=self.stage.base_hash,
            data=open_source(context, position.stage, "train").hashes,
            world=self.ranks.world,
            engine=context.recipe.engine,
        )

    def _wait(self, until: float = math.inf, poll: bool = True) -> bool:
        """Wait for the save in flight; return True when none is left, False when it is `until` by time.monotonic().

        Raises UserError on all ranks when it failed; Interrupted where the run is another life's, and, with `poll`,
        when any is told to stop.
        """
        with self.ranks.watchdog.poll():
            while True:
                if self._save is not None:
                    self._save.join(max(0.0, min(_POLL, until - time.monotonic())))
                busy = self._save is not None and self._save.is_alive()
                self.ranks.watchdog.polling = not busy
                failed = self._save is not None and not busy and self._save.error is not None
                flags = [float(busy), float(failed), float(time.monotonic() > until), float(self.stop.poll())]
                any_busy, any_failed, over, code = self.ranks.max(flags)
                if CAUSES[int(code)] == Cause.SUPERSEDED:  # what this life writes counts no more
                    raise Interrupted(Cause.SUPERSEDED)
                if any_failed:
                    self._raise_error()
                if not any_busy:
                    self._save = None
                    return True
                if over:
                    return False
                if poll and code:
                    raise Interrupted(CAUSES[int(code)])

    def _raise_error(self) -> None:
        """Raise the error of the save, alike on all ranks."""
        error = self._save.error if self._save is not None else None
        is_mistake, message = self.ranks.broadcast((isinstance(error, UserError), str(error)))
        if error is not None and not isinstance(error, UserError):
            raise error
        if is_mistake:
            raise UserError(message)
        raise RuntimeError(f"rank 0 could not save: {message}")

    def _choose_plan(self, position: Position, left: float) -> Plan:
        """Return rank 0's choice."""
        in_flight = None
        if self._save is not None and self._save.is_alive():
            in_flight = max(0.0, self.write_seconds.seconds - (time.perf_counter() - self._save.started))
        is_saved = position.step == self.saved_step
        return choose(left, is_saved, in_flight, self.copy_seconds.seconds + self.write_seconds.seconds)


class _BackgroundSave(threading.Thread):
    """One write in the background, on rank 0."""

    def __init__(
        self, checkpointer: AsyncCheckpointer, tensors: Tensors, cursor: Cursor, times: dict[str, float]
    ) -> None:
        super().__init__(name=f"save step {cursor.step}", daemon=True)  # a process that must end does not wait for it
        self.started = time.perf_counter()
        self.cancelled = threading.Event()
        self._checkpointer, self._tensors, self._cursor, self._times = checkpointer, tensors, cursor, times
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._write()
        except SaveCancelled:
            pass
        except Superseded:
            self._checkpointer.stop.tell(Cause.SUPERSEDED)
        except BaseException as error:  # for the main thread to raise
            self.error = error
            self._checkpointer.stop.tell(Cause.SAVE_FAILED)
        finally:
            self._tensors = {}

    def _write(self) -> None:
        checkpointer, cursor, stage = self._checkpointer, self._cursor, self._checkpointer.stage
        checkpoints = stage.context.checkpoints
        _, size = checkpoints.save(self._tensors, cursor, self.cancelled)
        checkpointer.committed_step = cursor.step
        seconds = time.perf_counter() - self.started
        checkpointer.write_seconds.add(seconds)
        times = {**self._times, "seconds": self._times["blocked_seconds"] + seconds}
        rounded = {name: round(value, 3) for name, value in times.items()}
        stage.context.run.record(Event.SAVED, step=cursor.step, stage=cursor.stage, bytes=size, **rounded)
        if self.cancelled.is_set():
            return  # it landed after all, and nobody listens any more
        stage.board.scalars(
            cursor.step, {"checkpoint/megabytes": size / 1e6, **{f"checkpoint/{n}": s for n, s in times.items()}}
        )
        try:
            checkpoints.prune(stage.context.recipe.checkpoint.keep)
        except UserError as error:  # the checkpoint stands, and the next one prunes again
            log.warning("old checkpoints stay for now: %s", error)
