"""One optimizer step over all ranks, and the trained state as plain tensors.

    engine = Engine(model, recipe, stage.optimizer, family.blocks, ranks)       # or zero.ZeroEngine, by recipe.engine
    engine.load(tensors, steps)                                                 # of any engine and number of ranks
    report = engine.step(batches, supervised, schedule(...))                    # all ranks together
    tensors = engine.state()                                                    # whole, on rank 0

The loss of a step is the sum over the global batch divided by its supervised tokens, so gradients are summed over the
ranks, not averaged: then 1, 2, 3 or 4 ranks give the same step up to the order of floating-point sums. Trained
parameters, their gradients' sums and their moments are float32 in every precision; frozen ones are kept in the type of
the computation.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from radhpc.core.batch import Batch
from radhpc.core.errors import UserError
from radhpc.core.recipe import ObjectiveSettings, OptimizerSettings, Recipe
from radhpc.data.collate import TARGET_KEYS
from radhpc.distributed import shard_layout
from radhpc.distributed.host_staging import keep_host_values
from radhpc.distributed.ranks import Ranks
from radhpc.engine import optimizers
from radhpc.engine.flop_counter import FlopMeter
from radhpc.engine.objective import Objective, random_state, set_random_state
from radhpc.engine.sam import ascent_step
from radhpc.models.adapters import Tensors, canonical
from radhpc.models.layers import leave_casting_to_autocast, prepare_blocks
from radhpc.models.lazy_loading import materialize

_LOSS_SCALE = "engine/loss_scale"
_BUCKET = 1 << 25  # numbers that go into one collective, from all ranks together


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was like; the same on every rank."""

    loss: float  # that is minimised, over the global batch: by default the mean over its supervised tokens
    gradient_norm: float
    learning_rates: dict[str, float]  # by group
    terms: dict[str, float]  # of the objective, by name, without their weights
    by_group: tuple[tuple[float, float], ...] = ()  # summed token loss and tokens of each of StudyEncoder.loss_groups


class Engine:
    """The model on its device or devices, with the optimizer of one stage.

    FSDP2 over several ranks, the bare model on one. With `replicate` every rank holds the whole model and its
    optimizer, and a step has one collective: the sum of the gradients. Adapters on a base that fits into one GPU want
    that: their gradients are small, while FSDP2 would gather the frozen base block by block in every pass.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        stage: OptimizerSettings,
        blocks: tuple[type, ...],
        ranks: Ranks,
        objective: ObjectiveSettings = ObjectiveSettings(),  # type: ignore[call-arg]  # noqa: B008
    ) -> None:
        check(recipe, ranks)
        self.model, self.ranks, self._objective = model, ranks, Objective(objective, model)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
        self.scaler = LossScale() if recipe.precision == "fp16" else None
        self._clip, self._stage = stage.clip, stage
        self.meter = FlopMeter(recipe.engine, recipe.model.quantise is not None, recipe.model.compile)
        prepare_blocks(model, blocks, recipe.model.checkpoint_activations, recipe.model.compile)
        self._lay_out(recipe, blocks)
        self.trained = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        self._start()

    # What differs between the engines

    def _lay_out(self, recipe: Recipe, blocks: tuple[type, ...]) -> None:
        """Bring the model to the devices."""
        sharded = self.ranks.world > 1 and not recipe.replicate
        shard = partial(_shard, blocks=blocks, ranks=self.ranks, dtype=self.dtype) if sharded else None
        materialize(self.model, self.ranks, self.dtype, shard)
        self._replicated = self.ranks.world > 1 and not sharded
        self._autocast: Any = contextlib.nullcontext()
        if not sharded and self.dtype != torch.float32:
            self._autocast = torch.autocast(self.ranks.device.type, self.dtype)
            leave_casting_to_autocast(self.model)

    def _start(self) -> None:
        """Make the optimizer."""
        self.optimizer = optimizers.build(groups(self.trained, self._stage), self._stage)

    @property
    def lockstep(self) -> bool:
        """Whether every rank must make as many forward passes as its peers."""
        return isinstance(self.model, FSDPModule)

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def _update(self, scale: float, again: Callable[[], None]) -> float | None:
        """Sum, clip, step: the gradients are `scale` times too large. Gives their norm, and changes nothing and gives
        None where it is not finite. `again` makes the same passes once more, where parameters now are.
        """
        norm = self._gradient_norm(scale)
        if norm is not None and self._stage.sharpness is not None:
            with self._objective.silently(), ascent_step(self.trained, self._stage.sharpness, norm * scale):
                again()
                norm = self._gradient_norm(scale)
        if norm is None:
            self.optimizer.zero_grad(set_to_none=True)
            return None
        if scale != 1:
            for parameter in self.trained.values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self.trained.values(), self._clip, torch.tensor(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _gradient_norm(self, scale: float) -> float | None:
        """Of the whole gradient, with the terms that are added once per step; None where it is not finite."""
        if self._replicated:
            self._sum([parameter.grad for parameter in self.trained.values() if parameter.grad is not None])
        self._objective.regularise(self.trained, scale)
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        norm = float(_full(nn.utils.get_total_norm(gradients))) / scale
        return norm if math.isfinite(norm) else None

    def _pieces(self, moments: bool) -> dict[str, torch.Tensor]:
        """This rank's part of what is saved, flat, by its name in a checkpoint: the whole is theirs in the order of
        ranks. A rank without a part of something leaves it out.
        """
        pieces = {}
        for name, parameter in self.trained.items():
            pieces[name] = shard_layout.local_shard(parameter).detach().reshape(-1)
            if moments:
                for moment, tensor in optimizers.moments(self.optimizer, parameter).items():
                    pieces[self._saved_name(moment, name)] = tensor
        return pieces

    def _restore(self, tensors: Tensors, steps: int) -> None:
        for name, parameter in self.trained.items():
            with torch.no_grad():
                shard_layout.local_shard(parameter).copy_(shard_layout.shard_like(tensors[name], parameter))
            if steps:
                values = {
                    m: shard_layout.shard_like(tensors[f"{m}/{name}"], parameter).reshape(-1)
                    for m in optimizers.MOMENTS
                }
                for scales in optimizers.SCALES:
                    saved = tensors.get(self._saved_name(scales, name))
                    if saved is not None:
                        values[scales] = self._my_scales(saved, parameter)
                optimizers.set_moments(self.optimizer, parameter, values, steps)

    # What does not

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

        In fp16 a step whose gradients overflow is made again from the same batches and random numbers with half the
        loss scale, until they do not: no step is ever left out, so that each sample is trained on exactly once.

        Raises UserError where the gradients are not finite: the parameters are then those before the step.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule
        random = random_state(self.ranks.device)

        def passes() -> None:
            self._passes(batches, supervised, scale, check)

        def again() -> None:
            check()
            set_random_state(random, self.ranks.device)
            passes()

        scale = self.scaler.value if self.scaler is not None else 1.0
        passes()
        while (norm := self._update(scale, again)) is None:
            if self.scaler is None or not self.scaler.halve():
                raise UserError(
                    f"the gradients of this step are not finite (loss {self._objective.loss():g}); nothing was changed "
                    "by it: a smaller optimizer.learning_rate, longer warmup_steps, or precision bf16 or fp32 may help"
                )
            scale = self.scaler.value
            self.meter.restart()
            again()
        if self.scaler is not None:
            self.scaler.good()
        self.meter.close(sum(len(batch["labels"]) for batch in batches))
        terms, by_group = self._objective.values()
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return StepReport(self._objective.weighted(terms), norm, rates, terms, by_group)

    def _passes(self, batches: Sequence[Batch], supervised: int, scale: float, check: Callable[[], None]) -> None:
        """Forward and backward over the micro-batches; leaves the gradients, `scale` times too large."""

        def look(batch: Batch) -> None:
            check()
            self._loss(batch)

        self._objective.begin(batches, supervised, self.ranks, look)
        for n, batch in enumerate(batches):
            if n:
                check()
            last = n == len(batches) - 1
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(last)
            with self.meter.forward():
                loss = self._loss(batch)
            self._backward(loss * (scale / max(1, supervised)), last)

    def _loss(self, batch: Batch) -> torch.Tensor:
        with self._autocast:
            return self._objective(self._forward, self.to_device(batch))

    @property
    def _forward(self) -> nn.Module:
        """What a forward pass is called on."""
        return self.model

    def warm_up(self, batch: Batch, counted: bool = False) -> None:
        """A forward and a backward pass that leave nothing but what was compiled, or `counted` by the meter. All ranks
        call it alike.
        """
        self.model.train()
        with self.meter.forward(anyway=True) if counted else contextlib.nullcontext():
            loss = self._loss(batch)
        self._backward(loss, last=True)
        self.optimizer.zero_grad(set_to_none=True)
        if counted:
            self.meter.close(len(batch["labels"]))

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> float:
        """The summed loss of a batch, without training. In lockstep all ranks must call it together."""
        self.model.eval()
        return float(self._loss(batch))

    @torch.no_grad()
    def predict_findings(self, batch: Batch) -> torch.Tensor | None:
        """The probability of each finding by the multi-label head, (batch, names); None where the stage has none. As
        loss_sum().
        """
        self.model.eval()
        with self._autocast:
            found = self._objective.predict_findings(self._forward, self.to_device(batch))
        return None if found is None else found.float().cpu()

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, **decoding: Any) -> torch.Tensor:
        """Greedy decoding, unless arguments of transformers' generate() say otherwise; (batch, new tokens). In lockstep
        all ranks call it together, with one batch each.
        """
        self.model.eval()
        inputs = {name: value for name, value in self.to_device(batch).items() if name not in TARGET_KEYS}
        with self._autocast:
            ids = self.model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                **{"do_sample": False, **decoding},
                synced_gpus=self.lockstep,  # no rank stops before the last one has
            )
        return torch.as_tensor(ids)[:, batch["input_ids"].shape[1] :].cpu()

    @torch.no_grad()
    def next_logits(self, batch: Batch) -> torch.Tensor:
        """Of the token that follows each row of a batch padded on the left: (batch, vocabulary), float32 on the CPU.
        In lockstep all ranks call it together.
        """
        self.model.eval()
        inputs = {name: value for name, value in self.to_device(batch).items() if name not in TARGET_KEYS}
        with self._autocast:
            return torch.as_tensor(self._forward(**inputs).logits)[:, -1].float().cpu()

    def to_device(self, batch: Batch) -> Batch:
        device = self.ranks.device
        return {name: keep_host_values(value.to(device, non_blocking=True), value) for name, value in batch.items()}

    def weights(self) -> Tensors:
        """The trained parameters, whole, on the CPU. All ranks must call it; only rank 0 gets them."""
        return self._collect(self._pieces(moments=False))

    def state(self) -> Tensors:
        """Parameters under their names, Adam's moments under `exp_avg/` and `exp_avg_sq/`; with eight-bit moments their
        scales, and in fp16 the loss scale. As weights().
        """
        tensors = self._collect(self._pieces(moments=True))
        if self.scaler is not None and self.ranks.first:
            tensors[_LOSS_SCALE] = self.scaler.state()
        return tensors

    def load(self, tensors: Tensors, steps: int) -> None:
        """Restore what state() gave, after `steps` optimizer steps of this stage. All ranks give the same tensors,
        which any engine, precision and number of ranks may have saved.
        """
        assert self.trained.keys() == {name for name in tensors if "/" not in name}
        self._restore(tensors, steps)
        if self.scaler is not None and _LOSS_SCALE in tensors:
            self.scaler.restore(tensors[_LOSS_SCALE])

    def _saved_name(self, kind: str, name: str) -> str:
        """Scales belong to the parts that this number of ranks has; everything else to the parameter."""
        return f"{kind}-{self._parts_of_state}/{name}" if kind in optimizers.SCALES else f"{kind}/{name}"

    @property
    def _parts_of_state(self) -> int:
        return 1 if self._replicated else self.ranks.world

    def _my_scales(self, saved: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Of the scales of all ranks' parts those of this rank's."""
        if not isinstance(parameter, DTensor):
            return saved
        count, world = parameter.shape[0], self.ranks.world
        dealt = [shard_layout.rank_rows(count, rank, world) for rank in range(world)]
        sizes = [(theirs.stop - theirs.start) * parameter.numel() // max(1, count) for theirs in dealt]
        blocks = [-(-size // 256) if size >= 4096 else 0 for size in sizes]
        first = sum(blocks[: self.ranks.rank])
        return saved[first : first + blocks[self.ranks.rank]]

    def _sum(self, gradients: Sequence[torch.Tensor]) -> None:
        """Over all ranks, in place, in buckets."""
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with self.ranks.timed():
                dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _collect(self, pieces: dict[str, torch.Tensor]) -> Tensors:
        """Whole tensors on rank 0, on the CPU, with the shapes of their parameters: few collectives, whatever the
        number of tensors, and no rank but the first holds more than its own part.
        """
        first, world = self.ranks.first, self.ranks.world
        if world == 1 or self._replicated:
            return {name: self._shaped(name, part.cpu(), clone=True) for name, part in pieces.items()} if first else {}
        sizes = self.ranks.gather({name: part.numel() for name, part in pieces.items()})
        names = list(dict.fromkeys(name for theirs in sizes for name in theirs))
        whole: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        while names:
            bucket, total = [], 0
            while names and total * world < _BUCKET:
                bucket.append(names.pop(0))
                total += max(theirs.get(bucket[-1], 0) for theirs in sizes)
            lengths = [sum(theirs.get(name, 0) for name in bucket) for theirs in sizes]
            mine = torch.zeros(max(lengths), dtype=torch.float32, device=self.ranks.device)
            parts = [pieces[name].float() for name in bucket if name in pieces]
            if parts:
                torch.cat(parts, out=mine[: lengths[self.ranks.rank]])
            gathered = [torch.empty_like(mine) for _ in range(world)] if first else None
            with self.ranks.timed():
                dist.gather(mine, gathered)
            for theirs, flat in zip(sizes, gathered or [], strict=False):
                split = flat[: sum(theirs.get(name, 0) for name in bucket)].cpu()
                for name, part in zip(bucket, split.split([theirs.get(name, 0) for name in bucket]), strict=True):
                    whole[name].append(part)
        return {name: self._shaped(name, torch.cat(parts)) for name, parts in whole.items()} if first else {}

    def _shaped(self, name: str, flat: torch.Tensor, clone: bool = False) -> torch.Tensor:
        kind, _, parameter = name.rpartition("/")
        flat = flat.clone() if clone else flat
        return flat if kind.startswith(optimizers.SCALES) else flat.view(self._shape(self.trained[parameter]))

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape


class LossScale:
    """The factor that keeps fp16's small gradients from vanishing: halved where they overflow, doubled after 2,000 good
    steps (Micikevicius et al., 2018, Mixed Precision Training). Part of a checkpoint.
    """

    PATIENCE, LARGEST = 2000, 2.0**24

    def __init__(self) -> None:
        self.value, self._good = 2.0**16, 0

    def halve(self) -> bool:
        """After an overflow; False where a smaller scale would be no scale at all."""
        self.value, self._good = self.value / 2, 0
        return self.value >= 1

    def good(self) -> None:
        """After a step."""
        self._good += 1
        if self._good == self.PATIENCE:
            self.value, self._good = min(2 * self.value, self.LARGEST), 0

    def state(self) -> torch.Tensor:
        return torch.tensor([self.value, self._good], dtype=torch.float64)

    def restore(self, state: torch.Tensor) -> None:
        self.value, self._good = float(state[0]), int(state[1])


def check(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse what this job or its GPUs cannot do, before anything is loaded. Raises UserError."""
    recipe.refuse_missing()
    if recipe.engine == "single" and ranks.world > 1:
        raise UserError(
            f"engine 'single' on {ranks.world} ranks: allowed are 'fsdp' and 'deepspeed', or a profile with one task"
        )
    on_gpu = ranks.device.type == "cuda"
    if recipe.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(ranks.device)
        raise UserError(f"precision: bf16: {name} cannot compute in it; allowed here are fp16 and fp32")


def schedule(stage: OptimizerSettings, step: int, steps: int) -> float:
    """The factor on the learning rate at a step (from 0) of a stage: a pure function, so there is no state to save."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return 1.0
    done = (step - stage.warmup_steps) / max(1, steps - stage.warmup_steps)
    falling = 1 - done if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return stage.final + (1 - stage.final) * falling


def _shard(model: nn.Module, blocks: tuple[type, ...], ranks: Ranks, dtype: torch.dtype) -> None:
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, blocks):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
            ranks.time(module)


def groups(trained: dict[str, nn.Parameter], stage: OptimizerSettings) -> list[dict[str, Any]]:
    """Parameter groups by learning rate and by decay: the first matching entry of `groups` decides the rate."""
    found: dict[str, dict[str, Any]] = {}
    matched = dict.fromkeys((group.match for group in stage.groups), 0)
    for name, parameter in trained.items():
        group = next((g for g in stage.groups if re.search(g.match, name)), None)
        if group is not None:
            matched[group.match] += 1
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO leaves an empty tensor in its place
        decay = stage.weight_decay if len(shape) >= 2 else 0.0
        label = (group.match if group else "base") + ("" if decay == stage.weight_decay else " without decay")
        peak = stage.learning_rate * (group.scale if group else 1.0)
        found.setdefault(label, {"params": [], "name": label, "peak": peak, "lr": peak, "weight_decay": decay})
        found[label]["params"].append(parameter)
    for pattern, count in matched.items():
        if not count:
            raise UserError(f"optimizer.groups: '{pattern}' matches no trained parameter")
    return list(found.values())


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
