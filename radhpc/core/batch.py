"""A batch of encoded samples: what the collator makes, and what models and objectives read."""

import torch

IGNORE = -100  # PyTorch's label for "no loss here"
Batch = dict[str, torch.Tensor]
