"""Count the floating-point operations of a step, and what share they are of what the GPU could do: MFU.

    meter = FlopMeter()
    with meter.forward(): loss = ...                     # in the first step: products are counted as they are made
    meter.close(8)
    meter.speed(8, 0.31, peak_flops(device, torch.bfloat16))        # {"teraflops_per_rank": 312.4, "mfu": 0.316}

A matrix product of 2 M N K operations in the forward pass needs as many again for the gradient of each of its two
factors that has one, so adapters on a frozen base need two thirds of what training all of it does; attention needs
twice its forward pass. Recomputed operations do not count (Chowdhery et al., 2022, PaLM, appendix B). Counted once, for
the first step of each life and stage, and from then on in proportion to the samples.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import flop_counter

from radhpc.core.compat_torch import TorchDispatchMode

# Dense products in bf16 (T4, V100: fp16) with sums in float32, per second, as their makers say; the first that fits.
PEAKS = (
    ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12),
    ("A40", 150e12), ("A30", 165e12), ("A10", 125e12), ("V100", 125e12), ("3090", 71e12), ("4090", 165e12),
    ("T4", 65e12),
)  # fmt: skip


class FlopMeter:
    """Counts the operations of an engine's first step."""

    def __init__(self, engine: str = "fsdp", quantised: bool = False, compiled: bool = False) -> None:
        """Take `engine`, `quantised` and `compiled` from the recipe. Layers of ZeRO and of four bits have backward
        passes of their own, of which the forward pass shows nothing: they are not counted. Compiled layers are not
        counted in the first step, see forward().
        """
        self.per_sample: float | None = None  # once it is known
        self.supported = engine != "deepspeed" and not quantised
        self._open, self._operations = self.supported and not compiled, 0.0

    @contextlib.contextmanager
    def forward(self, even_if_compiled: bool = False) -> Iterator[None]:
        """Count the forward pass of a micro-batch inside. `even_if_compiled`: a pass that is made for counting, of
        layers that are compiled elsewhere.
        """
        if not (self._open or (even_if_compiled and self.supported)):
            yield
            return
        with _CountingMode() as counted:
            yield
        self._operations += counted.operations

    def close(self, samples: int) -> None:
        """End the count after the passes, with so many samples on this rank."""
        if self._operations and samples and self.per_sample is None:
            self._open, self.per_sample = False, self._operations / samples

    def restart(self) -> None:
        """Forget the count so far: the passes are made again."""
        self._operations = 0.0

    def speed(self, samples: float, seconds: float, ceiling: float | None) -> dict[str, float]:
        """Return the speed of a rank that takes `seconds` for `samples`: 10**12 operations per second, and their share
        of the ceiling where that is known.
        """
        if self.per_sample is None:
            return {}
        done = self.per_sample * samples / max(seconds, 1e-9)
        return {"teraflops_per_rank": done / 1e12, **({"mfu": done / ceiling} if ceiling else {})}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the operations per second that the maker promises; None for a CPU, float32 and unlisted GPUs."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS if part in name), None)


class _CountingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the operations of every product inside, and of its backward pass later."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += _operations_of(func.overloadpacket, args, kwargs or {}, result)
        return result


def _operations_of(operator: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Return the operations of one call, with those of its backward pass."""
    name = str(operator)
    if "backward" in name:
        return 0.0
    if "scaled_dot_product" in name or "attention_forward" in name or "varlen" in name:
        tensors = [each for each in args[:3] if isinstance(each, torch.Tensor)]
        passes = 3 if any(each.requires_grad for each in tensors) else 1
        return _attention(args) * passes if len(tensors) == 3 else 0.0
    count: Callable[..., int] | None = flop_counter.flop_registry.get(operator)
    if count is None:
        return 0.0
    # The first argument of addmm and baddbmm is added.
    factors = args[1:3] if "addmm" in name or "baddbmm" in name else args[:2]
    differentiated = sum(bool(each.requires_grad) for each in factors)
    return float(count(*args, **kwargs, out_val=result)) * (1 + differentiated)


def _attention(args: Any) -> float:
    """Return the operations of two products for each pair of positions. Kernels of variable length, (positions, heads,
    D), have the ends of the segments behind query, key and value.
    """
    query, key, value = args[:3]
    if query.ndim == 4:
        shapes = (query.shape, key.shape, value.shape)
        return float(flop_counter.sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]
    ends = [each for each in args[3:5] if isinstance(each, torch.Tensor) and each.ndim == 1]
    if query.ndim != 3 or len(ends) != 2:
        return 0.0
    pairs = float((ends[0].diff().double() * ends[1].diff().double()).sum())
    return 2.0 * pairs * int(query.shape[1]) * int(query.shape[2] + value.shape[2])
