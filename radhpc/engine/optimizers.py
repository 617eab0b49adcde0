"""Build AdamW in its kinds, and read and write its moments as plain tensors.

Between fsdp.py and torch's or bitsandbytes' optimizers. A checkpoint always holds the moments in float32, so that
every engine and every kind reads it (state_layout.py):

    optimizer = build(parameter_groups(trained, shapes, recipe), recipe)
    moments(optimizer, parameter)              # {"exp_avg": ..., "exp_avg_sq": ...}: this rank's part, flat
    set_moments(optimizer, parameter, {...}, steps)

The eight-bit kinds keep each moment as codes and one scale per 256 numbers of a rank's part. Saved are the float32
values that these stand for, and the scales as well: on as many ranks as before, codes and scales come back bit for
bit; on another number, whose parts have other blocks, the values are quantized anew.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from radhpc.core.errors import UserError
from radhpc.core.recipe import OptimizerSettings
from radhpc.distributed.shard_layout import local_shard
from radhpc.engine.state_layout import MOMENTS, SCALES
from radhpc.models import compat_bitsandbytes
from radhpc.models.compat_bitsandbytes import MOMENT_BLOCK

_NAMES = dict(zip(MOMENTS, compat_bitsandbytes.MOMENTS, strict=True))


class ShardOptimizer(torch.optim.Optimizer):
    """bitsandbytes' AdamW over this rank's parts of the parameters: its kernels know no sharded tensors."""

    def __init__(self, kind: type, groups: list[dict[str, Any]], **options: Any) -> None:
        self._shards: dict[nn.Parameter, nn.Parameter] = {}
        for group in groups:
            for parameter in group["params"]:
                self._shards[parameter] = nn.Parameter(local_shard(parameter).detach())
        local = [{**group, "params": [self._shards[p] for p in group["params"]]} for group in groups]
        self.inner = kind(local, **options)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Call a hook with the optimizer of the parts, which have their gradients by then."""
        return self.inner.register_step_pre_hook(hook)

    def shard(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return this rank's part of a parameter, which is what the inner optimizer knows."""
        return self._shards[parameter]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one step from the gradients of the parameters themselves."""
        for parameter, shard in self._shards.items():
            gradient = None if parameter.grad is None else local_shard(parameter.grad)
            shard.grad = gradient if gradient is not None and gradient.numel() else None
        self.inner.step()
        for shard in self._shards.values():
            shard.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._shards:
            parameter.grad = None


def parameter_groups(
    trained: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], stage: OptimizerSettings
) -> list[dict[str, Any]]:
    """Group parameters by learning rate and by decay: the first matching entry of the stage's `groups` decides the
    rate. `shapes`: of the whole parameters, as an engine may leave empty tensors in their places.

    Raises UserError for an entry that matches nothing.
    """
    groups: dict[str, dict[str, Any]] = {}
    matched = dict.fromkeys((entry.match for entry in stage.groups), 0)
    for name, parameter in trained.items():
        entry = next((each for each in stage.groups if re.search(each.match, name)), None)
        if entry is not None:
            matched[entry.match] += 1
        decay = stage.weight_decay if len(shapes[name]) >= 2 else 0.0
        label = (entry.match if entry else "base") + ("" if decay == stage.weight_decay else " without decay")
        peak = stage.learning_rate * (entry.scale if entry else 1.0)
        groups.setdefault(label, {"params": [], "name": label, "peak": peak, "lr": peak, "weight_decay": decay})
        groups[label]["params"].append(parameter)
    for pattern, count in matched.items():
        if not count:
            raise UserError(f"optimizer.groups: '{pattern}' matches no trained parameter")
    return list(groups.values())


def build(groups: list[dict[str, Any]], stage: OptimizerSettings) -> torch.optim.Optimizer:
    """Build the optimizer of a stage over groups as parameter_groups() makes them."""
    options: dict[str, Any] = {"lr": stage.learning_rate, "betas": stage.betas, "eps": stage.epsilon}
    if stage.kind == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    from bitsandbytes import optim

    library: Any = optim  # which exports its classes without saying so
    kinds = {
        "adamw_8bit": library.AdamW8bit,
        "adamw_paged": library.PagedAdamW,
        "adamw_8bit_paged": library.PagedAdamW8bit,
    }
    return ShardOptimizer(kinds[stage.kind], groups, **options)


def learning_rate_factor(stage: OptimizerSettings, step: int, steps: int) -> float:
    """Return the factor on the learning rate at a step (from 0) of a stage: a pure function, so that there is no state
    to save.
    """
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return 1.0
    done = (step - stage.warmup_steps) / max(1, steps - stage.warmup_steps)
    falling = 1 - done if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return stage.final + (1 - stage.final) * falling


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return this rank's part of a parameter's moments, flat and in float32; with eight bits the scales, too. Empty
    before the first step, and on a rank that holds nothing of the parameter.
    """
    if not isinstance(optimizer, ShardOptimizer):
        state = optimizer.state.get(parameter) or {}
        return {name: _flat(state[name]) for name in MOMENTS if name in state}
    state = optimizer.state.get(optimizer.shard(parameter)) or {}
    tensors = {}
    for name, scales in zip(MOMENTS, SCALES, strict=True):
        values, codes, absmax = _NAMES[name]
        if values not in state:
            continue
        if state[values].dtype == torch.uint8:
            tensors[name] = _dequantized(state[values], state[codes], state[absmax])
            tensors[scales] = state[absmax].detach().reshape(-1)
        else:
            tensors[name] = _flat(state[values])
    return tensors


def set_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, values: dict[str, torch.Tensor], steps: int
) -> None:
    """Take over what moments() returned after so many steps. Scales may be missing."""
    if not isinstance(optimizer, ShardOptimizer):
        like = parameter.detach()
        local = local_shard(like)
        state: dict[str, Any] = {"step": torch.tensor(float(steps), device=local.device)}
        for name in MOMENTS:
            state[name] = torch.zeros_like(like)
            local_shard(state[name]).copy_(values[name].view_as(local))
        optimizer.state[parameter] = state
        return
    shard = optimizer.shard(parameter)
    if not shard.numel():
        return
    state = compat_bitsandbytes.initialize_state(optimizer.inner, shard)
    state["step"] = steps
    for name, scales in zip(MOMENTS, SCALES, strict=True):
        state_name, codes, absmax = _NAMES[name]
        flat = values[name].to(shard.device, torch.float32).reshape(-1)
        if state[state_name].dtype != torch.uint8:
            state[state_name].copy_(flat.view_as(state[state_name]))
            continue
        if scales in values:
            state[absmax].copy_(values[scales])
        else:
            state[absmax].copy_(_blocks(flat, state[absmax].numel()).abs().amax(1))
        state[state_name].copy_(_quantized(flat, state[codes], state[absmax]).view_as(state[state_name]))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return local_shard(tensor).detach().reshape(-1)


def _blocks(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return (count, 256), the last block filled up with zeros."""
    return nn.functional.pad(values, (0, count * MOMENT_BLOCK - values.numel())).view(count, MOMENT_BLOCK)


def _dequantized(codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    flat = codes.detach().reshape(-1)
    values = _blocks(table[flat.long()], scales.numel()) * scales[:, None]
    return values.reshape(-1)[: flat.numel()]


def _quantized(values: torch.Tensor, table: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the nearest code of each value; the table is sorted. A value of _dequantized() gets its own code again."""
    scaled = _blocks(values, scales.numel()) / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize(scaled, middles).to(torch.uint8).reshape(-1)[: values.numel()]
