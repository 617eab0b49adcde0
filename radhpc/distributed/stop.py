"""Handle signals and requests to stop: a handler only raises a flag; the ranks read it together where they can leave.

SIGTERM is what SLURM sends when it preempts, cancels or kills; SIGUSR2 what submitit asks it to send before the time
limit. A rank does not guess which of these it was: the ranks save and end, and slurm.requeue, which can ask
the scheduler, decides. Ranks learn of a signal at different moments, so they agree on the largest code.

The first signal of a kind starts the clock: after SIGTERM the kill comes in RADHPC_GRACE_SECONDS. SIGUSR2 is sent
RADHPC_SIGNAL_SECONDS before the time limit, up to a minute early; but a SLURM with preempt_send_user_signal also sends
it to jobs that it preempts, and then only the grace period is left. The job's elapsed time tells which it is, of
RADHPC_LIMIT_SECONDS since RADHPC_JOB_STARTED. slurm.submit sets them; where they are not set, nobody kills.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from radhpc.core.protocol import Cause
from radhpc.core.run_folder import RunFolder

# By increasing weight: a user's request outweighs the scheduler's, a save that failed ends the run in any case,
# and who has lost the run may not even save.
CAUSES = (Cause.NONE, Cause.SIGUSR2, Cause.SIGTERM, Cause.SIGINT, Cause.STOP, Cause.SAVE_FAILED, Cause.SUPERSEDED)
_SIGNALS = {signal.SIGUSR2: Cause.SIGUSR2, signal.SIGTERM: Cause.SIGTERM, signal.SIGINT: Cause.SIGINT}
_GRACE = {Cause.SIGTERM: "RADHPC_GRACE_SECONDS", Cause.SIGUSR2: "RADHPC_SIGNAL_SECONDS"}  # the surer kill first
_EARLY = 90.0  # seconds by which the warning before the time limit may come too early, SLURM's minute and some more

Agree = Callable[[Sequence[float]], list[float]]  # Ranks.max


class Interrupted(Exception):
    """Raised out of long work that is not a step (start-up, evaluation) once all ranks have agreed to stop."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause
        self.final_commit: Any = None  # FinalCommit of training/async_checkpoint.py


class Stop:
    """The flag. Use as a context: the handlers before it are put back at the end."""

    def __init__(self, run: RunFolder | None = None, poll_seconds: float = 1.0) -> None:
        """Create the flag. `run`: on one rank, the run whose request to stop is looked for."""
        self.code = 0
        self.since: float | None = None  # time.monotonic() of the first signal
        self.run, self._poll_seconds, self._polled = run, poll_seconds, 0.0
        self._deadlines: dict[Cause, float] = {}  # time.monotonic() of the kill, by signal
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
        cause = _SIGNALS[signal.Signals(number)]
        if cause == Cause.SIGINT and self.code == CAUSES.index(Cause.SIGINT):
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a save
        self.tell(cause)

    def tell(self, cause: Cause) -> None:
        """Raise the flag, from any thread. SLURM repeats its signals: the clock of the first one keeps running."""
        now = time.monotonic()
        self.since = self.since or now
        if (granted := _seconds_to_kill(cause)) is not None:
            self._deadlines.setdefault(cause, now + granted)
        self.code = max(self.code, CAUSES.index(cause))

    @property
    def grace(self) -> float | None:
        """Return the seconds from SIGTERM to the kill; None if no kill follows."""
        grace = os.environ.get(_GRACE[Cause.SIGTERM])
        return float(grace) if grace else None

    @property
    def left(self) -> float:
        """Return the seconds until the kill, as far as this rank knows; infinite if none is to come."""
        deadline = next((self._deadlines[cause] for cause in _GRACE if cause in self._deadlines), math.inf)
        return deadline - time.monotonic()

    @property
    def waited(self) -> float:
        """Return the seconds since the first signal here; 0 without one."""
        return 0.0 if self.since is None else time.monotonic() - self.since

    @property
    def margin(self) -> float | None:
        """Return the seconds until the kill for a record: None if none is to come."""
        return None if math.isinf(self.left) else round(self.left, 3)

    def poll(self) -> int:
        """Return the current code; once a second the run folder is looked at: for a request, and whose the run is."""
        if self.run is not None and time.monotonic() - self._polled > self._poll_seconds:
            self._polled = time.monotonic()
            if self.run.stop_requested():
                self.tell(Cause.STOP)
            if self.run.lease is not None and not self.run.lease.held:
                self.tell(Cause.SUPERSEDED)
        return self.code

    def check(self, agree: Agree) -> None:
        """Raise Interrupted on all ranks together when any of them has to stop. `agree` is Ranks.max."""
        code = int(agree([float(self.poll())])[0])
        if code:
            raise Interrupted(CAUSES[code])


def _seconds_to_kill(cause: Cause) -> float | None:
    """Return the seconds from a signal to the kill; None if no kill follows."""
    configured = os.environ.get(_GRACE.get(cause, ""))
    grace, started = os.environ.get(_GRACE[Cause.SIGTERM]), os.environ.get("RADHPC_JOB_STARTED")
    if not configured or cause != Cause.SIGUSR2 or not grace or not started:
        return float(configured) if configured else None
    left = float(started) + float(os.environ["RADHPC_LIMIT_SECONDS"]) - time.time()
    # Not near the limit, or the clock was moved: it may be a preemption, and the grace is what is left in any case.
    return left if float(grace) <= left <= float(configured) + _EARLY else float(grace)
