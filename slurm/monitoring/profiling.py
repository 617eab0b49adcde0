"""Ask the living job of a run for a profiler's trace, and wait for it. The other side is radhpc/training/profiling.py.

trace(run, steps=10, seconds=600)     # {"first": 120, "last": 129, "trace": ".../step-000120.json.gz", ...}
"""

import json
import time
from typing import Any

from radhpc.core.errors import UserError
from radhpc.core.files import read_json, write_atomically
from radhpc.core.protocol import TRACE_FOLDER, TRACE_REQUEST
from radhpc.core.run_folder import RunFolder
from slurm import scheduler


def trace(run: RunFolder, steps: int, seconds: float) -> dict[str, Any]:
    """Request a trace and return the job's summary of it. Raises UserError where no job runs, or none came in time."""
    if scheduler.state(run.job()) != "RUNNING":
        raise UserError(f"{run.path}: no running job to trace")
    request = run.folder(TRACE_FOLDER) / TRACE_REQUEST
    known = _traces(run)
    write_atomically(request, json.dumps({"steps": steps}).encode(), 0o600)
    end = time.monotonic() + seconds
    while not (new := _traces(run) - known):
        if time.monotonic() > end:
            request.unlink(missing_ok=True)
            raise UserError(f"{run.path}: no trace after {seconds:.0f} s; --wait longer, or see `radhpc logs`")
        if scheduler.state(run.job()) != "RUNNING" and not _traces(run) - known:
            request.unlink(missing_ok=True)
            raise UserError(f"{run.path}: the job ended before it had made {steps} more steps")
        time.sleep(0.2)
    summary: dict[str, Any] = read_json(run.path / TRACE_FOLDER / max(new)[1])
    return summary


def _traces(run: RunFolder) -> set[tuple[int, str]]:
    """Return the traces there are. A step may be traced again after a restart, so a file is known by its time, too."""
    return {(path.stat().st_mtime_ns, path.name) for path in (run.path / TRACE_FOLDER).glob("step-*.json")}
