"""Sharpness-aware minimisation (Foret et al., 2021): the gradient of the worst point nearby, not of the point itself.

    norm = the global norm of the gradients that stand in .grad
    with ascent_step(trained, rho, norm):      # parameters are w + rho g / |g|, and have no gradients
        ...                                 # the same micro-batches again, with the same random numbers
    # w again, bit for bit, with the gradients of the point above

The norm is that of the whole gradient over all ranks and micro-batches, so that the point does not depend on how the
batch is dealt.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def ascent_step(trained: Mapping[str, nn.Parameter], rho: float, norm: float) -> Iterator[None]:
    """Stand at the point of the highest loss within `rho`, to first order. An error inside leaves all as it was."""
    before = {}
    with torch.no_grad():
        for name, parameter in trained.items():
            if parameter.grad is not None:
                before[name] = parameter.detach().clone()
                parameter.add_(parameter.grad, alpha=rho / max(norm, 1e-12))
                parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                trained[name].copy_(value)
