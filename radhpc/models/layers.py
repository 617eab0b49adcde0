"""Prepare the layers of a model one by one: which recompute their activations, and which are compiled.

Transformers recomputes a layer only if its class was written for it, and Mllama's vision layers were not: an image of
four tiles then keeps 10.6 GB. And its switch makes the embeddings ask for gradients, so that a frozen vision tower
builds the whole graph for nothing. Here a layer of any class gets a subclass of its own class that does no more than
this. Enters: a model and the classes of its layers (radhpc.models.family.ModelFamily.blocks), before it is sharded.

    prepare_blocks(model, family.blocks, recompute=("vision", "text"))

A layer has a kind: "cross" if its class is of cross-attention, "vision" if its name or class says so, else "text".
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from radhpc.core.errors import UserError
from radhpc.models.class_extension import extend


class _Prepared:
    """Extend a layer's class: recompute it in the backward pass, or call what torch.compile() made of it."""

    training: bool
    recomputes = False
    compiled: Any = None

    def forward(self, *arguments: Any, **options: Any) -> Any:
        # Not for generation, whose growing cache would have it compiled again and again.
        call = self.compiled if self.compiled and self.training else super().forward  # type: ignore[misc]
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(partial(call, **options), *arguments, use_reentrant=False)
        return call(*arguments, **options)


def prepare_blocks(
    model: nn.Module, blocks: tuple[type[nn.Module], ...], recompute: bool | Sequence[str], compiled: bool = False
) -> None:
    """Change the model's layers in place. Raises UserError for a kind of layer that the model does not have.

    Only layers in training are recomputed; their results and gradients stay the same bit for bit. Compilation happens
    at the first forward passes; lengths may vary without a new one.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, blocks)}
    kinds = {block_kind(name, layer) for name, layer in layers.items()}
    requested = kinds if recompute is True else set(recompute or ())
    for unknown in sorted(requested - kinds):
        raise UserError(
            f"model.checkpoint_activations: '{unknown}': this model's layers are {', '.join(sorted(kinds))}"
        )
    for name, layer in layers.items():
        recomputes = block_kind(name, layer) in requested
        if not recomputes and not compiled:
            continue
        forward: Any = type(layer).forward
        prepared = extend(layer, _Prepared)
        prepared.recomputes = recomputes
        if compiled:
            prepared.compiled = torch.compile(forward.__get__(layer), dynamic=True)


def leave_casting_to_autocast(model: nn.Module) -> None:
    """Keep PEFT from copying each input of an adapted layer to the adapter's float32: under autocast the product is
    computed in the smaller type all the same, and the copy would cost as much as the activations.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            adapted: Any = module
            adapted.cast_input_dtype_enabled = False


def block_kind(name: str, block: nn.Module) -> str:
    """Return the kind of a layer by its name in the model and its class: "cross", "vision" or "text"."""
    if "Cross" in type(block).__name__:
        return "cross"
    is_vision = "Vision" in type(block).__name__ or any(part.startswith("vis") for part in name.split("."))
    return "vision" if is_vision else "text"
