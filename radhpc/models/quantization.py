"""Frozen layers in four bits: NF4 with quantised scales (Dettmers et al., 2023, QLoRA), by bitsandbytes.

Between lazy_loading.py, which packs each weight when its values come, and the model's forward pass, which unpacks a
layer at a time. A packed weight is an ordinary parameter of bytes seen as numbers of the computation's own type, so
FSDP2 shards and gathers it like any other, and never converts it:

    names = quantise(model, family.blocks, trained)    # before adapters are attached: a layer of four bits takes them
    layer.weight                                       # (out * in / 2 / bytes of the type, 1)
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from radhpc.core.errors import UserError
from radhpc.models import compat_bitsandbytes


class Linear4bit(nn.Linear):
    """A frozen linear layer whose weight is packed. Until pack() it has the shape that adapters look for."""

    scales: Any = None  # bitsandbytes' QuantState: no buffers, whose type an engine might convert

    @classmethod
    def of(cls, layer: nn.Linear) -> "Linear4bit":
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made.weight, made.bias = layer.weight, layer.bias
        made.weight.requires_grad_(False)
        made.train(layer.training)
        return made

    def pack(self, weight: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Quantise (out, in), keep the scales, and give the packed numbers, of type `dtype`, for `weight`."""
        packed, self.scales = compat_bitsandbytes.pack(weight.to(device, torch.float32), dtype)
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        output: torch.Tensor = _Product.apply(x.to(dtype), bias, self)  # type: ignore[no-untyped-call]
        return output

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in), as the forward pass sees it."""
        if self.scales is None:  # a model without values, whose memory is foretold
            return self.weight.new_empty((self.out_features, self.in_features), dtype=dtype)
        return compat_bitsandbytes.unpack(self.weight.detach(), self.scales, dtype)


class _Product(torch.autograd.Function):
    """x W' + b, which unpacks W once more in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: Linear4bit) -> Any:
        ctx.layer, ctx.dtype = layer, x.dtype
        return nn.functional.linear(x, layer.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        # FSDP has gathered the layer's weight again by now, into the parameter that the layer has.
        return gradient.to(ctx.dtype) @ ctx.layer.unpacked(ctx.dtype), None, None


def packed_shape(shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Size, torch.dtype]:
    """Of a weight (out, in), stored as numbers of this type."""
    return torch.Size((-(-shape.numel() // (2 * dtype.itemsize)), 1)), dtype


def quantise(model: nn.Module, blocks: tuple[type[nn.Module], ...], trained: Iterable[str]) -> list[str]:
    """Replace the linear layers inside the model's blocks, in place, but those that a pattern of `trained` names: a
    stage trains them whole. Embeddings, output head, norms and projections between the towers stay as they are. Gives
    the names. Raises UserError where nothing is left to quantise.
    """
    patterns, names = list(trained), []
    inside = {child for module in model.modules() if isinstance(module, blocks) for child in module.modules()}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module in inside:
            if any(re.search(pattern, f"{name}.weight") for pattern in patterns):
                continue
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, Linear4bit.of(module))
            names.append(name)
    if not names:
        raise UserError("model.quantise: nf4: every layer is trained whole by some stage; allowed is null")
    return names
