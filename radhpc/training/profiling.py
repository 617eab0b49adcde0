"""Trace the next steps of a running job with a profiler, on request.

    RUN/profile/request.json      {"steps": 10}: written by `radhpc profile RUN`, taken by the job
    RUN/profile/step-000120.json.gz   the trace of rank 0 over ten steps, for https://ui.perfetto.dev or chrome://tracing
    RUN/profile/step-000120.json      the operators that took longest; also on the board, as text

Rank 0 alone looks for the request, once a second, and traces itself; the other ranks do nothing. A thread writes the
trace while the training goes on.
"""

import contextlib
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

from radhpc.core.board import Board
from radhpc.core.files import read_json, write_atomically
from radhpc.core.protocol import TRACE_FOLDER, TRACE_REQUEST, Event
from radhpc.core.run_folder import RunFolder
from radhpc.distributed.ranks import Ranks
from radhpc.training.loop import Position, StepMetrics

log = logging.getLogger("radhpc")

STEPS = 10
LISTED = 20  # operators
_WRITE_SECONDS = 20.0  # that the end of a stage waits for a trace that is being written


class ProfilerHook:
    """The hook of the loop. On ranks other than 0 it is never called, and close() does nothing."""

    POLL = 1.0  # seconds

    def __init__(self, run: RunFolder, ranks: Ranks, board: Board) -> None:
        self.run, self.ranks, self.board = run, ranks, board
        self._profiler: Any = None
        self._left = 0
        self._polled = 0.0
        self._first = 0
        self._writer: threading.Thread | None = None

    def __call__(self, position: Position, metrics: StepMetrics) -> None:
        if self._profiler is not None:
            self._profiler.step()
            self._left -= 1
            if self._left == 0:
                self._end(position.step)
        elif time.monotonic() - self._polled > self.POLL:
            self._polled = time.monotonic()
            if (steps := self._take_request()) is not None:
                self._begin(position.step + 1, steps)

    def close(self) -> None:
        """Write what was traced so far, if there is time for it, at the end of a stage or of the life."""
        if self._profiler is not None:
            self._end(None)
        if self._writer is not None:
            self._writer.join(_WRITE_SECONDS)

    def _take_request(self) -> int | None:
        """Return the number of steps to trace, and remove the request; None where there is none."""
        path = self.run.path / TRACE_FOLDER / TRACE_REQUEST
        try:
            request = read_json(path)
        except ValueError:
            request = {}
        if request is None or (self._writer is not None and self._writer.is_alive()):
            return None
        path.unlink(missing_ok=True)
        steps = request.get("steps")
        return steps if isinstance(steps, int) and steps > 0 else STEPS

    def _begin(self, first: int, steps: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.ranks.watchdog.beat("starting the profiler", slow=True)  # the first one loads its library
        self._first, self._left = first, steps
        self._profiler = profile(activities=activities, profile_memory=True)
        self._profiler.__enter__()
        log.info("tracing steps %d to %d", first, first + steps - 1)

    def _end(self, last: int | None) -> None:
        profiler, self._profiler = self._profiler, None
        self.ranks.watchdog.beat("ending the profiler", slow=True)
        profiler.__exit__(None, None, None)
        self._writer = threading.Thread(target=self._write, args=(profiler, self._first, last), daemon=True)
        self._writer.start()

    def _write(self, profiler: Any, first: int, last: int | None) -> None:
        folder = self.run.folder(TRACE_FOLDER)
        trace = folder / f"step-{first:06d}.json.gz"
        temporary = folder / f".writing.{trace.name}"
        try:
            profiler.export_chrome_trace(str(temporary))
            temporary.chmod(0o600)
            temporary.replace(trace)
            operators = _longest(profiler, self.ranks.device.type == "cuda")
            summary = {"first": first, "last": last, "trace": str(trace), "operators": operators}
            write_atomically(summary_path(trace), json.dumps(summary, indent=1).encode(), 0o600)
            self.run.record(Event.PROFILED, first=first, last=last, trace=trace.name)
            self.board.text(first, "profile/longest operators", table(operators))
        except Exception as error:  # a profile is never worth a run
            log.warning("the trace of step %d could not be written: %s", first, error)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def summary_path(trace: Path) -> Path:
    """Return the file beside a trace that holds its table of operators."""
    return trace.with_name(trace.name.removesuffix(".gz"))


def _longest(profiler: Any, cuda: bool) -> list[dict[str, Any]]:
    """Return the operators by their own time, without what they called, longest first."""
    rows = []
    for event in profiler.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        rows.append({"operator": event.key, "calls": event.count, "milliseconds": round(own / 1000, 3)})
    total = sum(row["milliseconds"] for row in rows) or 1.0
    rows.sort(key=lambda row: -row["milliseconds"])
    return [{**row, "share": round(row["milliseconds"] / total, 4)} for row in rows[:LISTED]]


def table(operators: list[dict[str, Any]]) -> str:
    """Return the operators as a Markdown table."""
    lines = ["| operator | calls | ms | share |", "|---|---|---|---|"]
    lines += [f"| {o['operator']} | {o['calls']} | {o['milliseconds']:.1f} | {o['share']:.1%} |" for o in operators]
    return "\n".join(lines)
