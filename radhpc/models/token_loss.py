"""Compute the cross-entropy of the supervised tokens without the logits of all the others.

A prompt of 300 tokens and an answer of 60 need 60 rows of logits, and of 128,256 entries each they fill memory quickly:
in float32 a text of 4,096 tokens takes 2.1 GB, and its gradient as much. Here the output head itself, in the one call
that the model makes to it, takes the supervised positions and goes over them in chunks.

- A frozen head: dL/dh of each chunk is computed right after its loss, and the backward pass has nothing left to do.
- A trained or adapted head: each chunk, if there are several, is computed again in the backward pass.

All chunks are within one call of the head through the model, since sharding engines gather its weights once for each
call, on all ranks alike. Sizes: B rows of S tokens, hidden states (B, S, D), N supervised positions, V entries.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from radhpc.core.batch import IGNORE
from radhpc.distributed import host_staging
from radhpc.models.class_extension import extend, own_class

CHUNK = 128 << 20  # bytes of float32 logits that exist at a time


class GroupedLoss:
    """Sum the token losses by the groups that each row is in, for people to look at: groups (B, K) of 0 and 1 -> sums
    (K,).
    """

    def __init__(self, groups: torch.Tensor) -> None:
        self.groups = groups
        self.sums = torch.zeros(groups.shape[1], dtype=torch.float64, device=groups.device)

    def add(self, losses: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the losses of tokens, (N,), given the row of each, (N,)."""
        with torch.no_grad():
            self.sums += losses.double() @ self.groups[rows].double()


def summed_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    smoothing: float = 0.0,
    grouped: GroupedLoss | None = None,
) -> torch.Tensor:
    """Return the sum over all supervised tokens of their negative log-likelihood, in float32. With `smoothing`, this
    share of each target is spread evenly over all V entries (Szegedy et al., 2016).

    `labels`: (B, S), where a label's token is predicted from the position before it and IGNORE says that it is not.
    The model's output head must see the hidden states of all positions, as in transformers' models.
    """
    head = extend(output_head(model), _LossHead)
    head.labels, head.smoothing, head.grouped = labels, smoothing, grouped
    try:
        loss: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        head.labels = head.grouped = None
    assert loss.ndim == 0, "the model has not called its output head"
    return loss


def output_head(model: nn.Module) -> nn.Module:
    """Return the layer that makes logits of hidden states."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if head is None:
        heads = [module for name, module in model.named_modules() if name.split(".")[-1] == "lm_head"]
        assert len(heads) == 1, "a family's model needs get_output_embeddings() or one layer called lm_head"
        head = heads[0]
    assert isinstance(head, nn.Module)
    return head


class _LossHead:
    """Extend the output head's class: with labels it returns the loss, without them logits as before."""

    labels: torch.Tensor | None = None
    smoothing = 0.0
    grouped: GroupedLoss | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        own = super().forward  # type: ignore[misc]
        if self.labels is None:
            logits: torch.Tensor = own(hidden)
            return logits
        shown = host_staging.host_values(self.labels)
        assert hidden.shape[:-1] == shown.shape, f"hidden states {tuple(hidden.shape)} for labels {shown.shape}"
        positions = np.flatnonzero(np.pad(shown[:, 1:] != IGNORE, ((0, 0), (0, 1))))
        index = torch.from_numpy(positions).to(hidden.device, non_blocking=True)
        chosen = hidden.flatten(0, 1).index_select(0, index)
        targets = self.labels.flatten().index_select(0, index + 1)
        assert isinstance(self, nn.Module)
        linear = isinstance(self, nn.Linear) and own_class(self, _LossHead) is nn.Linear
        frozen = linear and not any(p.requires_grad for p in self.parameters())
        if frozen and torch.is_grad_enabled() and chosen.requires_grad:
            assert isinstance(self, nn.Linear)
            weight, device = self.weight, hidden.device.type
            if torch.is_autocast_enabled(device):  # once, not for every chunk
                weight = weight.to(torch.get_autocast_dtype(device))
            rows = _rows_at_a_time(weight.shape[0])
            losses: torch.Tensor = _FrozenHeadLoss.apply(chosen, weight, self.bias, targets, rows, self.smoothing)
            return self._sum(losses, index, shown.shape[1])
        rows = _rows_at_a_time(_vocabulary(self))
        if len(positions) <= rows:  # also for no position at all: a sharded weight needs its gradient
            return self._sum(_losses(own, chosen, targets, self.smoothing), index, shown.shape[1])
        chunks = []
        for start in range(0, len(positions), rows):
            chunk = (chosen[start : start + rows], targets[start : start + rows], self.smoothing)
            chunks.append(checkpoint(_losses, own, *chunk, use_reentrant=False))
        return self._sum(torch.cat(chunks), index, shown.shape[1])

    def _sum(self, losses: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
        """Return the sum of the losses of the tokens at positions `index` of rows of a length."""
        if self.grouped is not None:
            self.grouped.add(losses.detach(), index // length)
        return losses.sum()


def _rows_at_a_time(entries: int) -> int:
    return max(1, CHUNK // (4 * entries))


def _vocabulary(head: nn.Module) -> int:
    """Return V, or as good a guess as the head's parameters allow."""
    return int(getattr(head, "out_features", 0)) or max(
        (parameter.shape[0] for parameter in head.parameters() if parameter.ndim == 2), default=1 << 17
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _losses(own: Any, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return the loss of each position, (N,)."""
    logits = own(hidden)
    logits = logits.to(_wide(logits.dtype))
    return nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


class _FrozenHeadLoss(torch.autograd.Function):
    """Softmax cross-entropy after a linear layer that gets no gradient: dL/dh = (softmax(h W^T) - onehot) W."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
        smoothing: float,
    ) -> torch.Tensor:
        """Return the loss of each position, (N,), of hidden (N, D), weight (V, D), bias (V,) and targets (N,)."""
        gradient = torch.empty_like(hidden, dtype=_wide(hidden.dtype))
        lift = 1024.0 if weight.dtype == torch.float16 else 1.0  # most of softmax(...) is too small for float16
        losses = torch.empty(len(hidden), dtype=_wide(hidden.dtype), device=hidden.device)
        for start in range(0, len(hidden), rows):
            chunk, target = hidden[start : start + rows], targets[start : start + rows, None]
            logits = nn.functional.linear(chunk, weight, bias)
            logits = logits.to(_wide(logits.dtype))
            scale = logits.logsumexp(1, keepdim=True)
            correct = logits.gather(1, target)
            if smoothing:
                correct = correct + smoothing * (logits.mean(1, keepdim=True) - correct)
            losses[start : start + rows] = (scale - correct).squeeze(1)
            logits.sub_(scale).exp_().scatter_add_(1, target, torch.full_like(scale, smoothing - 1))
            if smoothing:
                logits.sub_(smoothing / logits.shape[1])
            gradient[start : start + rows] = logits.mul_(lift).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient.div_(lift))
        ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *outward: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outward[0][:, None]).to(ctx.dtype), None, None, None, None, None
