"""Compute the rows of a parameter that a rank holds: the one place that knows how FSDP2 distributes them.

FSDP2 cuts along the first axis as torch.chunk() does: every rank gets the same number of rows, rounded up, until none
are left. So 5 rows on 3 ranks are 2, 2 and 1, and 4 rows are 2, 2 and none.

    full[local_rows(parameter)]                   # this rank's shard of a tensor that every rank has
    parameter.grad = dtensor_like(full, parameter)
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard


def rank_rows(count: int, rank: int, world: int) -> slice:
    """Return the rows of a rank, of `count` rows in all."""
    size = -(-count // world)
    return slice(min(count, size * rank), min(count, size * (rank + 1)))


def local_rows(parameter: torch.Tensor) -> slice:
    """Return the rows of a parameter that this rank holds: all of them if it is not sharded. A scalar has one."""
    count = parameter.shape[0] if parameter.ndim else 1
    if not isinstance(parameter, DTensor):
        return slice(0, count)
    (placement,), mesh = parameter.placements, parameter.device_mesh
    assert placement in (Shard(0), Replicate()), placement
    if isinstance(placement, Replicate):
        return slice(0, count)
    return rank_rows(count, mesh.get_local_rank(), mesh.size())


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a parameter, without a copy."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def shard_like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a full tensor, with the parameter's layout, dtype and device."""
    held = local_shard(parameter)
    return (whole[local_rows(parameter)] if whole.ndim else whole).to(held.device, held.dtype)


def dtensor_like(whole: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Return a full tensor as a DTensor of the parameter's layout, to add it to the gradient; no collective."""
    if not isinstance(parameter, DTensor):
        return shard_like(whole, parameter)
    return DTensor.from_local(
        shard_like(whole, parameter), parameter.device_mesh, parameter.placements,
        run_check=False, shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
