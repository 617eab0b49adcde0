"""Run long work in a thread while the main threads keep agreeing on whether to stop.

    tokenizer = run_on_first(lambda: train(...), ranks, stop)       # rank 0 works, all wait, any signal ends it on all
    model = run_in_background(lambda: load(...), ranks, stop)              # every rank works

Abandoned work ends with the process.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from radhpc.core.errors import UserError
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import CAUSES, Interrupted, Stop

POLL = 0.1  # seconds between two agreements

T = TypeVar("T")


class Background(threading.Thread, Generic[T]):
    """One piece of work in a thread; its error is raised by result()."""

    def __init__(self, work: Callable[[], T], name: str | None = None) -> None:
        super().__init__(name=name, daemon=True)  # a process that must end does not wait for it
        context = copy_context()  # PyTorch's settings belong to a thread: the work gets those of its caller
        self._work: Callable[[], T] = lambda: context.run(work)
        self._value: T | None = None
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:
            self.problem = error
        finally:
            del self._work  # and what it holds

    def result(self) -> T:
        """Return the result of the work once it has ended. Raises its error."""
        assert not self.is_alive()
        if self.problem is not None:
            raise self.problem
        return self._value  # type: ignore[return-value]


def run_in_background(work: Callable[[], T] | None, ranks: Ranks, stop: Stop) -> T | None:
    """Do this rank's work, if it has any, while the others do theirs. All ranks call it. Raises Interrupted on all."""
    thread = None
    if work is not None:
        thread = Background(work)
        thread.start()
    with ranks.watchdog.poll():
        while True:
            if thread is not None:
                thread.join(POLL)
            working = thread is not None and thread.is_alive()
            ranks.watchdog.polling = not working
            busy, code = ranks.max([float(working), float(stop.poll())])
            if code:
                if thread is not None and thread.is_alive():
                    atexit.register(_leave, thread)
                raise Interrupted(CAUSES[int(code)])
            if not busy:
                return thread.result() if thread is not None else None


def run_on_first(work: Callable[[], T], ranks: Ranks, stop: Stop) -> T:
    """Do the work on rank 0 and return its result on all ranks. Raises UserError and Interrupted on all."""

    def tried() -> tuple[T | None, str | None]:
        try:
            return work(), None
        except UserError as error:
            return None, str(error)

    value, problem = ranks.broadcast(run_in_background(tried if ranks.first else None, ranks, stop))
    if problem is not None:
        raise UserError(problem)
    return value  # type: ignore[no-any-return]


def _leave(thread: Background[Any]) -> None:
    """End the process around a thread that still computes: the interpreter's own way out would crash in it."""
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if "SUBMITIT_EXECUTOR" in os.environ else 1)  # as job.py and an inline radhpc end
