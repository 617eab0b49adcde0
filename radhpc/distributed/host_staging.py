"""Keep the values of a tensor on the host, to read them later without waiting for its device.

Asking a GPU for a number stops the program until all that was queued before is done. What a batch looks like, its
padding and which tokens are supervised, was known on the CPU before the batch was moved; this is how it stays known.

    moved = keep_host_values(batch["labels"].to(device), batch["labels"])
    host_values(moved)                                               # the array, at once
"""

from typing import Any

import numpy.typing as npt
import torch


def keep_host_values(moved: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """Attach the host's values to an integer tensor that was moved to a device; returns it."""
    if moved is not host and not host.is_floating_point():
        moved.radhpc_values = host.radhpc_values if hasattr(host, "radhpc_values") else host.numpy()  # type: ignore[attr-defined]
    return moved


def host_values(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the values of a tensor; if they were not kept on the host, this waits for the device."""
    known: npt.NDArray[Any] | None = getattr(tensor, "radhpc_values", None)
    return tensor.cpu().numpy() if known is None else known
