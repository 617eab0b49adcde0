"""Batches to a loss: the cross-entropy of the supervised tokens."""

import torch
from torch import nn

from radhpc.collate import IGNORE, Batch


class NextToken:
    """Predict each supervised token from all that stands before it."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum of the token losses, in float32: the caller divides by the tokens of the whole global batch."""
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
