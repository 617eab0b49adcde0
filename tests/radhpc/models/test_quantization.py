"""Layers of four bits: what they compute, and that PEFT adapts them like any other linear layer."""

from typing import Any

import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from torch import nn

from radhpc.core.errors import UserError
from radhpc.core.recipe import LoraSettings
from radhpc.models import adapters
from radhpc.models.quantization import Linear4bit, packed_shape, quantise

pytest.importorskip("bitsandbytes")  # PEFT sees it, and has layers of its own for bitsandbytes' classes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(32, 8))


def packed(layers: nn.Module) -> nn.Module:
    """Pack every layer of four bits, as loading does."""
    for layer in layers.modules():
        if isinstance(layer, Linear4bit):
            values = layer.pack(layer.weight.detach(), torch.device("cpu"), torch.float32)
            layer.weight = nn.Parameter(values, requires_grad=False)
    return layers


def test_only_frozen_layers_inside_blocks_are_quantised() -> None:
    layers = model()
    assert quantise(layers, (Block,), [r"1\.down"]) == ["0.up", "0.down", "1.up"]
    assert type(layers[2]) is nn.Linear
    with pytest.raises(UserError, match=r"model\.quantise: nf4: every layer is trained whole"):
        quantise(model(), (Block,), ["."])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_has_the_foretold_shape_and_nearly_the_same_values(dtype: torch.dtype) -> None:
    layer = Linear4bit.from_linear(nn.Linear(64, 32))
    weight = layer.weight.detach().clone()
    values = layer.pack(weight, torch.device("cpu"), dtype)
    assert (values.shape, values.dtype) == packed_shape(weight.shape, dtype)
    layer.weight = nn.Parameter(values, requires_grad=False)
    assert (layer.unpacked(torch.float32) - weight).abs().max() < 0.25 * weight.abs().max()


def test_the_gradient_is_that_of_the_unpacked_weight() -> None:
    layers = packed(nn.Sequential(Linear4bit.from_linear(nn.Linear(32, 16))))
    layer: Any = layers[0]  # type: ignore[index]
    x = torch.randn(4, 32, requires_grad=True)
    expected = nn.functional.linear(x, layer.unpacked(torch.float32), layer.bias)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(gradient, wanted)


def test_peft_adapts_them_by_its_plain_linear_layer() -> None:
    layers = model()
    quantise(layers, (Block,), [])
    adapters.attach(layers, LoraSettings(targets=r".*\.(up|down)", rank=4, alpha=8), seed=1)
    adapted = [module for module in layers.modules() if isinstance(module, peft_layer.LoraLayer)]
    assert len(adapted) == 4
    assert {type(module) for module in adapted} == {peft_layer.Linear}, "not one for bitsandbytes' own classes"
    x = torch.randn(3, 32)
    packed(layers)
    before = layers(x)
    plain = packed_twin(x)
    torch.testing.assert_close(before, plain)
    layers(x).square().sum().backward()
    for module in adapted:
        factors: Any = module
        assert factors.lora_B["default"].weight.grad.abs().max() > 0
        assert module.get_base_layer().weight.grad is None


def packed_twin(x: torch.Tensor) -> torch.Tensor:
    """The outputs of the same model without adapters."""
    layers = model()
    quantise(layers, (Block,), [])
    return packed(layers)(x)  # type: ignore[no-any-return]
