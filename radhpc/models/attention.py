"""Compute attention without masks: segments say which queries see which keys, and the fastest available kernel runs.

A mask of a picture of four tiles has 41 million entries, and one that is not plainly causal excludes every fast kernel.
Most masks say little: "these 1,601 patches see those 6,432". So a model that was set to the implementation "segments"
passes Segments where transformers passes masks. Enters: what the model's attention layers pass to any implementation of
transformers' AttentionInterface, queries (batch, heads, length, size) and keys and values with as many heads or a
divisor of them. Leaves: (batch, length, heads, size). Example, two rows of which one has padding:

    rows = [np.arange(0, 7), np.arange(7, 12)]
    mask = Segments([Segment(row, row) for row in rows], (2, 7, 7), device, causal=True)

Kernels, the first that is installed and that the device and the type of the numbers allow: the flash-attn package
(4, 3, 2), torch's variable-length kernel, and scaled_dot_product_attention over segments of equal lengths, which
chooses among flash, memory-efficient and math by itself.
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
SMALL_MASK = 1 << 20  # entries

Positions = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """Queries that see the same keys; positions count over the whole batch, row after row."""

    queries: Positions
    keys: Positions


class Packed(NamedTuple):
    """Segments in the form that kernels for packed tokens take."""

    queries: torch.Tensor | None  # (sum of query_lengths,) int64, positions in the batch; None: all, in their order
    keys: torch.Tensor | None
    query_starts: torch.Tensor  # (segments + 1,) int32: where each segment begins in `queries`, and the end
    key_starts: torch.Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """The options of one call of attention."""

    scale: float  # of the products of queries and keys
    dropout: float = 0.0  # probability
    causal: bool = False  # a segment's n-th query sees its first n keys


@dataclass(frozen=True, eq=False)
class Segments:
    """A replacement of a mask. Each segment belongs to one row of the batch. A query must not be in two segments; the
    attention of a query in none is undefined.
    """

    segments: Sequence[Segment]
    shape: tuple[int, int, int]  # rows, and of each the positions of queries and of keys
    device: torch.device
    causal: bool = False  # then a segment's n-th query sees its first n keys

    @cached_property
    def plainly_causal(self) -> bool:
        """Return whether each segment is the beginning of a row of its own: then a triangle over all rows is enough."""
        _, length, keys = self.shape
        return self.causal and length == keys and all(
            len(segment.queries) == segment.queries[-1] - segment.queries[0] + 1 and segment.queries[0] % length == 0
            for segment in self.segments
        )  # fmt: skip

    @cached_property
    def small_mask(self) -> torch.Tensor | None:
        """Return a mask (rows, 1, queries, keys) of bool, where it is so small that packing would take longer."""
        rows, length, keys = self.shape
        if rows * length * keys > SMALL_MASK:
            return None
        segment_of = np.full(rows * length, -1)
        # A query sees the keys up to its own number within the segment, or all of them: then each has the number 0.
        # A query in no segment, the last one here, sees all keys: the result has to be finite.
        numbers = np.full((len(self.segments) + 1, keys), np.iinfo(np.int32).max, np.int32)
        numbers[-1] = 0
        own = np.zeros((rows * length, 1), np.int32)
        for n, segment in enumerate(self.segments):
            segment_of[segment.queries] = n
            numbers[n, segment.keys % keys] = np.arange(len(segment.keys)) if self.causal else 0
            if self.causal:
                own[segment.queries, 0] = np.arange(len(segment.queries))
        return _to((numbers[segment_of] <= own).reshape(rows, 1, length, keys), self.device)

    @cached_property
    def packed(self) -> Packed:
        """The segments as kernels for packed tokens take them, on the device."""
        rows, *lengths = self.shape
        chosen: list[torch.Tensor | None] = []
        for positions, length in zip(zip(*self.segments, strict=True), lengths, strict=True):
            joined = np.concatenate(positions).astype(np.int64)
            all_in_order = len(joined) == rows * length and bool((joined == np.arange(rows * length)).all())
            chosen.append(None if all_in_order else _to(joined, self.device))
        sizes = [tuple(len(segment[side]) for segment in self.segments) for side in (0, 1)]
        starts = [_to(np.cumsum([0, *side], dtype=np.int32), self.device) for side in sizes]
        return Packed(chosen[0], chosen[1], starts[0], starts[1], sizes[0], sizes[1])


def _to(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# The functions that transformers calls


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
        # Without a mask SDPA takes a module for causal unless it says otherwise, as the cross-attention does not.
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=causal, **others
        )
        return output, None
    return attend_segments(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5, dropout), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Segments, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Compute attention of (batch, heads, queries, size) over (batch, key heads, keys, size), and return
    (batch, queries, heads, size), in autocast's type where that is on, else in that of the values.
    """
    batch, heads, length, size = query.shape
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    kernel = fastest_kernel(query.device, dtype, size, dropout)
    if kernel.call is sdpa_by_length and (mask.plainly_causal or mask.small_mask is not None):
        seen = None if mask.plainly_causal else mask.small_mask
        return _dot_product(query, key, value, seen, Options(scale, dropout, seen is None)).transpose(1, 2)
    # As packed tokens: (positions, heads, size).
    queries, keys = mask.packed.queries, mask.packed.keys
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    q = q if queries is None else q.index_select(0, queries)
    k, v = (k, v) if keys is None else (k.index_select(0, keys), v.index_select(0, keys))
    output = kernel.call(q, k, v, mask.packed, Options(scale, dropout, mask.causal))
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

    One more token over a cache, and every mask that is not plainly causal, gets the mask that SDPA gets.
    """
    fresh = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    if not fresh or q_length == 1 or mask_function is not causal_mask_function:
        offset: Any = q_offset  # a tensor, too, whatever sdpa_mask's annotation says
        return sdpa_mask(
            batch_size, q_length, kv_length, offset, kv_offset, mask_function, attention_mask, device=device, **others
        )
    positions = np.arange(batch_size * q_length).reshape(batch_size, q_length)
    padding = mask_values("attention_mask", attention_mask)
    valid = np.ones_like(positions, bool) if padding is None else padding.astype(bool)
    rows = [row[seen] for row, seen in zip(positions, valid, strict=True)]
    shape = (batch_size, q_length, q_length)
    return Segments([Segment(row, row) for row in rows if len(row)], shape, torch.device(device), causal=True)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, text_mask)


# The values of a forward pass's masks


_masks: list[dict[str, torch.Tensor]] = []  # of the forward passes that are running; the last one counts


def record_masks(model: torch.nn.Module, *names: str) -> None:
    """Let mask_values() find these keyword arguments while `model` runs, as they were before any conversion."""

    def before(_: torch.nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        _masks.append({name: arguments[name] for name in names if arguments.get(name) is not None})

    def after(*_: Any) -> None:
        _masks.pop()

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, always_call=True)


def is_recording() -> bool:
    """Return whether a model with this implementation is running."""
    return bool(_masks)


def mask_values(name: str, converted: torch.Tensor | None) -> npt.NDArray[Any] | None:
    """Return the values of a mask of the forward pass that is running; `converted`: what the model made of it since."""
    if converted is None:
        return None
    return host_values(_masks[-1].get(name, converted) if _masks else converted)


def mask_values_of_shape(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """Return the values of a mask of the forward pass that is running, if it has one of this shape."""
    mask = _masks[-1].get(name) if _masks else None
    return host_values(mask) if mask is not None and tuple(mask.shape) == shape else None


# Kernels


class Kernel(NamedTuple):
    """A way to compute attention over packed tokens."""

    name: str
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed, Options], torch.Tensor]


def fastest_kernel(device: torch.device, dtype: torch.dtype, size: int, dropout: float = 0.0) -> Kernel:
    """Return the fastest kernel for numbers of a type, on a device, with heads of a size; log it the first time."""
    return _choose(device, dtype, size, dropout > 0)


@cache
def _choose(device: torch.device, dtype: torch.dtype, size: int, dropout: bool) -> Kernel:
    kernel = next(usable_kernels(device, dtype, size, dropout))
    log.info("attention: %s for heads of %d in %s on %s", kernel.name, size, str(dtype)[6:], _device_name(device))
    return kernel


def usable_kernels(device: torch.device, dtype: torch.dtype, size: int, dropout: bool) -> Iterator[Kernel]:
    """Yield every kernel that can compute it, the fastest first."""
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
    yield Kernel("SDPA", sdpa_by_length)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _function(module: str, name: str) -> Callable[..., Any] | None:
    """Import a function of a module that may not be installed, or not for this torch or this machine."""
    with contextlib.suppress(Exception):
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function
    return None


def _packaged(function: Callable[..., Any], takes_dropout: bool = False) -> Callable[..., torch.Tensor]:
    """Wrap flash_attn_varlen_func of any version of the package; the newer ones return the log-sum-exp as well."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, options: Options) -> torch.Tensor:
        more = {"dropout_p": options.dropout} if takes_dropout else {}
        result = function(
            q, k, v,
            cu_seqlens_q=packed.query_starts, cu_seqlens_k=packed.key_starts,
            max_seqlen_q=max(packed.query_lengths), max_seqlen_k=max(packed.key_lengths),
            softmax_scale=options.scale, causal=options.causal, **more,
        )  # fmt: skip
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output

    return call


def _torch_variable_length(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    windows = "window_size" in inspect.signature(function).parameters  # torch 2.10 and before have is_causal

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, options: Options) -> torch.Tensor:
        assert not options.dropout
        k, v = _all_heads(k, v, q.shape[1])  # older versions do not support groups of heads
        triangle: dict[str, Any] = {"window_size": (-1, 0)} if windows else {"is_causal": True}
        output: torch.Tensor = function(
            q, k, v, packed.query_starts, packed.key_starts, max(packed.query_lengths), max(packed.key_lengths),
            scale=options.scale, **(triangle if options.causal else {}),
        )  # fmt: skip
        return output

    return call


def sdpa_by_length(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, options: Options) -> torch.Tensor:
    """Call scaled_dot_product_attention without a mask, once for all segments of the same lengths."""
    lengths = list(zip(packed.query_lengths, packed.key_lengths, strict=True))
    queries = torch.split(q, list(packed.query_lengths))
    keys, values = torch.split(k, list(packed.key_lengths)), torch.split(v, list(packed.key_lengths))
    outputs: list[torch.Tensor | None] = [None] * len(lengths)
    for pair in dict.fromkeys(lengths):
        members = [n for n, other in enumerate(lengths) if other == pair]
        q, k, v = (torch.stack([side[n] for n in members]).transpose(1, 2) for side in (queries, keys, values))
        result = _dot_product(q, k, v, None, options)
        for n, output in zip(members, result.transpose(1, 2), strict=True):
            outputs[n] = output
    return torch.cat([output for output in outputs if output is not None])


def _dot_product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """Call scaled_dot_product_attention of (batch, heads, length, size); keys and values may have fewer heads."""
    grouped = q.device.type == "cpu"  # on a GPU the memory-efficient kernel has no groups, and the slow one would run
    if not grouped:
        k, v = _all_heads(k, v, q.shape[1])
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen,
        dropout_p=options.dropout,
        is_causal=options.causal,
        scale=options.scale,
        enable_gqa=grouped,
    )


def _all_heads(k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat keys and values once for each head of the queries; the heads are dimension 1."""
    times = heads // k.shape[1]
    return (k, v) if times == 1 else (k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))
