"""Define the batch of encoded samples that the collator makes and that models and objectives read."""

import torch

IGNORE = -100  # PyTorch's label for "no loss here"
Batch = dict[str, torch.Tensor]
