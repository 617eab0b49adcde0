"""The ranks of a job: start, agree, gather, end.

Reads the standard variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which slurm.job sets from
the scheduler's. Without them, or with a world of one, every call works and talks to nobody.
"""

import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """This process among its peers."""

    def __init__(self, timeout: timedelta = timedelta(minutes=10)) -> None:
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
            dist.init_process_group(backend, timeout=timeout)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes to the run folder."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The element-wise sum over all ranks, in float64 on the CPU."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return [float(value) for value in tensor]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on all ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        self.sum([0.0])

    def close(self) -> None:
        """Leave the group. After an error the peers may be gone, so it is given five seconds."""
        if self.world > 1 and dist.is_initialized():
            leave = threading.Thread(target=dist.destroy_process_group, daemon=True)
            leave.start()
            leave.join(5)


def lost_peer(error: BaseException) -> bool:
    """Whether an error of a collective says that another rank is gone, so that the cause lies there, not here."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("connection closed by peer", "connection reset by peer", "gloo/transport", "nccl")
    )
