"""Make optimizer steps over all ranks: FSDP2, replicas, or one rank.

    engine = Engine(model, recipe, stage.optimizer, family.blocks, ranks)       # or zero.ZeroEngine, by recipe.engine
    engine.load(tensors, steps)                                                 # of any engine and number of ranks
    report = engine.step(batches, supervised, learning_rate_factor(...))        # all ranks together
    tensors = engine.state()                                                    # whole, on rank 0: state_layout.py

The loss of a step is the sum over the global batch divided by its supervised tokens, so gradients are summed over the
ranks, not averaged: 1, 2, 3 or 4 ranks then make the same step up to the order of floating-point sums. Trained
parameters, the sums of their gradients and their moments are float32 in every precision; frozen parameters are kept in
the type of the computation.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from radhpc.core.batch import Batch
from radhpc.core.errors import UserError
from radhpc.core.recipe import ObjectiveSettings, OptimizerSettings, Recipe
from radhpc.distributed import shard_layout
from radhpc.distributed.ranks import Ranks
from radhpc.engine import optimizers
from radhpc.engine.flop_counter import FlopMeter
from radhpc.engine.forward import ForwardEngine
from radhpc.engine.loss_scale import LossScale
from radhpc.engine.objective import Objective, random_state, set_random_state
from radhpc.engine.sam import ascent_step
from radhpc.engine.state_layout import BUCKET, LOSS_SCALE, StateLayout, StateShard, parameter_names
from radhpc.models.adapters import Tensors, canonical
from radhpc.models.layers import leave_casting_to_autocast, prepare_blocks
from radhpc.models.lazy_loading import materialize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepReport:
    """The results of one optimizer step; the same on every rank."""

    loss: float  # that is minimised, over the global batch: by default the mean over its supervised tokens
    gradient_norm: float
    learning_rates: dict[str, float]  # by group
    terms: dict[str, float]  # of the objective, by name, without their weights
    by_group: tuple[tuple[float, float], ...] = ()  # summed token loss and tokens of each of StudyEncoder.loss_groups


class Engine(ForwardEngine):
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
        check_support(recipe, ranks)
        super().__init__(model, ranks, Objective(objective, model))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.dtype = DTYPES[recipe.precision]
        self.scaler = LossScale() if recipe.precision == "fp16" else None
        self._clip, self._stage = stage.clip, stage
        self.meter = FlopMeter(recipe.engine, recipe.model.quantise is not None, recipe.model.compile)
        prepare_blocks(model, blocks, recipe.model.checkpoint_activations, recipe.model.compile)
        self._place_model(recipe, blocks)
        self.trained = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        shapes = {name: self._whole_shape(parameter) for name, parameter in self.trained.items()}
        self._layout = StateLayout(shapes, ranks, sharded=not self._replicated)
        self._build_optimizer()

    # Differs between the engines

    def _place_model(self, recipe: Recipe, blocks: tuple[type, ...]) -> None:
        """Bring the model to the devices, and set `autocast` and `_replicated`."""
        sharded = self.ranks.world > 1 and not recipe.replicate
        shard = partial(_shard, blocks=blocks, ranks=self.ranks, dtype=self.dtype) if sharded else None
        materialize(self.model, self.ranks, self.dtype, shard)
        self._replicated = self.ranks.world > 1 and not sharded
        if not sharded and self.dtype != torch.float32:
            self.autocast = torch.autocast(self.ranks.device.type, self.dtype)
            leave_casting_to_autocast(self.model)

    def _build_optimizer(self) -> None:
        self.optimizer = optimizers.build(self._parameter_groups(), self._stage)

    def _whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape that a trained parameter has in a checkpoint."""
        return parameter.shape

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; `last`: of the step's last one."""
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self, scale: float, repeat_passes: Callable[[], None]) -> float | None:
        """Sum the gradients over the ranks, clip them and step; they are `scale` times too large.

        Returns their norm. Where it is not finite, changes nothing and returns None. `repeat_passes` makes the same
        forward and backward passes once more, with the parameters as they are by then.
        """
        norm = self._gradient_norm(scale)
        if norm is not None and self._stage.sharpness is not None:
            with self._objective.unrecorded(), ascent_step(self.trained, self._stage.sharpness, norm * scale):
                repeat_passes()
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

    def _shards(self, moments: bool) -> Iterator[StateShard]:
        """Yield this rank's part of what is saved: the parameters, and with `moments` the optimizer's state."""
        for name, parameter in self.trained.items():
            yield StateShard(name, "", shard_layout.local_shard(parameter).detach().reshape(-1))
            if moments:
                for kind, tensor in optimizers.moments(self.optimizer, parameter).items():
                    yield StateShard(name, kind, tensor)

    def _restore(self, tensors: Tensors, steps: int) -> None:
        """Take over the parameters, and after `steps` above zero the optimizer's state."""
        for name, parameter in self.trained.items():
            with torch.no_grad():
                shard_layout.local_shard(parameter).copy_(shard_layout.shard_like(tensors[name], parameter))
            if steps:
                values = self._layout.local_moments(tensors, name, parameter)
                optimizers.set_moments(self.optimizer, parameter, values, steps)

    # The same in all engines

    def step(
        self,
        batches: Sequence[Batch],
        supervised: int,
        schedule: float,
        check: Callable[[], None] = lambda: None,
    ) -> StepReport:
        """Make one step over this rank's micro-batches. `supervised`: tokens of the whole global batch; `schedule`: the
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

        def make_passes() -> None:
            self._passes(batches, supervised, scale, check)

        def repeat_passes() -> None:
            check()
            set_random_state(random, self.ranks.device)
            make_passes()

        scale = self.scaler.value if self.scaler is not None else 1.0
        make_passes()
        while (norm := self._update(scale, repeat_passes)) is None:
            if self.scaler is None or not self.scaler.halve():
                loss = self._objective.local_loss()
                raise UserError(
                    f"the gradients of this step are not finite (loss {loss:g}); nothing was changed "
                    "by it: a smaller optimizer.learning_rate, longer warmup_steps, or precision bf16 or fp32 may help"
                )
            scale = self.scaler.value
            self.meter.restart()
            repeat_passes()
        if self.scaler is not None:
            self.scaler.record_step()
        self.meter.close(sum(len(batch["labels"]) for batch in batches))
        terms, by_group = self._objective.reduce_terms()
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return StepReport(self._objective.weighted_sum(terms), norm, rates, terms, by_group)

    def _passes(self, batches: Sequence[Batch], supervised: int, scale: float, check: Callable[[], None]) -> None:
        """Make the forward and backward passes over the micro-batches; leaves the gradients, `scale` times too large.

        The calls of the objective have to come in this order: see objective.Objective.
        """

        def run_forward(batch: Batch) -> None:
            check()
            self._loss(batch)

        self._objective.begin_passes(batches, supervised, self.ranks, run_forward)
        for n, batch in enumerate(batches):
            if n:
                check()
            last = n == len(batches) - 1
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(last)
            with self.meter.forward():
                loss = self._loss(batch)
            self._backward(loss * (scale / max(1, supervised)), last)

    def _gradient_norm(self, scale: float) -> float | None:
        """Return the norm of the whole gradient, including the terms that are added once per step; None where it is not
        finite.
        """
        if self._replicated:
            self._sum_over_ranks([p.grad for p in self.trained.values() if p.grad is not None])
        self._objective.regularise(self.trained, scale)
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm) / scale
        return value if math.isfinite(value) else None

    def _sum_over_ranks(self, gradients: Sequence[torch.Tensor]) -> None:
        """Sum replicas' gradients in place, in buckets."""
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with self.ranks.timed():
                dist.all_reduce(flat)
            counts = [gradient.numel() for gradient in bucket]
            for gradient, part in zip(bucket, torch.split(flat, counts), strict=True):
                gradient.copy_(part.view_as(gradient))

    def warm_up(self, batch: Batch, counted: bool = False) -> None:
        """Make a forward and a backward pass that leave nothing but compiled code, or with `counted` the meter's count.
        All ranks call it alike.
        """
        self.model.train()
        with self.meter.forward(even_if_compiled=True) if counted else contextlib.nullcontext():
            loss = self._loss(batch)
        self._backward(loss, last=True)
        self.optimizer.zero_grad(set_to_none=True)
        if counted:
            self.meter.close(len(batch["labels"]))

    def weights(self) -> Tensors:
        """Return the trained parameters, whole, on the CPU. All ranks must call it; only rank 0 gets them."""
        return self._layout.gather(self._shards(moments=False))

    def state(self) -> Tensors:
        """Return all that a checkpoint holds, under the names of state_layout.py. All ranks must call it; only rank 0
        gets it.
        """
        tensors = self._layout.gather(self._shards(moments=True))
        if self.scaler is not None and self.ranks.first:
            tensors[LOSS_SCALE] = self.scaler.state()
        return tensors

    def load(self, tensors: Tensors, steps: int) -> None:
        """Restore what state() returned after `steps` optimizer steps of this stage. All ranks give the same tensors,
        which any engine, precision and number of ranks may have saved.
        """
        assert self.trained.keys() == parameter_names(tensors)
        self._restore(tensors, steps)
        if self.scaler is not None and LOSS_SCALE in tensors:
            self.scaler.restore(tensors[LOSS_SCALE])

    def _parameter_groups(self) -> list[dict[str, object]]:
        shapes = {name: self._whole_shape(parameter) for name, parameter in self.trained.items()}
        return optimizers.parameter_groups(self.trained, shapes, self._stage)


def check_support(recipe: Recipe, ranks: Ranks) -> None:
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


def _shard(model: nn.Module, blocks: tuple[type, ...], ranks: Ranks, dtype: torch.dtype) -> None:
    """Shard each block, and the rest of the model, with FSDP2."""
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


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
