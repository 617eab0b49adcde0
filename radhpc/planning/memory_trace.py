"""How many bytes of tensors are alive, and how many were at most: of real tensors, or of fake ones that have no memory.

    with FakeTensorMode(), Allocations(model.parameters()) as memory:
        engine.step(...)
    memory.peak

Counts storages, so views cost nothing, and follows FSDP2, which empties and refills storages in place. Where a program
asks for a tensor's value, any will do: what is counted depends on shapes alone.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from radhpc.core.compat_torch import (
    FakeTensor,
    TorchDispatchMode,
    is_value_request,
    storage_key,
    tree_iter,
    tree_map,
    unset_fake_temporarily,
)

SMALL = 1 << 12  # entries of a tensor whose values may still tell a shape

_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class Allocations(TorchDispatchMode):
    """Bytes of live storages, now and at the peak. One at a time: it watches storages change their size."""

    def __init__(self, before: Iterable[torch.Tensor] = (), made_up_values: bool = False) -> None:
        """`before`: tensors that were there already; `made_up_values`: for fake tensors, which have none."""
        super().__init__()
        self.now = self.peak = 0
        self._made_up = made_up_values
        self._held: dict[int, int] = {}  # bytes, by the address of the storage
        for tensor in before:
            self._hold(tensor)

    def __enter__(self) -> "Allocations":
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = self._resize(storage, size)
            self._measure(storage)
            return done

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._made_up and is_value_request(func) and isinstance(args[0], FakeTensor):
            kind = args[0].dtype
            return False if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by next
        result = self._compute(func, args, kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What has no fake tensor among its arguments, such as the whole numbers of a batch, is computed for real:
        shapes may follow from it, as from the sizes of pictures. Large tables of fractions are not kept.
        """
        if self._made_up and func in _INDEXED:  # by a mask that is known: so is how much it chooses
            tensor, indices, *rest = args
            args = (tensor, [index for one in indices for index in _positions(one)], *rest)
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not self._made_up or any(isinstance(tensor, FakeTensor) for tensor in given):
            return func(*args, **kwargs)
        if not given and getattr(func(*args, **kwargs), "is_floating_point", lambda: True)():
            return func(*args, **kwargs)  # a new tensor, of any size
        with unset_fake_temporarily() as mode:
            result = func(*args, **kwargs)

        def back(tensor: Any) -> Any:
            large = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() > SMALL
            return mode.from_tensor(tensor) if large and mode is not None else tensor

        return tree_map(back, result)

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = storage_key(storage)
        if key not in self._held:
            self._held[key] = 0
            weakref.finalize(storage, self._release, key)
        self._measure(storage)

    def _measure(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key in self._held:
            size = storage.nbytes()
            self.now += size - self._held[key]
            self._held[key] = size
            self.peak = max(self.peak, self.now)

    def _release(self, address: int) -> None:
        self.now -= self._held.pop(address)


def _positions(index: Any) -> Any:
    """One index for each axis of a mask whose values are known."""
    if not isinstance(index, torch.Tensor) or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)
