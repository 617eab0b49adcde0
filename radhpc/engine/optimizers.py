"""AdamW in its kinds, and its moments as plain tensors.

Between fsdp.py and torch's or bitsandbytes' optimizers. A checkpoint always holds the moments in float32, so that
every engine and every kind reads it:

    optimizer = build(groups, recipe)          # groups as engine.groups() makes them
    moments(optimizer, parameter)              # {"exp_avg": ..., "exp_avg_sq": ...}: this rank's part, flat
    set_moments(optimizer, parameter, {...}, steps)

The eight-bit kinds keep each moment as codes and one scale per 256 numbers of a rank's part. Saved are the float32
values that these stand for, and the scales beside them: on as many ranks as before, codes and scales come back bit for
bit; on another number, whose parts have other blocks, the values are quantised anew.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from radhpc.core.recipe import OptimizerSettings
from radhpc.models import compat_bitsandbytes
from radhpc.models.compat_bitsandbytes import MOMENT_BLOCK

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scales", "exp_avg_sq_scales")
_NAMES = dict(zip(MOMENTS, compat_bitsandbytes.MOMENTS, strict=True))


class ShardOptimizer(torch.optim.Optimizer):
    """bitsandbytes' AdamW over this rank's parts of the parameters: its kernels know no sharded tensors."""

    def __init__(self, kind: type, groups: list[dict[str, Any]], **options: Any) -> None:
        self._parts: dict[nn.Parameter, nn.Parameter] = {}
        for group in groups:
            for parameter in group["params"]:
                part = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
                self._parts[parameter] = nn.Parameter(part.detach())
        local = [{**group, "params": [self._parts[p] for p in group["params"]]} for group in groups]
        self.inner = kind(local, **options)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Called with the optimizer of the parts, which have their gradients by then."""
        return self.inner.register_step_pre_hook(hook)

    def part(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._parts[parameter]

    def step(self, closure: Any = None) -> None:
        """One step from the gradients of the parameters themselves."""
        for parameter, part in self._parts.items():
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            part.grad = gradient if gradient is not None and gradient.numel() else None
        self.inner.step()
        for part in self._parts.values():
            part.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._parts:
            parameter.grad = None


def build(groups: list[dict[str, Any]], stage: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of a stage."""
    options: dict[str, Any] = {"lr": stage.learning_rate, "betas": stage.betas, "eps": stage.epsilon}
    if stage.kind == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    import bitsandbytes

    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "adamw_paged": bitsandbytes.optim.PagedAdamW,
        "adamw_8bit_paged": bitsandbytes.optim.PagedAdamW8bit,
    }
    return ShardOptimizer(kinds[stage.kind], groups, **options)


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's part of a parameter's moments, flat and in float32; with eight bits the scales, too. Empty before the
    first step, and on a rank that holds nothing of the parameter.
    """
    if not isinstance(optimizer, ShardOptimizer):
        state = optimizer.state.get(parameter) or {}
        return {name: _flat(state[name]) for name in MOMENTS if name in state}
    state = optimizer.state.get(optimizer.part(parameter)) or {}
    found = {}
    for name, scales in zip(MOMENTS, SCALES, strict=True):
        values, codes, absmax = _NAMES[name]
        if values not in state:
            continue
        if state[values].dtype == torch.uint8:
            found[name] = _dequantised(state[values], state[codes], state[absmax])
            found[scales] = state[absmax].detach().reshape(-1)
        else:
            found[name] = _flat(state[values])
    return found


def set_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, values: dict[str, torch.Tensor], steps: int
) -> None:
    """What moments() gave, after so many steps. Scales may be missing."""
    if not isinstance(optimizer, ShardOptimizer):
        like = parameter.detach()
        local = like.to_local() if isinstance(like, DTensor) else like
        state: dict[str, Any] = {"step": torch.tensor(float(steps), device=local.device)}
        for name in MOMENTS:
            state[name] = torch.zeros_like(like)
            part = state[name].to_local() if isinstance(like, DTensor) else state[name]
            part.copy_(values[name].view_as(local))
        optimizer.state[parameter] = state
        return
    part = optimizer.part(parameter)
    if not part.numel():
        return
    made = compat_bitsandbytes.initialize_state(optimizer.inner, part)
    made["step"] = steps
    for name, scales in zip(MOMENTS, SCALES, strict=True):
        state_name, codes, absmax = _NAMES[name]
        mine = values[name].to(part.device, torch.float32).reshape(-1)
        if made[state_name].dtype != torch.uint8:
            made[state_name].copy_(mine.view_as(made[state_name]))
            continue
        if scales in values:
            made[absmax].copy_(values[scales])
        else:
            made[absmax].copy_(_blocks(mine, made[absmax].numel()).abs().amax(1))
        made[state_name].copy_(_quantised(mine, made[codes], made[absmax]).view_as(made[state_name]))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().reshape(-1)


def _blocks(values: torch.Tensor, count: int) -> torch.Tensor:
    """(count, 256), the last block filled up with zeros."""
    return nn.functional.pad(values, (0, count * MOMENT_BLOCK - values.numel())).view(count, MOMENT_BLOCK)


def _dequantised(codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    flat = codes.detach().reshape(-1)
    values = _blocks(table[flat.long()], scales.numel()) * scales[:, None]
    return values.reshape(-1)[: flat.numel()]


def _quantised(values: torch.Tensor, table: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest code of each value; the table is sorted. What _dequantised() gave finds its own code again."""
    scaled = _blocks(values, scales.numel()) / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize(scaled, middles).to(torch.uint8).reshape(-1)[: values.numel()]
