"""One optimizer step over all ranks, and the trained state as plain tensors.

FSDP2 where there are several ranks, the bare model where there is one. The loss of a step is the sum over the global
batch divided by its supervised tokens, so FSDP is told to sum gradients, not to average them: then 1, 2, 3 or 4 ranks
give the same step up to the order of floating-point sums.
"""

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from radhpc.adapters import Tensors, canonical
from radhpc.blocks import leave_casting_to_autocast, prepare_blocks
from radhpc.collate import Batch
from radhpc.dist import Ranks
from radhpc.errors import UserError
from radhpc.host import remember
from radhpc.objective import NextToken
from radhpc.recipe import Optimizer, Recipe

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was like; the same on every rank."""

    loss: float  # mean over the supervised tokens of the global batch
    gradient_norm: float
    learning_rates: dict[str, float]  # by group


class Engine:
    """The model on its device or devices, with the optimizer of one stage."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, stage: Optimizer, blocks: tuple[type, ...], ranks: Ranks
    ) -> None:
        if recipe.engine == "single" and ranks.world > 1:
            raise UserError(f"engine 'single' on {ranks.world} ranks: allowed is 'fsdp', or a profile with one task")
        self.model, self.ranks, self._objective = model, ranks, NextToken()
        self._clip = stage.clip
        self._autocast: Any = contextlib.nullcontext()
        bf16 = recipe.precision == "bf16"
        prepare_blocks(model, blocks, recipe.model.checkpoint_activations, recipe.model.compile)
        if ranks.world > 1:
            _shard(model, blocks, ranks, bf16)
        else:
            model.to(ranks.device)
            if bf16:
                self._autocast = torch.autocast(ranks.device.type, torch.bfloat16)
                leave_casting_to_autocast(model)
        self.trained = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            _groups(self.trained, stage), lr=stage.learning_rate, betas=stage.betas, eps=stage.epsilon
        )

    def step(
        self,
        batches: Sequence[Batch],
        supervised: int,
        schedule: float,
        check: Callable[[], None] = lambda: None,
    ) -> StepReport:
        """One step over this rank's micro-batches. `supervised`: tokens of the whole global batch; `schedule`: the
        factor on every learning rate. Every rank must give as many batches as its peers.

        `check` is called between two micro-batches, on all ranks alike, and may raise to end the step: parameters and
        moments are then those before it.
        """
        self.model.train()
        total = torch.zeros((), dtype=torch.float64)
        for n, batch in enumerate(batches):
            if n:
                check()
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(n == len(batches) - 1)
            with self._autocast:
                loss = self._objective(self.model, self.to_device(batch))
            (loss / max(1, supervised)).backward()
            total += loss.detach().double().cpu()
        norm = _full(nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None]))
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self.trained.values(), self._clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        (loss_sum,) = self.ranks.sum([float(total)])
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return StepReport(loss_sum / max(1, supervised), float(norm), rates)

    def warm_up(self, batch: Batch) -> None:
        """A forward and a backward pass that leave nothing but what was compiled. All ranks call it alike."""
        self.model.train()
        with self._autocast:
            loss = self._objective(self.model, self.to_device(batch))
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> float:
        """The summed loss of a batch, without training. Under FSDP all ranks must call it together."""
        self.model.eval()
        with self._autocast:
            return float(self._objective(self.model, self.to_device(batch)))

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int) -> torch.Tensor:
        """Greedy decoding; (batch, new tokens). Under FSDP all ranks call it together, with one batch each."""
        self.model.eval()
        inputs = {name: value for name, value in self.to_device(batch).items() if name != "labels"}
        with self._autocast:
            ids = self.model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                synced_gpus=isinstance(self.model, FSDPModule),  # no rank stops before the last one has
            )
        return torch.as_tensor(ids)[:, batch["input_ids"].shape[1] :].cpu()

    def to_device(self, batch: Batch) -> Batch:
        device = self.ranks.device
        return {name: remember(value.to(device, non_blocking=True), value) for name, value in batch.items()}

    def weights(self) -> Tensors:
        """The trained parameters, whole, on the CPU. All ranks must call it; only rank 0 gets them."""
        return self._collect({name: parameter.detach() for name, parameter in self.trained.items()})

    def state(self) -> Tensors:
        """Parameters under their names, Adam's moments under `exp_avg/` and `exp_avg_sq/`. As weights()."""
        tensors = {name: parameter.detach() for name, parameter in self.trained.items()}
        for name, parameter in self.trained.items():
            state = self.optimizer.state.get(parameter)
            if state:
                tensors |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS}
        return self._collect(tensors)

    def load(self, tensors: Tensors, steps: int) -> None:
        """Restore what state() gave, after `steps` optimizer steps of this stage. All ranks give the same tensors."""
        assert self.trained.keys() == {name for name in tensors if "/" not in name}
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(_like(tensors[name], parameter))
                if steps:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(steps)),
                        **{m: _like(tensors[f"{m}/{name}"], parameter).clone() for m in _MOMENTS},
                    }

    def _collect(self, tensors: Tensors) -> Tensors:
        whole = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # a collective: on all ranks
            if self.ranks.first:
                whole[name] = full.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return whole


def schedule(stage: Optimizer, step: int, steps: int) -> float:
    """The factor on the learning rate at a step (from 0) of a stage: a pure function, so there is no state to save."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return 1.0
    done = (step - stage.warmup_steps) / max(1, steps - stage.warmup_steps)
    falling = 1 - done if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return stage.final + (1 - stage.final) * falling


def _shard(model: nn.Module, blocks: tuple[type, ...], ranks: Ranks, bf16: bool) -> None:
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    for module in model.modules():
        if isinstance(module, blocks):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
            ranks.time(module)


def _groups(trained: dict[str, nn.Parameter], stage: Optimizer) -> list[dict[str, Any]]:
    """Parameter groups by learning rate and by decay: the first matching entry of `groups` decides the rate."""
    groups: dict[str, dict[str, Any]] = {}
    matched = dict.fromkeys((group.match for group in stage.groups), 0)
    for name, parameter in trained.items():
        group = next((g for g in stage.groups if re.search(g.match, name)), None)
        if group is not None:
            matched[group.match] += 1
        decay = stage.weight_decay if parameter.ndim >= 2 else 0.0
        label = (group.match if group else "base") + ("" if decay == stage.weight_decay else " without decay")
        peak = stage.learning_rate * (group.scale if group else 1.0)
        groups.setdefault(label, {"params": [], "name": label, "peak": peak, "lr": peak, "weight_decay": decay})
        groups[label]["params"].append(parameter)
    for pattern, count in matched.items():
        if not count:
            raise UserError(f"optimizer.groups: '{pattern}' matches no trained parameter")
    return list(groups.values())


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """A whole tensor, laid out as the parameter is."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
