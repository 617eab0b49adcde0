"""Wrap the undocumented names of bitsandbytes: packed weights, and the state of its optimizers.

A release may rename or remove any of these without notice. Each entry says which name it wraps and what to do when it
is gone; tests/radhpc/models/test_compat_bitsandbytes.py has a test for each. Importing this module imports only torch.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

BLOCK = 64  # weights that share a scale; 256 scales share one more
MOMENT_BLOCK = 256  # numbers of a moment that share a scale


class MomentNames(NamedTuple):
    """The names of one moment in the state of a bitsandbytes optimizer."""

    values: str
    codes: str  # what the 256 codes of eight bits stand for, sorted
    scales: str


# Optimizer2State's state: state1 and state2, with qmap and absmax where they are kept in eight bits. When they are
# renamed: state names stand in bitsandbytes/optim/optimizer.py, init_state(); a checkpoint has names of its own.
MOMENTS = (MomentNames("state1", "qmap1", "absmax1"), MomentNames("state2", "qmap2", "absmax2"))


def pack(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    """Quantise a float32 weight to NF4 with quantised scales; return numbers of type `dtype`, and the scales.

    Wraps bitsandbytes.functional.quantize_4bit, whose second result is a QuantState. When it is gone:
    bitsandbytes.nn.Params4bit quantises on its way to the device, and keeps `quant_state`.
    """
    from bitsandbytes.functional import quantize_4bit

    packed, scales = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=dtype
    )
    return packed, scales


def unpack(packed: torch.Tensor, scales: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight that pack() packed, in a type: bitsandbytes.functional.dequantize_4bit.

    The type is QuantState.dtype. When that is gone: dequantise to float32 and convert.
    """
    from bitsandbytes.functional import dequantize_4bit

    scales = copy.copy(scales)
    scales.dtype = dtype
    weight: torch.Tensor = dequantize_4bit(packed, scales)
    return weight


def initialize_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """Make the empty state of one parameter, as the first step of a bitsandbytes optimizer does, and return it.

    Wraps Optimizer8bit.initialized, check_overrides, to_gpu and init_state. When they are gone: take one step with
    gradients of zero and a learning rate of zero.
    """
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    groups = optimizer.param_groups
    group = next(n for n, g in enumerate(groups) if any(p is parameter for p in g["params"]))
    index = next(n for n, p in enumerate(groups[group]["params"]) if p is parameter)
    optimizer.init_state(groups[group], parameter, group, index)
    state: dict[str, Any] = optimizer.state[parameter]
    return state
