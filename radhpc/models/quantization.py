"""Keep frozen layers in four bits: NF4 with quantised scales (Dettmers et al., 2023, QLoRA), by bitsandbytes.

Between lazy_loading.py, which packs each weight when its values are loaded, and the model's forward pass, which unpacks
a layer at a time. A packed weight is an ordinary parameter of bytes seen as numbers of the computation's own type, so
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
    def from_linear(cls, layer: nn.Linear) -> "Linear4bit":
        """Return a layer with the parameters of another, which are frozen."""
        result = cls.__new__(cls)
        nn.Module.__init__(result)
        result.in_features, result.out_features = layer.in_features, layer.out_features
        result.weight, result.bias = layer.weight, layer.bias
        result.weight.requires_grad_(False)
        result.train(layer.training)
        return result

    def pack(self, weight: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Quantise (out, in), keep the scales, and return the packed numbers, of type `dtype`, for `weight`."""
        packed, self.scales = compat_bitsandbytes.pack(weight.to(device, torch.float32), dtype)
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        output: torch.Tensor = _PackedProduct.apply(x.to(dtype), bias, self)  # type: ignore[no-untyped-call]
        return output

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (out, in), as the forward pass sees it."""
        if self.scales is None:  # a model without values, whose memory is forecast
            return self.weight.new_empty((self.out_features, self.in_features), dtype=dtype)
        return compat_bitsandbytes.unpack(self.weight.detach(), self.scales, dtype)


class _PackedProduct(torch.autograd.Function):
    """Compute x W' + b, and unpack W once more in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: Linear4bit) -> Any:
        ctx.layer, ctx.dtype = layer, x.dtype
        return nn.functional.linear(x, layer.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        # FSDP has gathered the layer's weight again by now, into the parameter that the layer has.
        return gradient.to(ctx.dtype) @ ctx.layer.unpacked(ctx.dtype), None, None


def packed_shape(shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Size, torch.dtype]:
    """Return the shape and type of a packed weight (out, in) that is stored as numbers of a type."""
    return torch.Size((-(-shape.numel() // (2 * dtype.itemsize)), 1)), dtype


def quantise(model: nn.Module, blocks: tuple[type[nn.Module], ...], trained: Iterable[str]) -> list[str]:
    """Replace the linear layers inside the model's blocks, in place, and return their names.

    Left as they are: layers that a pattern of `trained` names, which a stage trains whole; embeddings, output head,
    norms and projections between the towers. Raises UserError where nothing is left to quantise.
    """
    patterns, names = list(trained), []
    inside = {child for module in model.modules() if isinstance(module, blocks) for child in module.modules()}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module in inside:
            if any(re.search(pattern, f"{name}.weight") for pattern in patterns):
                continue
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, Linear4bit.from_linear(module))
            names.append(name)
    if not names:
        raise UserError("model.quantise: nf4: every layer is trained whole by some stage; allowed is null")
    return names
