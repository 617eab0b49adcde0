"""Batches to a loss: the cross-entropy of the supervised tokens."""

import torch
from torch import nn

from radhpc import token_loss
from radhpc.collate import Batch


class NextToken:
    """Predict each supervised token from all that stands before it."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum of the token losses, in float32: the caller divides by the tokens of the whole global batch."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return token_loss.summed(model, inputs, batch["labels"])
