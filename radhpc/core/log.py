"""Show people what a run does: lines with time and rank, and progress with a rate and an ETA.

On a terminal progress is a Rich bar; in a job's log it is a plain line every ten seconds. Both go to standard
error, so that standard output belongs to results.
"""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn as Remaining,
)

console = Console(stderr=True, highlight=False)
log = logging.getLogger("radhpc")


def start_logging(rank: int = 0, world: int = 1) -> None:
    """Send radhpc's log to standard error: everything of rank 0, warnings of the others."""
    handler = logging.StreamHandler(sys.stderr)
    who = f" rank {rank}" if world > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False


class Bar:
    """The progress of one piece of work. Use as a context; a hidden bar (on ranks other than 0) does nothing."""

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "", hidden: bool = False) -> None:
        self.title, self.total, self.unit, self.hidden = title, total, unit, hidden
        self.done = self.start_done = done
        self.started = self._last_logged = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "Bar":
        if not self.hidden and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description:<22}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("eta"),
                Remaining(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._progress.add_task(self.title, total=self.total, completed=self.done, rate="", note="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif not self.hidden and self.done > self.start_done:
            self._log_progress("")

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Set how much is done; `note`, such as the loss, is shown after it."""
        self.done = done
        self.total = self.total if total is None else total
        if self.hidden:
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=self.total, rate=self._rate(), note=note)
        elif time.monotonic() - self._last_logged > 10:
            self._log_progress(note)

    def _rate(self) -> str:
        seconds = time.monotonic() - self.started
        rate = (self.done - self.start_done) / seconds if seconds > 0 else 0.0
        return f"{rate:.1f} {self.unit}/s"

    def _log_progress(self, note: str) -> None:
        self._last_logged = time.monotonic()
        seconds = self._last_logged - self.started
        speed = (self.done - self.start_done) / seconds if seconds > 0 else 0.0
        left = f"{(self.total - self.done) / speed:.0f} s" if speed > 0 else "?"
        log.info("%s %d/%d %s eta %s %s", self.title, self.done, self.total, self._rate(), left, note)
