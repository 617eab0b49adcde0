"""How many floating-point operations a step needs, and what share that is of what the GPU could do: MFU.

    meter = FlopMeter()
    with meter.forward(): loss = ...                          # in the first step: products are counted as they are made
    meter.close(8)
    meter.speed(8, 0.31, peak_flops(device, torch.bfloat16))        # {"teraflops_per_rank": 312.4, "mfu": 0.316}

A matrix product of 2 M N K operations in the forward pass needs as many again for the gradient of each of its two
factors that has one, so adapters on a frozen base need two thirds of what training all of it does; attention needs
twice its forward pass. Nothing recomputed counts (Chowdhery et al., 2022, PaLM, appendix B). Counted once, for the
first step of each life and stage, and from then on in proportion to the samples.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

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
        """As the recipe has it. Layers of ZeRO and of four bits have backward passes of their own, of which nothing is
        to be seen in the forward pass: they are not counted. Of compiled layers the first step is not, see forward().
        """
        self.per_sample: float | None = None  # once it is known
        self.supported = engine != "deepspeed" and not quantised
        self._open, self._operations = self.supported and not compiled, 0.0

    @contextlib.contextmanager
    def forward(self, anyway: bool = False) -> Iterator[None]:
        """Around a micro-batch's forward pass. `anyway`: one made for this, of layers that are compiled elsewhere."""
        if not (self._open or (anyway and self.supported)):
            yield
            return
        with _Counted() as counted:
            yield
        self._operations += counted.operations

    def close(self, samples: int) -> None:
        """Behind the passes that were counted, with so many samples on this rank."""
        if self._operations and samples and self.per_sample is None:
            self._open, self.per_sample = False, self._operations / samples

    def restart(self) -> None:
        """What was counted so far will be made again."""
        self._operations = 0.0

    def speed(self, samples: float, seconds: float, ceiling: float | None) -> dict[str, float]:
        """Of a rank that takes `seconds` for `samples`: 10**12 operations per second, and their share of the ceiling,
        where that is known.
        """
        if self.per_sample is None:
            return {}
        done = self.per_sample * samples / max(seconds, 1e-9)
        return {"teraflops_per_rank": done / 1e12, **({"mfu": done / ceiling} if ceiling else {})}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that the maker promises; None for a CPU, for float32 and for a GPU that is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((known for part, known in PEAKS if part in name), None)


class _Counted(TorchDispatchMode):
    """Sums what every product inside of it, and behind it in the backward pass, needs."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations += _needed(func.overloadpacket, args, kwargs or {}, found)
        return found


def _needed(kind: Any, args: Any, kwargs: Any, found: Any) -> float:
    name = str(kind)
    if "backward" in name:
        return 0.0
    if "scaled_dot_product" in name or "attention_forward" in name or "varlen" in name:
        tensors = [each for each in args[:3] if isinstance(each, torch.Tensor)]
        return _attention(args) * (3 if any(each.requires_grad for each in tensors) else 1) if len(tensors) == 3 else 0
    count = flop_registry.get(kind)
    if count is None:
        return 0.0
    # Of addmm and baddbmm the first one is added.
    factors = args[1:3] if "addmm" in name or "baddbmm" in name else args[:2]
    return float(count(*args, **kwargs, out_val=found)) * (1 + sum(each.requires_grad for each in factors))


def _attention(args: Any) -> float:
    """Two products for each pair of positions. Kernels of variable length, (positions, heads, D), have the ends of the
    segments behind query, key and value.
    """
    query, key, value = args[:3]
    if query.ndim == 4:
        return float(sdpa_flop_count(query.shape, key.shape, value.shape))
    ends = [each for each in args[3:5] if isinstance(each, torch.Tensor) and each.ndim == 1]
    if query.ndim != 3 or len(ends) != 2:
        return 0.0
    pairs = float((ends[0].diff().double() * ends[1].diff().double()).sum())
    return 2 * pairs * query.shape[1] * (query.shape[2] + value.shape[2])
