"""Run DeepSpeed's ZeRO as an engine: the same steps, and the same checkpoints, as fsdp.py's.

    engine: deepspeed        zero: {stage: 3, offload: false}

Stage 2 keeps the model on every rank and divides gradients and moments over the ranks; stage 3 divides the model, too.
DeepSpeed ties its own checkpoints to the number of ranks and the stage, so none is written: what a step changes is
read from, and put into, the parts that its optimizer holds, by the addresses that it keeps of them
(compat_deepspeed.py).

DeepSpeed copies the weights when it starts, so it starts at its first use: after load(), if there is one.
"""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from radhpc.core.batch import Batch
from radhpc.core.recipe import Recipe
from radhpc.engine import compat_deepspeed as compat, optimizers
from radhpc.engine.fsdp import Engine
from radhpc.engine.state_layout import MOMENTS, StateShard, copy_into
from radhpc.models.adapters import Tensors
from radhpc.models.lazy_loading import materialize

_BUCKET = 1 << 28  # numbers that ZeRO sums at a time; it allocates them even where less is trained


class ZeroEngine(Engine):
    """The model under ZeRO stage 2 or 3, with torch's AdamW as its optimizer."""

    def _place_model(self, recipe: Recipe, blocks: tuple[type, ...]) -> None:
        self._recipe, self._replicated = recipe, False
        self._library = compat.load(self.ranks.device)
        if self.dtype == torch.float16:
            compat.check_fp16(self._library)
        if not dist.is_initialized():  # one rank
            backend = "nccl" if self.ranks.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it also in a single process
        self._library.init_distributed(dist_init_required=False)
        compat.time_collectives(self._library, self.ranks)
        self.autocast = torch.autocast(self.ranks.device.type, enabled=False)
        self._stage_number = recipe.zero.stage
        self._values: dict[nn.Parameter, torch.Tensor] = {}  # flat, in float32, until ZeRO has copied them
        self._zero: Any = None  # once it has started
        materialize(self.model, self.ranks, self.dtype, None, self._on_materialized)

    def _on_materialized(self, parameter: nn.Parameter) -> None:
        """In stage 3, keep only this rank's part of a parameter once it has its values."""
        if parameter.requires_grad:
            self._values[parameter] = self._local_part(parameter.detach())
            parameter.data = parameter.data.to(self.dtype)
        if self.lockstep:
            partitioned = next((p for p in self.model.parameters() if compat.is_partitioned(p)), None)
            if partitioned is None:
                compat.partition_first(self._library, parameter, self._configuration(), self.dtype)
            else:
                compat.partition_like(partitioned, parameter)

    def _local_part(self, whole: torch.Tensor) -> torch.Tensor:
        """Return what this rank will hold of a tensor, or more: flat, in float32, a copy."""
        flat = whole.reshape(-1)
        if self.lockstep:
            size = -(-flat.numel() // self.ranks.world)
            flat = flat[size * self.ranks.rank : size * (self.ranks.rank + 1)]
        return flat.to(torch.float32, copy=True)

    def _configuration(self) -> dict[str, Any]:
        zero = self._recipe.zero
        trained = sum(compat.whole_numel(p) for p in self.model.parameters() if p.requires_grad)
        return {
            # Its own count of samples has no meaning here: a step has as many micro-batches as engine.step is given.
            "train_batch_size": self.ranks.world,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self._clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            # Our own scale, so that a step which overflows is made again and the scale is in every checkpoint.
            "fp16": {"enabled": self.dtype == torch.float16, "loss_scale": 1.0},
            "zero_optimization": {
                "stage": zero.stage,
                "overlap_comm": False,
                "reduce_bucket_size": min(_BUCKET, trained),
                **({"offload_optimizer": {"device": "cpu"}} if zero.offload else {}),
                # Gradients of small parameters are summed like the others, not kept whole on each rank.
                **({"stage3_param_persistence_threshold": 0} if zero.stage == 3 else {}),
            },
        }

    def _build_optimizer(self) -> None:
        self._torch_optimizer = optimizers.build(self._parameter_groups(), self._stage)

    def _whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        return compat.whole_shape(parameter)

    @property
    def optimizer(self) -> torch.optim.Optimizer:  # type: ignore[override]
        """torch's optimizer inside of ZeRO's; its groups hold the learning rates."""
        return self._torch_optimizer

    @property
    def lockstep(self) -> bool:
        return self._stage_number == 3

    @property
    def forward_module(self) -> nn.Module:
        engine: nn.Module = self._started()
        return engine

    def _started(self) -> Any:
        """Return DeepSpeed's engine, and start it at the first call."""
        if self._zero is None:
            self._zero, *_ = self._library.initialize(
                model=self.model, optimizer=self._torch_optimizer, config=self._configuration()
            )
            for shard in self._fragments(("",)):  # it knows the values in the computation's type
                start = 0 if self.lockstep else shard.first
                shard.values.copy_(self._values[self.trained[shard.parameter]][start : start + shard.values.numel()])
            self._values.clear()
        return self._zero

    def to_device(self, batch: Batch) -> Batch:
        """Convert floats into the type of the computation, too: ZeRO's forward pass converts parameters alone."""
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in super().to_device(batch).items()
        }

    def warm_up(self, batch: Batch, counted: bool = False) -> None:
        """Make the forward pass alone: ZeRO would keep the gradients of a backward pass."""
        self.loss_sum(batch)

    def generate(self, batch: Batch, max_new_tokens: int, **decoding: Any) -> torch.Tensor:
        self._started()
        return super().generate(batch, max_new_tokens, **decoding)

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        # ZeRO averages over the ranks; the loss is already a part of the global batch's.
        self._started().backward(loss * self.ranks.world)

    def _update(self, scale: float, repeat_passes: Callable[[], None]) -> float | None:
        made, norm = compat.step(self._started(), scale if self.scaler is not None else None)
        return norm if made and math.isfinite(norm) and norm >= 0 else None

    def _shards(self, moments: bool) -> Iterator[StateShard]:
        self._started()
        has_stepped = any("exp_avg" in state for state in self._torch_optimizer.state.values())
        yield from self._fragments(("", *MOMENTS) if moments and has_stepped else ("",))

    def _restore(self, tensors: Tensors, steps: int) -> None:
        assert self._zero is None, "ZeRO copies the weights when it starts"
        with torch.no_grad():
            for name, parameter in self.trained.items():
                values = self._values[parameter] = self._local_part(tensors[name])
                compat.local_values(parameter)[: values.numel()].copy_(values)
        self._started()
        if not steps:
            return
        for flat in self._flat_values():  # what the first step would make
            self._torch_optimizer.state[flat] = {
                "step": torch.tensor(float(steps)),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        copy_into(self._fragments(MOMENTS), tensors)

    def offloaded_bytes(self) -> int:
        """Return the bytes of this rank's state that lie on the host: parameters, gradients and moments of its parts,
        in float32 (DeepSpeed's documentation of offload_optimizer).
        """
        return 16 * sum(flat.numel() for flat in self._flat_values()) if self._recipe.zero.offload and self._zero else 0

    def _flat_values(self) -> list[torch.Tensor]:
        return compat.flat_values(self._zero, self._stage_number)

    def _fragments(self, kinds: tuple[str, ...]) -> Iterator[StateShard]:
        """Yield this rank's part of each trained parameter ("") and of its moments, by `kinds`, in place."""
        flats = self._flat_values()
        for name, parameter in self.trained.items():
            fragment = compat.fragment(self._zero, self._stage_number, parameter, self.ranks.rank)
            if fragment is None:
                continue
            flat = flats[fragment.group]
            for kind in kinds:
                values = self._torch_optimizer.state[flat][kind] if kind else flat
                part = values.detach().narrow(0, fragment.start, fragment.numel)
                yield StateShard(name, kind, part, fragment.first)


def destroy_process_group() -> None:
    """Leave the process group, and let DeepSpeed forget its own groups."""
    if dist.is_initialized():
        compat.destroy_process_group()
