"""Signals and requests to stop: a handler only raises a flag, and the loop reads it at a step boundary.

SIGTERM is what SLURM sends when it preempts, cancels or kills; SIGUSR2 what submitit asks it to send before the time
limit. Which of them it was is not for a rank to guess: the ranks save and end, and slurm.requeue, which can ask
the scheduler, decides. Ranks learn of a signal at different moments, so they agree on the largest code.
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from radhpc.run_dir import RunDir

# By increasing weight: a user's request outweighs the scheduler's.
CAUSES = ("", "SIGUSR2", "SIGTERM", "SIGINT", "stop")
PRUNED = "pruned"  # the cause where no signal came, but a sweep has seen enough
_SIGNALS = {signal.SIGUSR2: "SIGUSR2", signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT"}


class Interrupted(Exception):
    """Raised out of long work that is not a step (start-up, evaluation) once all ranks have agreed to stop."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Stop:
    """The flag. Use as a context: the handlers before it are put back at the end."""

    def __init__(self, run: RunDir | None = None, poll_seconds: float = 1.0) -> None:
        self.code = 0
        self.since: float | None = None  # time.monotonic() of the first signal: the grace runs from here
        self._run, self._poll_seconds, self._polled = run, poll_seconds, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
            self._before[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = _SIGNALS[signal.Signals(number)]
        if name == "SIGINT" and self.code == CAUSES.index("SIGINT"):
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a save
        self._raise_flag(name)

    def _raise_flag(self, cause: str) -> None:
        self.since = self.since or time.monotonic()
        self.code = max(self.code, CAUSES.index(cause))

    def poll(self) -> int:
        """The code now; the run folder's request file is looked at once a second."""
        if self._run is not None and time.monotonic() - self._polled > self._poll_seconds:
            self._polled = time.monotonic()
            if self._run.stop_requested():
                self._raise_flag("stop")
        return self.code

    def check(self, agree: Callable[[list[float]], list[float]]) -> None:
        """Raise Interrupted on all ranks together when any of them has to stop. `agree` is Ranks.max."""
        code = int(agree([float(self.poll())])[0])
        if code:
            raise Interrupted(CAUSES[code])
