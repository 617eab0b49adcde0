"""Each private name of torch that radhpc uses is still there, and does what radhpc expects of it."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from radhpc.core import compat_torch


def test_collectives_of_fsdp_can_be_subclassed() -> None:
    for collective in (compat_torch.DefaultAllGather, compat_torch.DefaultReduceScatter):
        assert callable(collective)
        assert callable(collective.allocate)  # type: ignore[attr-defined]


def test_fake_tensors_have_shapes_and_can_be_left_for_a_while() -> None:
    with compat_torch.FakeTensorMode() as mode:
        fake = torch.ones(3, 4) @ torch.ones(4, 5)
        assert isinstance(fake, compat_torch.FakeTensor)
        assert fake.shape == (3, 5)
        assert fake.fake_mode is mode
        with compat_torch.unset_fake_temporarily() as left:
            assert left is mode
            assert torch.ones(2).sum().item() == 2
        assert isinstance(mode.from_tensor(torch.ones(2)), compat_torch.FakeTensor)


def test_a_dispatch_mode_sees_backward_passes_and_requests_for_values() -> None:
    seen = []

    class Mode(compat_torch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    weight = torch.ones(2, 2, requires_grad=True)
    with Mode():
        loss = (torch.ones(1, 2) @ weight).sum()
        loss.backward()
        assert not any(map(compat_torch.is_value_request, seen))
        loss.item()
    assert sum(func is torch.ops.aten.mm.default for func in seen) == 2, "one forward, one backward"
    assert any(map(compat_torch.is_value_request, seen))


def test_trees() -> None:
    tree = {"a": [1, (2, 3)], "b": 4}
    assert list(compat_torch.tree_iter(tree)) == [1, 2, 3, 4]
    assert compat_torch.tree_map(lambda leaf: leaf + 1, tree) == {"a": [2, (3, 4)], "b": 5}


def test_a_fake_group_has_as_many_ranks_as_it_is_told() -> None:
    dist.init_process_group("fake", store=compat_torch.fake_store(), rank=0, world_size=8)
    try:
        assert dist.get_world_size() == 8
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()


def test_collectives_are_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, 1, True, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group, device = dist.group.WORLD, torch.device("cpu")
        assert group is not None
        before = compat_torch.collectives_begun(group, device)
        dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1))
        assert compat_torch.collectives_begun(group, device) == before + 2
    finally:
        dist.destroy_process_group()


def test_norms() -> None:
    assert [float(norm) for norm in compat_torch.norms([torch.tensor([3.0, 4.0]), torch.zeros(2)])] == [5, 0]


def test_duck_shapes_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx.experimental import _config

    monkeypatch.setattr(_config, "use_duck_shape", True)
    compat_torch.disable_duck_shapes()
    assert _config.use_duck_shape is False


def test_a_storage_is_known_by_its_key() -> None:
    first, second = torch.ones(4), torch.ones(4)
    key = compat_torch.storage_key(first.untyped_storage())
    assert compat_torch.storage_key(first[1:].untyped_storage()) == key
    assert compat_torch.storage_key(second.untyped_storage()) != key


def test_the_tables_of_a_module_are_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    new = nn.Parameter(torch.zeros(2, 2))
    compat_torch.parameter_table(model[0])["weight"] = new
    assert model[0].weight is new
    assert "running_mean" in compat_torch.buffer_table(model[1])
    child = compat_torch.module_table(model).pop("1")
    assert len(model) == 1
    assert isinstance(child, nn.BatchNorm1d)


def test_forward_hooks_are_seen() -> None:
    layer = nn.Linear(2, 2)
    assert not compat_torch.has_forward_hooks(layer)
    handle = layer.register_forward_hook(lambda *_: None)
    assert compat_torch.has_forward_hooks(layer)
    handle.remove()
    assert not compat_torch.has_forward_hooks(layer)
