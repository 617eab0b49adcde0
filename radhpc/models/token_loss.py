"""The cross-entropy of the supervised tokens, without the logits of all the others.

A prompt of 300 tokens and an answer of 60 need 60 rows of logits, and of 128,256 entries each they fill memory quickly:
in float32 a text of 4,096 tokens takes 2.1 GB, and its gradient as much. Here the output head itself, in the one call
that the model makes to it, takes the supervised positions and goes over them in chunks.

- A frozen head: dL/dh of each chunk is computed right behind its loss, so that the backward pass has nothing to do.
- A trained or adapted head: each chunk, if there are several, is computed again in the backward pass.

All chunks are within one call of the head through the model, since sharding engines gather its weights once for each
call, on all ranks alike. Sizes: B rows of S tokens, hidden states (B, S, D), N supervised positions, V entries.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from radhpc.core.batch import IGNORE
from radhpc.distributed import host_staging

CHUNK = 128 << 20  # bytes of float32 logits that are there at a time


class Tally:
    """Sums of the token losses by what each row is of, for people to look at: kinds (B, K) of 0 and 1 -> sums (K,)."""

    def __init__(self, kinds: torch.Tensor) -> None:
        self.kinds = kinds
        self.sums = torch.zeros(kinds.shape[1], dtype=torch.float64, device=kinds.device)

    def add(self, each: torch.Tensor, rows: torch.Tensor) -> None:
        """Losses of tokens, (N,), and the row of each, (N,)."""
        with torch.no_grad():
            self.sums += each.double() @ self.kinds[rows].double()


def summed(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    smoothing: float = 0.0,
    tally: Tally | None = None,
) -> torch.Tensor:
    """The sum over all supervised tokens of their negative log-likelihood, in float32. With `smoothing`, this part of
    each target is spread evenly over all V entries (Szegedy et al., 2016).

    `labels`: (B, S), where a label's token is predicted from the position before it and IGNORE says that it is not.
    The model's output head must see the hidden states of all positions, as transformers' models have it.
    """
    head = output_head(model)
    if not isinstance(head, _Told):
        head.__class__ = _class(type(head))
    assert isinstance(head, _Told)
    head.labels, head.smoothing, head.tally = labels, smoothing, tally
    try:
        loss: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        head.labels = head.tally = None
    assert loss.ndim == 0, "the model has not called its output head"
    return loss


def output_head(model: nn.Module) -> nn.Module:
    """The layer that makes logits of hidden states."""
    named = getattr(model, "get_output_embeddings", None)
    head = named() if named is not None else None
    if head is None:
        found = [module for name, module in model.named_modules() if name.split(".")[-1] == "lm_head"]
        assert len(found) == 1, "a family's model needs get_output_embeddings() or one layer called lm_head"
        head = found[0]
    assert isinstance(head, nn.Module)
    return head


class _Told:
    """Stands before the head's own class: with labels it gives the loss, without them logits as ever."""

    labels: torch.Tensor | None = None
    smoothing = 0.0
    tally: Tally | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        own = super().forward  # type: ignore[misc]
        if self.labels is None:
            logits: torch.Tensor = own(hidden)
            return logits
        shown = host_staging.values(self.labels)
        assert hidden.shape[:-1] == shown.shape, f"hidden states {tuple(hidden.shape)} for labels {shown.shape}"
        positions = np.flatnonzero(np.pad(shown[:, 1:] != IGNORE, ((0, 0), (0, 1))))
        index = torch.from_numpy(positions).to(hidden.device, non_blocking=True)
        chosen = hidden.flatten(0, 1).index_select(0, index)
        targets = self.labels.flatten().index_select(0, index + 1)
        assert isinstance(self, nn.Module)
        frozen = type(self).__bases__[1] is nn.Linear and not any(p.requires_grad for p in self.parameters())
        if frozen and torch.is_grad_enabled() and chosen.requires_grad:
            weight, kind = self.weight, hidden.device.type
            if torch.is_autocast_enabled(kind):  # once, not for every chunk
                weight = weight.to(torch.get_autocast_dtype(kind))
            rows = _rows(weight.shape[0])
            each = _Frozen.apply(  # type: ignore[no-untyped-call]
                chosen, weight, self.bias, targets, rows, self.smoothing
            )
            return self._told(each, index, shown.shape[1])
        rows = _rows(_entries(self))
        if len(positions) <= rows:  # also none at all: a sharded weight wants its gradient
            return self._told(_losses(own, chosen, targets, self.smoothing), index, shown.shape[1])
        parts = []
        for start in range(0, len(positions), rows):
            part = (chosen[start : start + rows], targets[start : start + rows], self.smoothing)
            parts.append(checkpoint(_losses, own, *part, use_reentrant=False))
        return self._told(torch.cat(parts), index, shown.shape[1])

    def _told(self, each: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
        """The sum of the losses of the tokens at these places of rows of this length."""
        if self.tally is not None:
            self.tally.add(each.detach(), index // length)
        return each.sum()


@cache
def _class(original: type[nn.Module]) -> type[nn.Module]:
    return type(original.__name__, (_Told, original), {"__module__": original.__module__})


def _rows(entries: int) -> int:
    return max(1, CHUNK // (4 * entries))


def _entries(head: nn.Module) -> int:
    """V, or as good a guess as its parameters allow."""
    return int(getattr(head, "out_features", 0)) or max(
        (parameter.shape[0] for parameter in head.parameters() if parameter.ndim == 2), default=1 << 17
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _losses(own: Any, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Of each position, (N,)."""
    logits = own(hidden)
    logits = logits.to(_wide(logits.dtype))
    return nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


class _Frozen(torch.autograd.Function):
    """Softmax cross-entropy behind a linear layer that gets no gradient: dL/dh = (softmax(h W^T) - onehot) W."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
        smoothing: float,
    ) -> torch.Tensor:
        """hidden (N, D), weight (V, D), bias (V,), targets (N,) -> the loss of each, (N,)."""
        gradient = torch.empty_like(hidden, dtype=_wide(hidden.dtype))
        lift = 1024.0 if weight.dtype == torch.float16 else 1.0  # most of softmax(...) is below what float16 can say
        each = torch.empty(len(hidden), dtype=_wide(hidden.dtype), device=hidden.device)
        for start in range(0, len(hidden), rows):
            part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            logits = nn.functional.linear(part, weight, bias)
            logits = logits.to(_wide(logits.dtype))
            scale = logits.logsumexp(1, keepdim=True)
            right = logits.gather(1, wanted)
            if smoothing:
                right = right + smoothing * (logits.mean(1, keepdim=True) - right)
            each[start : start + rows] = (scale - right).squeeze(1)
            logits.sub_(scale).exp_().scatter_add_(1, wanted, torch.full_like(scale, smoothing - 1))
            if smoothing:
                logits.sub_(smoothing / logits.shape[1])
            gradient[start : start + rows] = logits.mul_(lift).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient.div_(lift))
        ctx.dtype = hidden.dtype
        return each

    @staticmethod
    def backward(ctx: Any, *outward: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outward[0][:, None]).to(ctx.dtype), None, None, None, None, None
