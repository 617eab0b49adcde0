"""DeepSpeed's ZeRO as an engine: the same steps, and the same checkpoints, as fsdp.py's.

    engine: deepspeed        zero: {stage: 3, offload: false}

Stage 2 keeps the model on every rank and cuts gradients and moments into parts; stage 3 cuts the model, too. DeepSpeed
ties its own checkpoints to the number of ranks and the stage, so none is written: what a step changes is read from, and
put into, the parts that its optimizer holds, by the addresses that it keeps of them.

DeepSpeed copies the weights when it starts, so it starts at the first use: behind load(), if there is one.
"""

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from radhpc.core.batch import Batch
from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe
from radhpc.distributed.ranks import Ranks
from radhpc.engine import optimizers
from radhpc.engine.fsdp import Engine, groups
from radhpc.models.adapters import Tensors
from radhpc.models.lazy_loading import materialize

COLLECTIVES = (
    "all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "all_gather",
    "all_gather_into_tensor", "all_gather_coalesced", "all_to_all_single", "barrier",
)  # fmt: skip
_BUCKET = 1 << 28  # numbers that ZeRO sums at a time; it allocates them even where less is trained
_KEYS = ("", *optimizers.MOMENTS)  # of what is saved of a parameter: itself and its moments


class ZeroEngine(Engine):
    """The model under ZeRO stage 2 or 3, with torch's AdamW as its optimizer."""

    def _lay_out(self, recipe: Recipe, blocks: tuple[type, ...]) -> None:
        self._recipe, self._replicated = recipe, False
        self._library = _deepspeed(self.ranks.device)
        if not dist.is_initialized():  # one rank
            dist.init_process_group(
                "nccl" if self.ranks.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
            )
        os.environ.setdefault("LOCAL_RANK", "0")  # it wants this also of one process
        self._library.init_distributed(dist_init_required=False)
        _time_collectives(self._library.comm.comm.cdb, self.ranks)
        self._autocast = torch.autocast(self.ranks.device.type, enabled=False)
        self._lockstep = recipe.zero.stage == 3
        self._values: dict[nn.Parameter, torch.Tensor] = {}  # flat, in float32, until ZeRO has copied them
        self._zero: Any = None  # once it has started
        materialize(self.model, self.ranks, self.dtype, None, self._placed)

    def _placed(self, parameter: nn.Parameter) -> None:
        """As soon as a parameter has its values: in stage 3 keep this rank's part alone."""
        if parameter.requires_grad:
            self._values[parameter] = self._share(parameter.detach())
            parameter.data = parameter.data.to(self.dtype)
        if not self._lockstep:
            return
        first: Any = next((p for p in self.model.parameters() if hasattr(p, "ds_id")), None)
        if first is not None:
            first.convert_to_zero_parameters(param_list=[parameter])
            return
        holder = nn.Module()
        holder.register_parameter("parameter", parameter)
        self._library.zero.Init(module=holder, config_dict_or_path=self._configuration(), dtype=self.dtype)

    @staticmethod
    def _numel(parameter: nn.Parameter) -> int:
        """Of a trained parameter, which stage 3 may have emptied."""
        return int(getattr(parameter, "ds_numel", parameter.numel())) if parameter.requires_grad else 0

    def _share(self, whole: torch.Tensor) -> torch.Tensor:
        """What this rank will hold of a tensor, or more: flat, in float32, a copy."""
        flat = whole.reshape(-1)
        if self._lockstep:
            size = -(-flat.numel() // self.ranks.world)
            flat = flat[size * self.ranks.rank : size * (self.ranks.rank + 1)]
        return flat.to(torch.float32, copy=True)

    def _configuration(self) -> dict[str, Any]:
        zero = self._recipe.zero
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
                "reduce_bucket_size": min(_BUCKET, sum(self._numel(p) for p in self.model.parameters())),
                **({"offload_optimizer": {"device": "cpu"}} if zero.offload else {}),
                # Gradients of small parameters are summed like the others, not kept whole on each rank.
                **({"stage3_param_persistence_threshold": 0} if zero.stage == 3 else {}),
            },
        }

    def _start(self) -> None:
        self._shapes = {p: torch.Size(getattr(p, "ds_shape", p.shape)) for p in self.trained.values()}
        self._names = {parameter: name for name, parameter in self.trained.items()}
        self._torch = optimizers.build(groups(self.trained, self._stage), self._stage)

    @property
    def optimizer(self) -> torch.optim.Optimizer:  # type: ignore[override]
        """torch's optimizer inside ZeRO's; its groups hold the learning rates."""
        return self._torch

    @property
    def lockstep(self) -> bool:
        return self._lockstep

    @property
    def _forward(self) -> nn.Module:
        engine: nn.Module = self._started()
        return engine

    def _started(self) -> Any:
        if self._zero is None:
            self._zero, *_ = self._library.initialize(
                model=self.model, optimizer=self._torch, config=self._configuration()
            )
            for parameter, _, part, first in self._parts(moments=False):  # it knows them in the computation's type
                start = 0 if self._lockstep else first
                part.copy_(self._values[parameter][start : start + part.numel()])
            self._values.clear()
        return self._zero

    def to_device(self, batch: Batch) -> Batch:
        """Also into the type of the computation: ZeRO's forward pass converts parameters alone."""
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in super().to_device(batch).items()
        }

    def warm_up(self, batch: Batch, counted: bool = False) -> None:
        """The forward pass alone: of a backward pass ZeRO would keep the gradients."""
        self.loss_sum(batch)

    def generate(self, batch: Batch, max_new_tokens: int, **decoding: Any) -> torch.Tensor:
        self._started()
        return super().generate(batch, max_new_tokens, **decoding)

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        # ZeRO averages over the ranks; the loss is already a part of the global batch's.
        self._started().backward(loss * self.ranks.world)

    def _update(self, scale: float, again: Callable[[], None]) -> float | None:
        zero = self._started()
        before = zero.skipped_steps
        if self.scaler is not None:
            zero.optimizer.loss_scaler.cur_scale = scale
        zero.step()
        if self.scaler is not None:
            zero.optimizer.loss_scaler.cur_scale = 1.0  # the next loss comes scaled
        norm = float(zero.get_global_grad_norm() or 0.0)
        return norm if zero.skipped_steps == before and math.isfinite(norm) and norm >= 0 else None

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return self._shapes[parameter]

    def _pieces(self, moments: bool) -> dict[str, torch.Tensor]:
        self._started()
        pieces = {}
        for parameter, key, part, _ in self._parts(moments):
            pieces[f"{key}/{self._names[parameter]}" if key else self._names[parameter]] = part
        return pieces

    def _restore(self, tensors: Tensors, steps: int) -> None:
        assert self._zero is None, "ZeRO copies the weights when it starts"
        with torch.no_grad():
            for name, parameter in self.trained.items():
                values = self._values[parameter] = self._share(tensors[name])
                target: Any = getattr(parameter, "ds_tensor", parameter.data)
                target.reshape(-1)[: values.numel()].copy_(values)
        self._started()
        if not steps:
            return
        self._make_moments(steps)
        for parameter, key, part, first in self._parts(moments=True):
            if key:
                value = tensors[f"{key}/{self._names[parameter]}"].reshape(-1)
                part.copy_(value[first : first + part.numel()])

    def offloaded_bytes(self) -> int:
        """Bytes of this rank's state that lie on the host: parameters, gradients and moments of its parts, in float32
        (DeepSpeed's documentation of offload_optimizer).
        """
        return 16 * sum(flat.numel() for flat in self._flats()) if self._recipe.zero.offload and self._zero else 0

    # Where ZeRO keeps its parts

    def _flats(self) -> list[torch.Tensor]:
        """Of each parameter group what this rank holds, in float32, one tensor each."""
        optimizer = self._zero.optimizer
        if self._lockstep:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def _stepped(self) -> bool:
        return any("exp_avg" in state for state in self._torch.state.values())

    def _make_moments(self, steps: int) -> None:
        """As the first step would, for load() to fill."""
        for flat in self._flats():
            self._torch.state[flat] = {
                "step": torch.tensor(float(steps)),
                **{moment: torch.zeros_like(flat) for moment in optimizers.MOMENTS},
            }

    def _parts(self, moments: bool) -> Iterator[tuple[nn.Parameter, str, torch.Tensor, int]]:
        """(parameter, "" or a moment, this rank's part, flat, in place; the place of its first number in the whole)."""
        optimizer, flats = self._zero.optimizer, self._flats()
        moments = moments and self._stepped()
        for parameter in self.trained.values():
            count = self._shapes[parameter].numel()
            if self._lockstep:
                at, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                first = size * self.ranks.rank
                numel = max(0, min(size, count - first))  # the last ranks' parts are filled up
            else:
                mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is None:
                    continue
                at, start = mapping.param_group_index, mapping.hp_fragment_address.start
                first, numel = mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel
            if not numel:
                continue
            flat = flats[at]
            for key in _KEYS if moments else _KEYS[:1]:
                whole = self._torch.state[flat][key] if key else flat
                yield parameter, key, whole.detach().narrow(0, start, numel), first


def destroy_process_group() -> None:
    """Leave the process group, and let DeepSpeed forget what it has made of it."""
    if dist.is_initialized():
        _deepspeed(torch.device("cpu")).comm.destroy_process_group()


def _time_collectives(backend: Any, ranks: Ranks) -> None:
    """Let ranks.waited() count what DeepSpeed's ranks stand in collectives: all of them go through this object.

    Of one that is begun here and awaited later both ends count, and what is computed in between does not.
    """
    for name in COLLECTIVES:
        usual = getattr(type(backend), name)

        def timed(*arguments: Any, usual: Any = usual, **options: Any) -> Any:
            with ranks.timed():
                work = usual(backend, *arguments, **options)
            return work if work is None else _TimedWork(work, ranks)

        setattr(backend, name, timed)


class _TimedWork:
    """A collective under way."""

    def __init__(self, work: Any, ranks: Ranks) -> None:
        self._work, self._ranks = work, ranks

    def wait(self, *arguments: Any) -> Any:
        with self._ranks.timed():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _deepspeed(device: torch.device) -> Any:
    """The library. Raises UserError where it is there and cannot start."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    output = sys.stdout
    sys.stdout = sys.stderr  # what it prints while it is imported is none of a program's output
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"engine: deepspeed: it cannot be imported: {error}") from error
    finally:
        sys.stdout = output
    if device.type == "cpu":
        # Else it compiles a shared-memory collective when a job starts, which a node without a compiler cannot.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)  # names that it will have to change
    return deepspeed
