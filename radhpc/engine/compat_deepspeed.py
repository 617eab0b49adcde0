"""Wrap the undocumented names of DeepSpeed: no other module of radhpc may use one.

A release of DeepSpeed may rename or remove any of these without notice. Each entry says which name it wraps and what to
do when it is gone; tests/radhpc/engine/test_compat_deepspeed.py has a test for each. Importing this module imports
torch alone; load() imports DeepSpeed.
"""

import os
import sys
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from radhpc.core.errors import UserError
from radhpc.distributed.ranks import Ranks

# The methods of the backend that collectives go through. When one is renamed: its waits are missing from
# Ranks.waited(), and nothing else changes; the names stand in deepspeed/comm/torch.py, class TorchBackend.
COLLECTIVES = (
    "all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "all_gather",
    "all_gather_into_tensor", "all_gather_coalesced", "all_to_all_single", "barrier",
)  # fmt: skip


class Fragment(NamedTuple):
    """The part of a parameter's float32 values that this rank's optimizer holds."""

    group: int  # index of the flat tensor in flat_values()
    start: int  # the place of its first number in that tensor
    numel: int
    first: int  # the place of its first number in the whole parameter, flat


def load(device: torch.device) -> Any:
    """Import DeepSpeed and return it. Raises UserError where it is installed and cannot start.

    On a CPU, sets deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] to False: otherwise DeepSpeed compiles a
    collective over shared memory when a job starts, which a node without a compiler cannot. When that table is gone:
    look in deepspeed/comm/torch.py for what makes it build ShareMemCommBuilder. The filtered warnings are about names
    of torch.distributed that DeepSpeed itself has to change.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    output = sys.stdout
    sys.stdout = sys.stderr  # what the import prints is not part of a program's output
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"engine: deepspeed: it cannot be imported: {error}") from error
    finally:
        sys.stdout = output
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    return deepspeed


def check_fp16(library: Any) -> None:
    """Raise UserError where DeepSpeed would refuse fp16 when it starts: on GPUs without it and on most CPUs."""
    accelerator = library.accelerator.get_accelerator()
    if not accelerator.is_fp16_supported():
        raise UserError(
            f"precision: fp16: DeepSpeed does not compute in it on this {accelerator.device_name()}; allowed here are "
            "fp32 and bf16, or engine: fsdp"
        )


def time_collectives(library: Any, ranks: Ranks) -> None:
    """Let ranks.waited() count the time that DeepSpeed's collectives wait: all of them go through one backend object.

    Of a collective that is begun here and awaited later both ends are counted; what is computed in between is not.
    Replaces methods of deepspeed.comm.comm.cdb. When it is gone: leave the timing out, as it is only reported.
    """
    backend: Any = library.comm.comm.cdb
    for name in COLLECTIVES:
        original = getattr(type(backend), name)

        def timed(*arguments: Any, original: Any = original, **options: Any) -> Any:
            with ranks.timed():
                work = original(backend, *arguments, **options)
            return work if work is None else _TimedWork(work, ranks)

        setattr(backend, name, timed)


class _TimedWork:
    """A collective that is under way."""

    def __init__(self, work: Any, ranks: Ranks) -> None:
        self._work, self._ranks = work, ranks

    def wait(self, *arguments: Any) -> Any:
        with self._ranks.timed():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def destroy_process_group() -> None:
    """Leave the process group, and let DeepSpeed forget its own groups: deepspeed.comm.destroy_process_group.

    When it is gone: torch.distributed.destroy_process_group, if DeepSpeed keeps no groups of its own by then.
    """
    load(torch.device("cpu")).comm.destroy_process_group()


# Parameters of stage 3


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether stage 3 has partitioned a parameter: it then has a Parameter.ds_id.

    When it is gone: keep a set of the parameters that were partitioned.
    """
    return hasattr(parameter, "ds_id")


def partition_first(library: Any, parameter: nn.Parameter, config: Any, dtype: torch.dtype) -> None:
    """Keep only this rank's part of a parameter, in place, as stage 3 does: zero.Init(module=...).

    When it is gone: build the whole model inside of zero.Init, which needs the model on each host once.
    """
    holder = nn.Module()
    holder.register_parameter("parameter", parameter)
    library.zero.Init(module=holder, config_dict_or_path=config, dtype=dtype)


def partition_like(partitioned: nn.Parameter, parameter: nn.Parameter) -> None:
    """Do the same for another parameter, with the settings of one that is partitioned already.

    Wraps Parameter.convert_to_zero_parameters. When it is gone: partition_first() for each, which makes one object of
    settings and of groups for each parameter.
    """
    like: Any = partitioned
    like.convert_to_zero_parameters(param_list=[parameter])


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter that stage 3 may have replaced by an empty tensor: Parameter.ds_shape.

    When it is gone: note the shapes before the parameters are partitioned.
    """
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole_numel(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter that stage 3 may have emptied: Parameter.ds_numel.

    When it is gone: whole_shape().numel().
    """
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def local_values(parameter: nn.Parameter) -> torch.Tensor:
    """Return what this rank holds of a parameter in the type of the computation, flat and in place: Parameter.ds_tensor
    in stage 3, which may be filled up at its end, and the whole parameter in stage 2.

    When it is gone: deepspeed.zero.GatheredParameters(modifier_rank=...), which gathers each parameter on all ranks.
    """
    values: torch.Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return values.reshape(-1)


# The optimizer that ZeRO wraps around torch's


def flat_values(engine: Any, stage: int) -> list[torch.Tensor]:
    """Return the float32 values that this rank holds, one flat tensor for each parameter group.

    Wraps DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat and DeepSpeedZeroOptimizer's
    single_partition_of_fp32_groups. When they are gone: read and write one parameter at a time with
    deepspeed.utils.safe_get_local_fp32_param and safe_set_local_fp32_param.
    """
    optimizer = engine.optimizer
    return list(optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups)


def fragment(engine: Any, stage: int, parameter: nn.Parameter, rank: int) -> Fragment | None:
    """Return where the flat values hold this rank's part of a trained parameter; None where it has no part.

    Wraps get_param_id and grad_position in stage 3, and Parameter._hp_mapping (a utils.tensor_fragment) in stage 2.
    When they are gone: as flat_values().
    """
    if stage == 3:
        optimizer = engine.optimizer
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = size * rank
        # The parts of the last ranks are filled up.
        numel = max(0, min(size, whole_numel(parameter) - first))
        return Fragment(group, start, numel, first) if numel else None
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None or not mapping.hp_fragment_address.numel:
        return None
    address = mapping.hp_fragment_address
    return Fragment(mapping.param_group_index, address.start, address.numel, mapping.lp_fragment_address.start)


def step(engine: Any, loss_scale: float | None) -> tuple[bool, float]:
    """Make a step from gradients that are `loss_scale` times too large; return whether it was made, and their norm.

    Sets engine.optimizer.loss_scaler.cur_scale, which divides the gradients, and sets it back to 1, as the next loss
    comes scaled by us. Compares engine.skipped_steps, as step() does not say that it found an overflow. When they are
    gone: let DeepSpeed scale the loss (fp16.loss_scale), and look for overflows in get_global_grad_norm().
    """
    skipped = engine.skipped_steps
    if loss_scale is not None:
        engine.optimizer.loss_scaler.cur_scale = loss_scale
    engine.step()
    if loss_scale is not None:
        engine.optimizer.loss_scaler.cur_scale = 1.0
    return engine.skipped_steps == skipped, float(engine.get_global_grad_norm() or 0.0)
