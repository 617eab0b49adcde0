"""Each undocumented name of bitsandbytes that radhpc uses is still there, and does what radhpc expects of it."""

import pytest
import torch
from torch import nn

from radhpc.models import compat_bitsandbytes

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_comes_back_in_any_type(dtype: torch.dtype) -> None:
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    packed, scales = compat_bitsandbytes.pack(weight, dtype)
    assert packed.dtype == dtype
    assert packed.numel() * dtype.itemsize * 2 == weight.numel()
    for wide in (torch.float32, torch.bfloat16):
        unpacked = compat_bitsandbytes.unpack(packed, scales, wide)
        assert unpacked.dtype == wide
        assert unpacked.shape == weight.shape
        assert (unpacked.float() - weight).abs().mean() < 0.1
    twice, _ = compat_bitsandbytes.pack(compat_bitsandbytes.unpack(packed, scales, torch.float32), dtype)
    assert torch.equal(twice.view(torch.uint8), packed.view(torch.uint8))


def test_the_state_of_an_optimizer_has_these_names() -> None:
    parameter = nn.Parameter(torch.ones(4096))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-3)
    state = compat_bitsandbytes.initialize_state(optimizer, parameter)
    assert state is optimizer.state[parameter]
    for moment in compat_bitsandbytes.MOMENTS:
        assert state[moment.values].dtype == torch.uint8
        assert state[moment.values].shape == parameter.shape
        assert state[moment.codes].shape == (256,)
        assert state[moment.codes].diff().min() > 0
        assert state[moment.scales].shape == (parameter.numel() // compat_bitsandbytes.MOMENT_BLOCK,)
    small = nn.Parameter(torch.ones(10))
    optimizer.add_param_group({"params": [small]})
    assert compat_bitsandbytes.initialize_state(optimizer, small)["state1"].dtype == torch.float32
