"""Operations of a step against what is known of its layers by hand, and against torch's own count of both passes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from radhpc.engine.flop_counter import FlopMeter, _operations_of, peak_flops
from radhpc.hooks import node_curves


def counted(module: nn.Module, *inputs: torch.Tensor) -> float:
    meter = FlopMeter()
    with meter.forward():
        module(*inputs)
    meter.close(1)
    assert meter.per_sample is not None
    return meter.per_sample


def test_a_frozen_layer_needs_two_thirds_and_one_behind_nothing_trained_a_third() -> None:
    first, second = nn.Linear(8, 16), nn.Linear(16, 4).requires_grad_(False)
    x = torch.randn(2, 5, 8)
    one, two = 2 * 10 * 8 * 16, 2 * 10 * 16 * 4
    assert counted(nn.Sequential(first, second), x) == 2 * one + 2 * two  # x has no gradient
    assert counted(nn.Sequential(first.requires_grad_(False), second), x) == one + two


def test_it_is_what_torch_counts_of_both_passes() -> None:
    """Of a whole model without recomputation: convolution, attention, products."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.inward, self.outward = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 5)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(image).flatten(2).transpose(1, 2)
            query, key, value = self.inward(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            weights = (query @ key.transpose(-1, -2)).softmax(-1)
            found: torch.Tensor = self.outward((weights @ value).transpose(1, 2).flatten(2))
            return found

    model, image = Small(), torch.randn(2, 3, 16, 16)
    with FlopCounterMode(display=False) as theirs:
        model(image).sum().backward()
    assert counted(model, image) == theirs.get_total_flops()
    query = torch.randn(1, 2, 6, 8, requires_grad=True)
    meter = FlopMeter()
    with meter.forward():
        scaled_dot_product_attention(query, query, query)
    meter.close(1)
    assert meter.per_sample == 3 * 4 * 2 * 36 * 8


def test_attention_of_segments_counts_pairs_within_them() -> None:
    tensor, ends = torch.randn(7, 2, 8), torch.tensor([0, 3, 7])
    assert _operations_of("flash_attn._flash_attn_varlen_forward", (tensor, tensor, tensor, ends, ends), {}, None) == (
        4 * (9 + 16) * 2 * 8
    )


def test_a_meter_counts_once_and_knows_no_peak_of_a_cpu() -> None:
    meter, layer, x = FlopMeter(), nn.Linear(8, 8).requires_grad_(False), torch.randn(4, 8)
    assert meter.speed(4, 1.0, None) == {}
    with meter.forward():
        layer(x)
    meter.restart()
    with meter.forward():
        layer(x)
    meter.close(4)
    with meter.forward():
        layer(x)
    assert meter.speed(4, 0.5, None) == pytest.approx({"teraflops_per_rank": 2 * 512 / 1e12})
    assert meter.speed(4, 0.5, 2048)["mfu"] == pytest.approx(0.5)
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_compiled_layers_are_counted_by_a_pass_of_their_own_and_zeros_not_at_all() -> None:
    layer, x = nn.Linear(8, 8).requires_grad_(False), torch.randn(4, 8)
    for meter, wanted in (
        (FlopMeter(compiled=True), 128),
        (FlopMeter(engine="deepspeed"), None),
        (FlopMeter(quantised=True), None),
    ):
        with meter.forward():
            layer(x)
        meter.close(4)
        assert meter.per_sample is None
        with meter.forward(even_if_compiled=True):
            layer(x)
        meter.close(4)
        assert meter.per_sample == wanted


def test_curves_of_nodes() -> None:
    told = [(f"n{n // 2}", {"gigabytes": float(n), "requests": 1.0}) for n in range(6)]
    found = node_curves(told, many=3)
    assert found == {
        **{f"nodes_gigabytes/n{n}": 2.0 * n + 1 for n in range(3)},
        **{f"nodes_requests/n{n}": 2.0 for n in range(3)},
    }
    few = node_curves(told, many=2)
    assert [few[f"nodes_gigabytes/{which}"] for which in ("least", "middle", "most")] == [1.0, 3.0, 5.0]
    assert np.isfinite(list(few.values())).all()
