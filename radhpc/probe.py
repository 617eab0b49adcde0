"""Measure what only a job can see of a cluster, rank by rank, for `radhpc doctor --probe`; slurm/preflight/probe.py
reads the results.

    <run>/probe/rank-00000.jsonl     {"what": "store", "time": ..., "url": ..., "megabytes_per_second": ...}, ...

Each rank writes to a file of its own, line by line, because its last lines are written while it is being killed: the
ranks' all-reduce, clocks, free space, the speed of the stores, and then every signal and a sign of life four times a
second until SIGKILL comes. It ignores the signals, so the seconds between SIGTERM and SIGKILL are the site's.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from radhpc.core.errors import first_line
from radhpc.core.files import read_json
from radhpc.core.manifest import Manifest
from radhpc.distributed.ranks import Ranks
from radhpc.storage.store import Store

TICK = 0.25  # seconds between two signs of life: the resolution of the measured time of a SIGKILL
STORE_SECONDS = 5  # spent on reading from each URL
PIECE = 1 << 20  # bytes of one read
LONGEST = 900  # seconds until a rank that nobody kills ends by itself
Record = Callable[..., None]  # appends a line


def run(folder: str) -> None:
    """Run one rank of the probe. `folder`/probe/ask.json holds the URLs to read from."""
    rank, place = int(os.environ.get("RANK", "0")), Path(folder) / "probe"
    descriptor = os.open(place / f"rank-{rank:05d}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write_line(kind: str, **fields: Any) -> None:
        os.write(descriptor, (json.dumps({"what": kind, "time": time.time(), **fields}) + "\n").encode())

    def on_signal(number: int, _: FrameType | None) -> None:
        write_line("signal", name=signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, on_signal)
    write_line("started", host=socket.gethostname(), gpu=_gpu())
    for measure in (_ranks, _scheduler, _disks, _stores):
        try:
            measure(write_line, Path(folder), read_json(place / "ask.json")["urls"])
        except Exception as error:  # a failure is a result, too
            write_line("failed", part=measure.__name__.strip("_"), error=f"{type(error).__name__}: {first_line(error)}")
    write_line("measured")
    until = time.monotonic() + LONGEST
    while time.monotonic() < until and not (place / "end").exists():
        time.sleep(TICK)
        write_line("alive")
    write_line("ended")


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _ranks(write_line: Record, folder: Path, urls: Sequence[str]) -> None:
    """Measure an all-reduce over the backend that a training uses, and the difference of the clocks."""
    started = time.perf_counter()
    ranks = Ranks()
    joined = time.perf_counter() - started
    try:
        total = ranks.sum([1.0])[0]
        tensor = torch.ones(4 << 20, device=ranks.device)
        if ranks.world > 1:
            dist.all_reduce(tensor)  # the first one makes the connections
            started = time.perf_counter()
            dist.all_reduce(tensor)
        seconds = time.perf_counter() - started
        backend = str(dist.get_backend_config()) if ranks.world > 1 else "none"
        correct = total == ranks.world and float(tensor[-1]) == ranks.world ** (2 if ranks.world > 1 else 0)
        clocks = []
        for _ in range(5):  # the least of five differences, because a rank may be late for a barrier
            ranks.barrier()
            times = ranks.gather(time.time())
            clocks.append(max(times) - min(times))
        write_line(
            "ranks", world=ranks.world, right=correct, backend=backend, join_seconds=joined,
            megabytes_per_second=tensor.numel() * 4 / 1e6 / seconds, clock_seconds=min(clocks),
        )  # fmt: skip
    finally:
        ranks.close()


def _scheduler(write_line: Record, folder: Path, urls: Sequence[str]) -> None:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    try:
        done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=30, check=False)
        write_line("scontrol", works=done.returncode == 0, error=done.stderr.strip()[:200])
    except (OSError, subprocess.TimeoutExpired) as error:
        write_line("scontrol", works=False, error=first_line(error))


def _disks(write_line: Record, folder: Path, urls: Sequence[str]) -> None:
    for name, path in (("/tmp", Path("/tmp")), ("run folder", folder)):
        write_line("disk", name=name, free_gigabytes=shutil.disk_usage(path).free / 1e9)


def _stores(write_line: Record, folder: Path, urls: Sequence[str]) -> None:
    """Read random megabytes one after the other: latency, and the throughput of one thread of a rank."""
    for url in urls:
        store = Store(url)
        manifest = Manifest.load(store)
        sizes = np.asarray([shard.size for shard in manifest.shards])
        random, read_bytes = np.random.default_rng(os.getpid()), 0
        latencies: list[float] = []
        first = time.perf_counter()
        while time.perf_counter() - first < STORE_SECONDS and len(latencies) < 200:
            shard = int(random.choice(len(sizes), p=sizes / sizes.sum()))
            offset = int(random.integers(0, max(1, sizes[shard] - PIECE)))
            started = time.perf_counter()
            length = min(PIECE, int(sizes[shard]) - offset)
            read_bytes += len(store.read_range(manifest.shards[shard].name, offset, length))
            latencies.append(time.perf_counter() - started)
        write_line(
            "store", url=url, megabytes_per_second=read_bytes / 1e6 / sum(latencies), reads=len(latencies),
            median_seconds=float(np.median(latencies)), slowest_seconds=max(latencies),
        )  # fmt: skip
