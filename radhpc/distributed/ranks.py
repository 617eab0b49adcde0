"""Connect the ranks of a job: start, agree, gather, end.

Reads the standard variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which slurm.job sets from
the scheduler's. Without them, or with a world of one, every call works and talks to nobody.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from radhpc.core.compat_torch import DefaultAllGather, DefaultReduceScatter, collectives_begun
from radhpc.distributed.watchdog import Watchdog


class Ranks:
    """This process among its peers."""

    def __init__(self, watchdog: Watchdog | None = None) -> None:
        """Meet the peers. `watchdog` notices a hang; a collective's own timeout is longer than its limits."""
        self.watchdog = watchdog or Watchdog()
        self._waited = 0.0
        # Of a step there are some thousands at the most; what an evaluation leaves is of no use to anybody.
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=1 << 14)
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available():
            # Where the scheduler shows each task its own GPU alone, that one is number 0.
            self.device = torch.device("cuda", local % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        if self.world > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            self.watchdog.beat("meeting the other ranks", slow=True)
            dist.init_process_group(backend, timeout=timedelta(seconds=self.watchdog.limits.collective))
            self.watchdog.collectives = _begun
            self.watchdog.meet(self.gather(self.watchdog.process))

    @property
    def first(self) -> bool:
        """Return whether this is rank 0, the only one that writes to the run folder."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over all ranks, in float64 on the CPU."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with self._waiting():
            dist.all_reduce(tensor, operation)
        return [float(value) for value in tensor]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks, on all ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on all ranks."""
        if self.world == 1:
            return value
        box = [value]
        with self._waiting():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        self.sum([0.0])

    def waited(self) -> float:
        """Return the seconds that this rank has spent in collectives, FSDP's too. On a GPU call it after a step's end,
        when its collectives are over.
        """
        for before, after in self._pending:
            after.synchronize()
            self._waited += before.elapsed_time(after) / 1000
        self._pending.clear()
        return self._waited

    def time(self, module: FSDPModule) -> None:
        """Let waited() count a sharded module's collectives."""
        module.set_custom_all_gather(_TimedAllGather(self))
        module.set_custom_reduce_scatter(_TimedReduceScatter(self))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time one collective of the engine: on a CPU it blocks, on a GPU it is queued and the GPU waits."""
        if self.device.type == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            before.record()
            yield
            after.record()
            self._pending.append((before, after))
        else:
            with self._waiting():
                yield

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        with self.watchdog.wait():
            yield
        self._waited += time.perf_counter() - started

    def close(self) -> None:
        """Leave the group. After an error the peers may be gone, so it is given five seconds."""
        if dist.is_initialized():
            leave = threading.Thread(target=dist.destroy_process_group, daemon=True)
            leave.start()
            leave.join(5)


class _Timed:
    """A mixin that times one of FSDP's collectives; it comes first among the bases."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._ranks.timed():
            return super().__call__(*arguments, **options)  # type: ignore[misc]


class _TimedAllGather(_Timed, DefaultAllGather):
    pass


class _TimedReduceScatter(_Timed, DefaultReduceScatter):
    pass


def _begun() -> int:
    """Return how many collectives this rank has begun, those inside the engine too; any thread may ask."""
    group = dist.group.WORLD
    if group is None:  # the group has been left
        return 0
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return sum(collectives_begun(group, torch.device(device)) for device in devices)


def lost_peer(error: BaseException) -> bool:
    """Return whether an error of a collective says that another rank is gone: the cause lies there, not here."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("connection closed by peer", "connection reset by peer", "gloo/transport", "nccl")
    )
