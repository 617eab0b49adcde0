"""What only a job can see: `launch.py doctor --on PROFILE --probe` submits one of a minute and reads what it found.

    login node: checks = probe(profile, folder, urls, preempt_with=None)
    every rank: measure(folder)                  # through slurm.job, so with the variables that a training has

Each rank writes what it sees to a file of its own, line by line, because the last lines are written while it is being
killed: an all-reduce over the profile's backend, its clock, the free space, the store's speed, and then every signal
with its time until SIGKILL comes. A rank asks for no mercy: it ignores what it is sent, so that the seconds between
SIGTERM and SIGKILL are the site's, not ours.

The minute ends by the time limit. A preemption cannot be provoked without a second job: `preempt_with` names the
partition that such a one, urgent and harmless, is submitted to.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from radhpc.errors import UserError, first_line
from radhpc.files import read_json, read_lines, write_atomically
from radhpc.run_dir import RunDir
from slurm import scheduler
from slurm.cluster import Cluster, call
from slurm.profile import Profile

WARNING = 30  # seconds of --signal before the limit
TICK = 0.25  # seconds between two signs of life of a rank: so exact is the time of its SIGKILL
STORE_SECONDS = 5  # of reading from each URL


def measure(folder: str) -> None:
    """One rank of the probe job: measure, then write down every signal until the end."""
    rank = int(os.environ.get("RANK", "0"))
    path = Path(folder) / "probe" / f"rank-{rank:05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file:

        def say(what: str, **found: Any) -> None:
            file.write(json.dumps({"what": what, "time": time.time(), **found}) + "\n")

        def on_signal(number: int, _: FrameType | None) -> None:
            say("signal", name=signal.Signals(number).name)

        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, on_signal)
        say("started", host=socket.gethostname(), rank=rank, job=os.environ.get("SLURM_JOB_ID", ""))
        try:
            _measure(Path(folder), rank, say)
        except Exception as error:
            say("failed", error=f"{type(error).__name__}: {first_line(error)}")
        say("measured")
        until = time.monotonic() + 600
        while time.monotonic() < until and not (Path(folder) / "probe" / "end").exists():
            say("alive")
            time.sleep(TICK)
        say("ended")
