"""Run forward passes of a model on its devices, without training: losses, findings, generation and logits.

Enters: batches on the CPU. Leaves: numbers and tensors on the CPU. The base of the engines in fsdp.py and zero.py.

In lockstep (see ForwardEngine.lockstep) all ranks must call each of these methods together, with one batch each: the
parameters are gathered from all ranks in every pass.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from radhpc.core.batch import Batch
from radhpc.data.collate import TARGET_KEYS
from radhpc.distributed.host_staging import keep_host_values
from radhpc.distributed.ranks import Ranks
from radhpc.engine.objective import Objective


class ForwardEngine:
    """A model on the device or devices of this rank."""

    def __init__(self, model: nn.Module, ranks: Ranks, objective: Objective) -> None:
        self.model, self.ranks, self._objective = model, ranks, objective
        self.autocast: Any = contextlib.nullcontext()  # around every forward pass, also around those of others

    @property
    def lockstep(self) -> bool:
        """Return whether every rank must make as many forward passes as its peers."""
        return isinstance(self.model, FSDPModule)

    @property
    def forward_module(self) -> nn.Module:
        """The module that a forward pass calls: the model, or what an engine has wrapped around it."""
        return self.model

    def to_device(self, batch: Batch) -> Batch:
        device = self.ranks.device
        return {name: keep_host_values(value.to(device, non_blocking=True), value) for name, value in batch.items()}

    def _inputs(self, batch: Batch) -> Batch:
        """Return the batch on the device, without the keys that are targets."""
        return {name: value for name, value in self.to_device(batch).items() if name not in TARGET_KEYS}

    def _loss(self, batch: Batch) -> torch.Tensor:
        with self.autocast:
            return self._objective(self.forward_module, self.to_device(batch))

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> float:
        """Return the summed token loss of a batch, without training."""
        self.model.eval()
        return float(self._loss(batch))

    @torch.no_grad()
    def predict_findings(self, batch: Batch) -> torch.Tensor | None:
        """Return the probability of each finding by the multi-label head, (batch, names); None where the stage has no
        head.
        """
        self.model.eval()
        with self.autocast:
            probabilities = self._objective.predict_findings(self.forward_module, self.to_device(batch))
        return None if probabilities is None else probabilities.float().cpu()

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, **decoding: Any) -> torch.Tensor:
        """Decode greedily, unless arguments of transformers' generate() say otherwise; return (batch, new tokens)."""
        self.model.eval()
        inputs = self._inputs(batch)
        with self.autocast:
            ids = self.model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                **{"do_sample": False, **decoding},
                synced_gpus=self.lockstep,  # no rank stops before the last one has
            )
        return torch.as_tensor(ids)[:, batch["input_ids"].shape[1] :].cpu()

    @torch.no_grad()
    def next_logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits of the token that follows each row of a batch padded on the left: (batch, vocabulary),
        float32 on the CPU.
        """
        self.model.eval()
        inputs = self._inputs(batch)
        with self.autocast:
            return torch.as_tensor(self.forward_module(**inputs).logits)[:, -1].float().cpu()
