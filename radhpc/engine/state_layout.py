"""Lay out the saved state of a stage: the names of its tensors, which of them are whole, and which rank holds what.

A checkpoint holds whole tensors, whatever engine and number of ranks wrote it. Between checkpoint.py, which writes
them, and the engines, which hold parts of them:

    name                     a trained parameter, in float32 and its own shape
    exp_avg/name             its first moment, exp_avg_sq/name the second: float32, the parameter's shape
    exp_avg_scales-2/name    scales of an eight-bit moment, flat, those of 2 ranks one behind the other: optimizers.py
    engine/loss_scale        fp16: the loss scale and the good steps since it changed; whole on every rank

An engine yields its parts as StateShards; gather() makes the whole tensors of them on rank 0:

    layout = StateLayout({"lm_head.weight": torch.Size([400, 32])}, ranks, sharded=True)
    tensors = layout.gather([StateShard("lm_head.weight", "exp_avg", local.reshape(-1), first=6400), ...])
    copy_into([StateShard(...), ...], tensors)      # the way back, for an engine that keeps its parts flat
    layout.local_moments(tensors, name, parameter)  # the way back, for one that shards by rows
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from radhpc.distributed import shard_layout
from radhpc.distributed.ranks import Ranks
from radhpc.models.adapters import Tensors
from radhpc.models.compat_bitsandbytes import MOMENT_BLOCK

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scales", "exp_avg_sq_scales")
LOSS_SCALE = "engine/loss_scale"
BUCKET = 1 << 25  # numbers that go into one collective, from all ranks together
_EIGHT_BIT_LEAST = 4096  # numbers of a shard; bitsandbytes keeps the moments of smaller ones in float32


@dataclass(frozen=True, eq=False)
class StateShard:
    """The part of one saved tensor that a rank holds."""

    parameter: str  # its name
    kind: str  # one of MOMENTS or SCALES, or "" for the parameter itself
    values: torch.Tensor  # flat, and in place where the engine lets it be written
    first: int = 0  # the place of its first number in the whole tensor, which copy_into() goes by


def parameter_names(tensors: Iterable[str]) -> set[str]:
    """Return the names that are parameters, not state of the optimizer or of the engine."""
    return {name for name in tensors if "/" not in name}


def without_optimizer_state(tensors: Tensors) -> Tensors:
    """Return the parameters alone."""
    names = parameter_names(tensors)
    return {name: tensor for name, tensor in tensors.items() if name in names}


class StateLayout:
    """The saved state of one stage over the ranks of one engine."""

    def __init__(self, shapes: Mapping[str, torch.Size], ranks: Ranks, sharded: bool) -> None:
        """`shapes`: of the trained parameters, whole, by name. `sharded`: whether each rank holds only a part of them;
        otherwise every rank holds the whole state.
        """
        self._shapes, self._ranks = dict(shapes), ranks
        self._sharded = sharded and ranks.world > 1

    @property
    def shards(self) -> int:
        """The number of ranks that the state is divided over."""
        return self._ranks.world if self._sharded else 1

    def saved_name(self, kind: str, parameter: str) -> str:
        """Return the name in a checkpoint. Scales belong to the shards of this number of ranks; everything else belongs
        to the parameter.
        """
        if kind in SCALES:
            return f"{kind}-{self.shards}/{parameter}"
        return f"{kind}/{parameter}" if kind else parameter

    def gather(self, shards: Iterable[StateShard]) -> Tensors:
        """Return whole tensors on rank 0, on the CPU, with the shapes of their parameters; nothing on the other ranks.

        All ranks must call it. The shards of a tensor are joined in the order of ranks; a rank without a part of it
        leaves it out. It takes few collectives, whatever the number of tensors, and no rank but the first holds more
        than its own part.
        """
        local = {self.saved_name(shard.kind, shard.parameter): shard.values for shard in shards}
        first, world = self._ranks.first, self._ranks.world
        if not self._sharded:
            return {name: self._reshape(name, part.cpu().clone()) for name, part in local.items()} if first else {}
        sizes = self._ranks.gather({name: part.numel() for name, part in local.items()})
        parts: dict[str, list[torch.Tensor]] = {name: [] for rank_sizes in sizes for name in rank_sizes}
        for bucket in self._buckets(list(parts), sizes):
            lengths = [sum(rank_sizes.get(name, 0) for name in bucket) for rank_sizes in sizes]
            sent = torch.zeros(max(lengths), dtype=torch.float32, device=self._ranks.device)
            own = [local[name].float() for name in bucket if name in local]
            if own:
                torch.cat(own, out=sent[: lengths[self._ranks.rank]])
            received = [torch.empty_like(sent) for _ in range(world)] if first else None
            with self._ranks.timed():
                dist.gather(sent, received)
            for rank_sizes, length, flat in zip(sizes, lengths, received or [], strict=False):
                counts = [rank_sizes.get(name, 0) for name in bucket]
                for name, part in zip(bucket, torch.split(flat[:length].cpu(), counts), strict=True):
                    parts[name].append(part)
        return {name: self._reshape(name, torch.cat(each)) for name, each in parts.items()} if first else {}

    def _buckets(self, names: list[str], sizes: list[dict[str, int]]) -> Iterator[list[str]]:
        """Divide tensors into groups of about BUCKET numbers over all ranks."""
        bucket: list[str] = []
        total = 0
        for name in names:
            bucket.append(name)
            total += max(rank_sizes.get(name, 0) for rank_sizes in sizes)
            if total * self._ranks.world >= BUCKET:
                yield bucket
                bucket, total = [], 0
        if bucket:
            yield bucket

    def _reshape(self, name: str, flat: torch.Tensor) -> torch.Tensor:
        kind, _, parameter = name.rpartition("/")
        return flat if kind.startswith(SCALES) else flat.view(self._shapes[parameter])

    def local_moments(self, tensors: Tensors, name: str, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return this rank's part of a parameter's moments, flat, by MOMENTS; with eight bits also by SCALES, where as
        many ranks have saved them. For engines that shard by rows, or not at all.
        """
        values = {
            kind: shard_layout.shard_like(tensors[self.saved_name(kind, name)], parameter).reshape(-1)
            for kind in MOMENTS
        }
        for kind in SCALES:
            saved = tensors.get(self.saved_name(kind, name))
            if saved is not None:
                values[kind] = self._local_scales(saved, parameter)
        return values

    def _local_scales(self, saved: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Return this rank's scales from those of all ranks, which lie one behind the other."""
        if not isinstance(parameter, DTensor):
            return saved
        count, rank, world = parameter.shape[0], self._ranks.rank, self._ranks.world
        rows = [shard_layout.rank_rows(count, other, world) for other in range(world)]
        sizes = [(each.stop - each.start) * parameter.numel() // max(1, count) for each in rows]
        blocks = [-(-size // MOMENT_BLOCK) if size >= _EIGHT_BIT_LEAST else 0 for size in sizes]
        first = sum(blocks[:rank])
        return saved[first : first + blocks[rank]]


def copy_into(shards: Iterable[StateShard], tensors: Tensors) -> None:
    """Fill shards in place from the whole tensors of a checkpoint."""
    for shard in shards:
        name = f"{shard.kind}/{shard.parameter}" if shard.kind else shard.parameter
        shard.values.copy_(tensors[name].reshape(-1)[shard.first : shard.first + shard.values.numel()])
