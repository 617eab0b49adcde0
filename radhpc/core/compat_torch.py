"""Wrap the private names of torch: no other module of radhpc, slurm or shards may use one.

A release of torch may rename or remove any of these without notice. Each entry says which name it wraps and what to do
when it is gone; tests/radhpc/core/test_compat_torch.py has a test for each. Importing this module imports torch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# torch.distributed.fsdp._fully_shard._fsdp_collectives: FSDP2's own collectives, which radhpc.distributed.ranks
# subclasses to time them. When they are gone: implement the protocols that FSDPModule.set_custom_all_gather and
# set_custom_reduce_scatter document with dist.all_gather_into_tensor and dist.reduce_scatter_tensor, or give up timing.
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

# torch._subclasses.fake_tensor: tensors that have a shape and no values, on which `radhpc plan` runs a step. When they
# are gone: look for the same classes where torch.compile or torch.export take them from; there is no public path yet.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # isort: skip

# torch.utils._python_dispatch and torch.utils._pytree: the hook on every operation, which counts memory and operations,
# and its nested arguments. When they are gone: torch.overrides.TorchFunctionMode sees the calls before autograd, so
# backward passes would have to be counted apart; torch.utils.pytree is the newer, public tree.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

__all__ = [
    "DefaultAllGather",
    "DefaultReduceScatter",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "buffer_table",
    "collectives_begun",
    "disable_duck_shapes",
    "fake_store",
    "has_forward_hooks",
    "is_value_request",
    "module_table",
    "norms",
    "parameter_table",
    "storage_key",
    "tree_iter",
    "tree_map",
    "unset_fake_temporarily",
]


def fake_store() -> Any:
    """Return the store of a process group with the backend "fake", whose collectives return at once.

    Wraps torch.testing._internal.distributed.fake_pg.FakeStore; importing that module registers the backend. When it is
    gone: register a backend of one's own with dist.Backend.register_backend.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def collectives_begun(group: dist.ProcessGroup, device: torch.device) -> int:
    """Return how many collectives this rank has begun in a group's backend for a type of device; any thread may ask.

    Wraps ProcessGroup._get_backend and Backend._get_sequence_number_for_group. When they are gone: count the calls of
    radhpc.distributed.ranks instead, which misses those inside the engine, so that a hang is found by time alone.
    """
    backend: Any = group._get_backend(device)
    return int(backend._get_sequence_number_for_group())


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the Euclidean norm of each tensor, in one kernel per device: torch._foreach_norm.

    When it is gone: torch.nn.utils.get_total_norm of each, or torch.linalg.vector_norm in a loop, which is slower.
    """
    return list(torch._foreach_norm(list(tensors)))


def disable_duck_shapes() -> None:
    """Let torch.compile not take sizes that are equal by chance in the first batch for one symbol.

    Sets torch.fx.experimental._config.use_duck_shape. When it is gone: mark the axes with torch._dynamo.mark_dynamic,
    or accept a second compilation.
    """
    from torch.fx.experimental import _config

    _config.use_duck_shape = False


def is_value_request(function: Any) -> bool:
    """Return whether an operation that a TorchDispatchMode sees asks for a tensor's value, as item() does.

    Compares with torch.ops.aten._local_scalar_dense. When it is gone: look up what Tensor.item dispatches to.
    """
    return function is torch.ops.aten._local_scalar_dense.default


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return an identity of a storage that outlives its Python object: UntypedStorage._cdata.

    When it is gone: data_ptr() for real tensors, but fake ones have none.
    """
    return int(storage._cdata)


def parameter_table(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name, for replacing them without registering: nn.Module._parameters.

    When it is gone: delattr and register_parameter, which lose the order of names.
    """
    return module._parameters


def buffer_table(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return a module's own buffers by name, for replacing them: nn.Module._buffers.

    When it is gone: module.register_buffer with the same name and persistence.
    """
    return module._buffers


def module_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's own children by name, for taking one out for a while: nn.Module._modules.

    When it is gone: delattr, and setattr afterwards, which changes the order of names.
    """
    return module._modules


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward hooks, so that something reads its output: nn.Module._forward_hooks.

    When it is gone: keep the handles that register_forward_hook() returns.
    """
    return bool(module._forward_hooks)
