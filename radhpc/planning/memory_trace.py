"""Trace the bytes of live tensors and their peak: of real tensors, or of fake ones that have no memory.

    with FakeTensorMode(), MemoryTrace(model.parameters()) as memory:
        engine.step(...)
    memory.peak

Counts storages, so views cost nothing, and follows FSDP2, which empties and refills storages in place. Where a program
asks for the value of a fake tensor it gets any: what is counted depends on shapes alone.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from radhpc.core.compat_torch import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    is_value_request,
    storage_key,
    tree_iter,
    tree_map,
    unset_fake_temporarily,
)

SMALL = 1 << 12  # entries of a tensor whose values may still tell a shape

_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class MemoryTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of live storages, current and peak. Use one at a time: it patches how storages change their size."""

    def __init__(self, existing: Iterable[torch.Tensor] = (), fake_values: bool = False) -> None:
        """`existing`: tensors that are alive already; `fake_values`: for fake tensors, which have no values."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._fake_values = fake_values
        self._held: dict[int, int] = {}  # bytes, by the address of the storage
        for tensor in existing:
            self._hold(tensor)

    def __enter__(self) -> "MemoryTrace":
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = self._resize(storage, size)
            self._measure(storage)
            return done

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._fake_values and is_value_request(func) and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            if dtype.is_floating_point:
                return 1.0
            return (
                False if dtype == torch.bool else int(dtype != torch.uint8)
            )  # DeepSpeed's flags of overflow are bytes
        if any(issubclass(tensor_type, DTensor) for tensor_type in types):
            return NotImplemented  # its local tensors are dispatched next
        result = self._compute(func, args, kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute for real what has no fake tensor among its arguments, such as the integers of a batch: shapes may
        follow from it, as from the sizes of pictures. Large floating-point results become fake.
        """
        if self._fake_values and func in _INDEXED:  # the values of a real mask give the size of the result
            tensor, indices, *rest = args
            args = (tensor, [index for one in indices for index in _positions(one)], *rest)
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not self._fake_values or any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        if not tensors and getattr(func(*args, **kwargs), "is_floating_point", lambda: True)():
            return func(*args, **kwargs)  # a new tensor, of any size
        with unset_fake_temporarily() as mode:
            result = func(*args, **kwargs)

        def fake_if_large(tensor: Any) -> Any:
            large = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() > SMALL
            return mode.from_tensor(tensor) if large and isinstance(mode, FakeTensorMode) else tensor

        return tree_map(fake_if_large, result)

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
            self.current += size - self._held[key]
            self._held[key] = size
            self.peak = max(self.peak, self.current)

    def _release(self, address: int) -> None:
        self.current -= self._held.pop(address)


def _positions(index: Any) -> Any:
    """Return one index for each axis of a mask whose values are known."""
    if not isinstance(index, torch.Tensor) or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)
