"""Attention without masks: which queries see which keys is said by segments, and the fastest kernel that is there runs.

A mask of a picture of four tiles has 41 million entries, and one that is not plainly causal keeps every fast kernel
out. Most masks say little: "these 1,601 patches see those 6,432". So a model that was set to the implementation
"segments" passes Segments where transformers passes masks. Enters: what the model's attention layers hand to any
implementation of transformers' AttentionInterface, queries (batch, heads, length, size) and keys and values with as
many heads or a divisor of them. Leaves: (batch, length, heads, size). Example, two rows of which one has padding:

    rows = [np.arange(0, 7), np.arange(7, 12)]
    mask = Segments([Segment(row, row) for row in rows], (2, 7, 7), device, causal=True)

Kernels, the first that is installed and that the device and the type of the numbers allow: the flash-attn package
(4, 3, 2), torch's variable-length kernel, and scaled_dot_product_attention over equal segments at once, which chooses
among flash, memory-efficient and math by itself.
"""

import contextlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from radhpc.distributed.host_staging import host_values

log = logging.getLogger("radhpc")

NAME = "segments"  # of this implementation in transformers, and in a recipe's model.attention
SMALL = 1 << 20  # entries of a mask

Numbers = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """Queries that see the same keys; positions count over the whole batch, row after row."""

    queries: Numbers
    keys: Numbers


class Packed(NamedTuple):
    """Segments as kernels of packed tokens want them."""

    queries: torch.Tensor | None  # (sum of query_lengths,) int64, positions in the batch; None: all, in their order
    keys: torch.Tensor | None
    query_starts: torch.Tensor  # (segments + 1,) int32: where each segment begins in `queries`, and the end
    key_starts: torch.Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Segments:
    """What stands in the place of a mask. Each segment belongs to one row of the batch. A query must not be in two; the
    attention of one in no segment means nothing.
    """

    parts: Sequence[Segment]
    shape: tuple[int, int, int]  # rows, and of each the positions of queries and of keys
    device: torch.device
    causal: bool = False  # then a segment's n-th query sees its first n keys

    @cached_property
    def plainly_causal(self) -> bool:
        """Whether each segment is the beginning of a row of its own, so that a triangle over the whole rows does it."""
        _, length, keys = self.shape
        return self.causal and length == keys and all(
            len(part.queries) == part.queries[-1] - part.queries[0] + 1 and part.queries[0] % length == 0
            for part in self.parts
        )  # fmt: skip

    @cached_property
    def small_mask(self) -> torch.Tensor | None:
        """(rows, 1, queries, keys) of bool, where that is so little that cutting and joining would take longer."""
        rows, length, keys = self.shape
        if rows * length * keys > SMALL:
            return None
        segment = np.full(rows * length, -1)
        # A query sees the keys up to its own number within the segment, or all of them: then each has the number 0.
        # In no segment, the last one here: whatever is finite.
        numbers = np.full((len(self.parts) + 1, keys), np.iinfo(np.int32).max, np.int32)
        numbers[-1] = 0
        own = np.zeros((rows * length, 1), np.int32)
        for n, part in enumerate(self.parts):
            segment[part.queries] = n
            numbers[n, part.keys % keys] = np.arange(len(part.keys)) if self.causal else 0
            if self.causal:
                own[part.queries, 0] = np.arange(len(part.queries))
        return _to((numbers[segment] <= own).reshape(rows, 1, length, keys), self.device)

    @cached_property
    def packed(self) -> Packed:
        rows, *lengths = self.shape
        chosen: list[torch.Tensor | None] = []
        for positions, length in zip(zip(*self.parts, strict=True), lengths, strict=True):
            joined = np.concatenate(positions).astype(np.int64)
            whole = len(joined) == rows * length and bool((joined == np.arange(rows * length)).all())
            chosen.append(None if whole else _to(joined, self.device))
        sizes = [tuple(len(part[side]) for part in self.parts) for side in (0, 1)]
        starts = [_to(np.cumsum([0, *side], dtype=np.int32), self.device) for side in sizes]
        return Packed(chosen[0], chosen[1], starts[0], starts[1], sizes[0], sizes[1])


def _to(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# What transformers calls


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "Segments | torch.Tensor | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An implementation for transformers' AttentionInterface. A plain mask, as decoding has, goes to SDPA."""
    if not isinstance(attention_mask, Segments):
        # Without a mask SDPA takes a module for causal that does not say so: the cross-attention, for one.
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=causal, **others
        )
        return output, None
    return attend_segments(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5, dropout), None


@torch.compiler.disable
def attend_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Segments, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of (batch, heads, queries, size) over (batch, key heads, keys, size) -> (batch, queries, heads, size).

    Computed in autocast's type where that is on, else in the values' own; the result has that type.
    """
    batch, heads, length, size = query.shape
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    chosen = kernel(query.device, dtype, size, dropout)
    if chosen.call is _by_shape and (mask.plainly_causal or mask.small_mask is not None):
        seen = None if mask.plainly_causal else mask.small_mask
        return _dot_product(query, key, value, seen, seen is None, scale, dropout).transpose(1, 2)
    # As packed tokens: (positions, heads, size).
    queries, keys = mask.packed.queries, mask.packed.keys
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    q = q if queries is None else q.index_select(0, queries)
    k, v = (k, v) if keys is None else (k.index_select(0, keys), v.index_select(0, keys))
    output = chosen.call(q, k, v, mask.packed, mask.causal, scale, dropout)
    if queries is not None:
        output = output.new_zeros(batch * length, heads, size).index_copy(0, queries, output)
    return output.view(batch, length, heads, size)


def text_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> "Segments | torch.Tensor | None":
    """An entry for transformers' AttentionMaskInterface: causal segments where a whole text goes through the model.

    One more token over a cache, and whatever is not plainly causal, gets the mask that SDPA gets.
    """
    fresh = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    if not fresh or q_length == 1 or mask_function is not causal_mask_function:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device, **others
        )
    positions = np.arange(batch_size * q_length).reshape(batch_size, q_length)
    shown = current("attention_mask", attention_mask)
    valid = np.ones_like(positions, bool) if shown is None else shown.astype(bool)
    rows = [row[seen] for row, seen in zip(positions, valid, strict=True)]
    shape = (batch_size, q_length, q_length)
    return Segments([Segment(row, row) for row in rows if len(row)], shape, torch.device(device), causal=True)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, text_mask)


# A forward pass whose masks' values are at hand


_masks: list[dict[str, torch.Tensor]] = []  # of the forward passes that are under way; the last one counts


def watch(model: torch.nn.Module, *names: str) -> None:
    """Let current() find these keyword arguments while `model` runs, as they were before anybody converted them."""

    def before(_: torch.nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        _masks.append({name: arguments[name] for name in names if arguments.get(name) is not None})

    def after(*_: Any) -> None:
        _masks.pop()

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, always_call=True)


def watched() -> bool:
    """Whether a model with this implementation is running."""
    return bool(_masks)


def current(name: str, converted: torch.Tensor | None) -> npt.NDArray[Any] | None:
    """The values of a mask of the forward pass under way; `converted`: what has become of it since."""
    if converted is None:
        return None
    return host_values(_masks[-1].get(name, converted) if _masks else converted)


def current_of_shape(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """The values of a mask of the forward pass under way, if there is one of this shape."""
    found = _masks[-1].get(name) if _masks else None
    return host_values(found) if found is not None and tuple(found.shape) == shape else None


# Kernels


class Kernel(NamedTuple):
    """A way to compute attention over packed tokens."""

    name: str
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed, bool, float, float], torch.Tensor]


def kernel(device: torch.device, dtype: torch.dtype, size: int, dropout: float = 0.0) -> Kernel:
    """The fastest one for numbers of a type, on a device, with heads of a size; logged when it is first chosen."""
    return _choose(device, dtype, size, dropout > 0)


@cache
def _choose(device: torch.device, dtype: torch.dtype, size: int, dropout: bool) -> Kernel:
    found = next(candidates(device, dtype, size, dropout))
    log.info("attention: %s for heads of %d in %s on %s", found.name, size, str(dtype)[6:], _described(device))
    return found


def candidates(device: torch.device, dtype: torch.dtype, size: int, dropout: bool) -> Iterator[Kernel]:
    """All that can, the fastest first."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    flash = capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256
    if flash and not dropout:
        for version, module, allowed in (
            (4, "flash_attn.cute", capability[0] in (9, 10) and size in (64, 96, 128)),
            (3, "flash_attn_interface", capability[0] == 9),
        ):
            if allowed and (function := _function(module, "flash_attn_varlen_func")):
                yield Kernel(f"flash-attn {version}", _packaged(function))
    if flash and (function := _function("flash_attn", "flash_attn_varlen_func")):
        yield Kernel("flash-attn 2", _packaged(function, takes_dropout=True))
    if flash and not dropout and (function := _function("torch.nn.attention.varlen", "varlen_attn")):
        yield Kernel("torch varlen", _torch_variable_length(function))
    yield Kernel("SDPA", _by_shape)


def _described(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _function(module: str, name: str) -> Callable[..., Any] | None:
    """Of a module that may not be installed, or not for this torch or this machine."""
    with contextlib.suppress(Exception):
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found
    return None


def _packaged(function: Callable[..., Any], takes_dropout: bool = False) -> Callable[..., torch.Tensor]:
    """flash_attn_varlen_func of any version of the package; the newer ones give the log-sum-exp as well."""

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, causal: bool, scale: float, dropout: float
    ) -> torch.Tensor:
        more = {"dropout_p": dropout} if takes_dropout else {}
        found = function(
            q, k, v,
            cu_seqlens_q=packed.query_starts, cu_seqlens_k=packed.key_starts,
            max_seqlen_q=max(packed.query_lengths), max_seqlen_k=max(packed.key_lengths),
            softmax_scale=scale, causal=causal, **more,
        )  # fmt: skip
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return output

    return call


def _torch_variable_length(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    windows = "window_size" in inspect.signature(function).parameters  # torch 2.10 and before have is_causal

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, causal: bool, scale: float, dropout: float
    ) -> torch.Tensor:
        assert not dropout
        k, v = _all_heads(k, v, q.shape[1])  # older ones know no groups of heads
        triangle: dict[str, Any] = {"window_size": (-1, 0)} if windows else {"is_causal": True}
        output: torch.Tensor = function(
            q, k, v, packed.query_starts, packed.key_starts, max(packed.query_lengths), max(packed.key_lengths),
            scale=scale, **(triangle if causal else {}),
        )  # fmt: skip
        return output

    return call


def _by_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, causal: bool, scale: float, dropout: float
) -> torch.Tensor:
    """scaled_dot_product_attention without a mask, once for all segments of the same lengths."""
    shapes = list(zip(packed.query_lengths, packed.key_lengths, strict=True))
    queries, keys, values = q.split(packed.query_lengths), k.split(packed.key_lengths), v.split(packed.key_lengths)
    outputs: list[torch.Tensor | None] = [None] * len(shapes)
    for shape in dict.fromkeys(shapes):
        members = [n for n, other in enumerate(shapes) if other == shape]
        gathered = [torch.stack([side[n] for n in members]).transpose(1, 2) for side in (queries, keys, values)]
        found = _dot_product(*gathered, None, causal, scale, dropout)
        for n, part in zip(members, found.transpose(1, 2), strict=True):
            outputs[n] = part
    return torch.cat([output for output in outputs if output is not None])


def _dot_product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    seen: torch.Tensor | None, causal: bool, scale: float, dropout: float,
) -> torch.Tensor:  # fmt: skip
    """scaled_dot_product_attention of (batch, heads, length, size), where keys and values may have fewer heads."""
    grouped = q.device.type == "cpu"  # on a GPU the memory-efficient kernel knows no groups, and the slow one would run
    if not grouped:
        k, v = _all_heads(k, v, q.shape[1])
    return scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _all_heads(k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values once for each head of the queries; the heads are dimension 1."""
    times = heads // k.shape[1]
    return (k, v) if times == 1 else (k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))
