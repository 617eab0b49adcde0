"""Load parameters where they are trained, one tensor at a time: no rank holds a whole model on the host.

Between engine_builder.py, which builds a model whose parameters are lazy, and fsdp.py, which shards them:

    model = build(family, recipe.model, seed)             # of a local folder: no value is read yet
    adapters.prepare(model, ...)                          # its changes to the base are noted on the lazy parameters
    materialize(model, device, torch.bfloat16, shard)     # each rank reads its own rows

A lazy parameter looks like any other to PEFT and to the model's code: a float32 tensor of its shape on the CPU, which
takes four bytes, and all of whose values are zero.
"""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from radhpc.core.compat_torch import FakeTensor, buffer_table, parameter_table
from radhpc.core.errors import UserError
from radhpc.core.recipe import ModelSettings
from radhpc.distributed import shard_layout
from radhpc.distributed.ranks import Ranks
from radhpc.models import compat_transformers as compat
from radhpc.models.family import ModelFamily
from radhpc.models.quantization import Linear4bit, packed_shape

log = logging.getLogger("radhpc")

Modification = Callable[[torch.Tensor], object]
Slots = list[tuple[nn.Module, str]]  # the places of one parameter in a model: a module, and its name there


@dataclass
class LazyWeight:
    """The place that a parameter's values are read from."""

    file: Path  # safetensors
    name: str  # in that file
    length: int = 0  # rows of the parameter: those that the file lacks are the mean of those that it has
    modifications: list[Modification] = field(default_factory=list)  # of the full tensor, in float32, in this order

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Read rows from `first` to `last` (exclusive), on the CPU, in the file's type; in float32 where all of the
        tensor has to be read.
        """
        with safe_open(self.file, framework="pt") as file:
            shape = file.get_slice(self.name).get_shape()
            if self.modifications or shape and shape[0] < min(last, self.length):
                tensor: torch.Tensor = file.get_tensor(self.name).float()
                if shape and shape[0] < self.length:
                    tensor = torch.cat([tensor, tensor.mean(dim=0).expand(self.length - len(tensor), *shape[1:])])
                for modify in self.modifications:
                    modify(tensor)
                return tensor[first:last]
            if not shape:
                return file.get_tensor(self.name)  # type: ignore[no-any-return]
            return file.get_slice(self.name)[first:last]  # type: ignore[no-any-return]


def lazy_weight(parameter: torch.Tensor) -> LazyWeight | None:
    """Return the source of a parameter that build() made lazy and materialize() has not loaded."""
    source: LazyWeight | None = getattr(parameter, "lazy_weight", None)
    return source


def modify(parameter: torch.Tensor, modification: Modification) -> None:
    """Change a base parameter in place: at once, or when its values are loaded."""
    source = lazy_weight(parameter)
    if source is None:
        with torch.no_grad():
            modification(parameter)
    else:
        source.modifications.append(modification)


def build(family: ModelFamily, recipe: ModelSettings, seed: int, eager: bool = False) -> nn.Module:
    """Build the base model on the CPU: with random values as the family makes them, or with lazy parameters of a local
    folder.

    `eager`: read the values at once, for adapters that start from them. So is a folder whose tensors the model splits
    or joins. Raises UserError where a folder lacks a tensor.
    """
    if recipe.weights is None or eager:
        return family.build(seed)
    if not isinstance(recipe.weights, str):
        return family.build(seed, _lazy_model)
    model = _lazy_model(family.build_empty, recipe.weights, "")
    if model is None:
        return family.build(seed)
    _load_generation_config(model, Path(recipe.weights))
    return family.finish(model)


def _lazy_model(make: Callable[[], nn.Module], folder: str, key: str) -> nn.Module | None:
    """Return what `make` makes, with lazy parameters of a folder; None where its values have to be read at once.

    `key`: what follows model.weights in the recipe, such as ".text".
    """
    with torch.device("meta"):
        model = make()
    tensors = _match_tensors(model, Path(folder), key)
    if tensors is None:
        log.info("%s: its tensors are converted while they are read, so each rank reads all of them", folder)
        return None
    _make_lazy(model, tensors)
    return model.eval() if _fill_buffers(model) else None


def _match_tensors(model: nn.Module, folder: Path, key: str) -> dict[str, tuple[Path, str]] | None:
    """Return the file and the name there of each parameter and persistent buffer; None where names do not map one to
    one.

    A language model's folder may lack rows for tokens that its tokenizer was given.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    state = model.state_dict(keep_vars=True)
    rename = compat.Renaming(model, state)
    untyped: Any = model
    tables = [untyped.get_input_embeddings(), untyped.get_output_embeddings()] if key == ".text" else []
    growing = {id(table.weight) for table in tables if table is not None}
    result = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for tensor in tensors.keys():  # noqa: SIM118
                name = rename(tensor)
                if name is None:
                    return None
                shape = tensors.get_slice(tensor).get_shape()
                expected = list(state[name].shape) if name in state else shape
                fewer = name in state and id(state[name]) in growing and shape[0] < expected[0]
                if expected != shape and not (fewer and expected[1:] == shape[1:]):
                    raise UserError(
                        f"model.weights{key}: {file.name}: {tensor} has shape {shape}, config.json says {expected}"
                    )
                result[name] = (file, tensor)
    tied = {id(state[name]) for name in result if name in state}
    ties = getattr(model, "all_tied_weights_keys", {})
    missing = [name for name in state if name not in result and id(state[name]) not in tied and name not in ties]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model.weights{key}: {folder}: no tensor for {missing[0]}{more} in its .safetensors files")
    return result


def _make_lazy(model: nn.Module, tensors: dict[str, tuple[Path, str]]) -> None:
    lazy: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in tensors and id(parameter) not in lazy:
            lazy[id(parameter)] = nn.Parameter(torch.zeros(()).expand(parameter.shape), parameter.requires_grad)
            length = parameter.shape[0] if parameter.ndim else 0
            lazy[id(parameter)].lazy_weight = LazyWeight(*tensors[name], length)  # type: ignore[attr-defined]
    by_name = dict(model.named_parameters(remove_duplicate=False))
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    keep = list(by_name.values())  # so that no address comes twice
    for name, parameter in by_name.items():
        source = parameter if id(parameter) in lazy else by_name[ties[name]]
        owner, _, last = name.rpartition(".")
        parameter_table(model.get_submodule(owner))[last] = lazy[id(source)]
    del keep
    for name, _ in list(model.named_buffers()):
        if name in tensors:
            file, tensor = tensors[name]
            owner, _, last = name.rpartition(".")
            buffer_table(model.get_submodule(owner))[last] = LazyWeight(file, tensor).rows(0, 1 << 62)


def _fill_buffers(model: nn.Module) -> bool:
    """Fill the buffers that no file holds, such as the frequencies of rotary positions, by the model's own code; return
    whether all could be.
    """
    for module in model.modules():
        table = buffer_table(module)
        for name, buffer in table.items():
            if buffer is None or not buffer.is_meta:
                continue
            unset = math.nan if buffer.is_floating_point() else -1
            filled = table[name] = torch.full_like(buffer, unset, device="cpu")
            # The innermost model around it knows its configuration.
            *_, owner = (m for m in model.modules() if compat.can_initialize(m) and module in set(m.modules()))
            compat.initialize(owner, module)
            if bool(filled.isnan().any() if buffer.is_floating_point() else (filled == unset).any()):
                return False
    return True


def _load_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(f"model.weights: {folder}/generation_config.json: {error}") from error


def materialize(
    model: nn.Module,
    ranks: Ranks,
    dtype: torch.dtype,
    shard: Callable[[nn.Module], None] | None,
    on_materialized: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Bring each parameter to its device, in place: the trained ones in float32, the others in `dtype`.

    `shard` shards the model over the ranks while it has no values yet; each rank then reads its own rows.
    `on_materialized` is called with each parameter that has its values. Tied parameters stay tied. Fake tensors, which
    have no values, stay where they are.
    """
    parameters = _slots(model)
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in buffer_table(module).items()]
    fake = any(isinstance(parameter, FakeTensor) for parameter, _ in parameters)
    if fake:
        for parameter, slots in parameters:
            shape, kept = _target(parameter, slots, dtype)
            with parameter.fake_mode:  # type: ignore[attr-defined]
                _put(slots, nn.Parameter(parameter.new_empty(shape, dtype=kept), parameter.requires_grad))
    elif shard is not None:
        for parameter, slots in parameters:
            shape, kept = _target(parameter, slots, dtype)
            _put(slots, nn.Parameter(torch.empty(shape, dtype=kept, device="meta"), parameter.requires_grad))
    if shard is not None:
        shard(model)
    if fake:
        for parameter in list(model.parameters()) if on_materialized is not None else ():
            assert on_materialized is not None
            on_materialized(parameter)
        return
    if shard is not None:
        model.to_empty(device=ranks.device)
    for module, name, buffer in buffers:
        buffer_table(module)[name] = None if buffer is None else buffer.to(ranks.device)
    parameters.reverse()
    while parameters:  # values that lie on the host leave it one by one
        parameter, slots = parameters.pop()
        module, name = slots[0]
        shape, kept = _target(parameter, slots, dtype)
        target = parameter_table(module)[name]
        if shard is None and _is_in_place(parameter, shape, kept, ranks):
            target = parameter
        elif shard is None:
            target = nn.Parameter(torch.empty(shape, dtype=kept, device=ranks.device), parameter.requires_grad)
        assert target is not None
        _put(slots, target)
        read = partial(_read_rows, parameter)
        if isinstance(module, Linear4bit) and name == "weight":
            read = partial(_slice, module.pack(read(0, len(parameter)), ranks.device, kept))
        if target is not parameter:
            _fill(target, read)
        if on_materialized is not None:
            on_materialized(target)


def _is_in_place(parameter: nn.Parameter, shape: torch.Size, dtype: torch.dtype, ranks: Ranks) -> bool:
    """Return whether a parameter already has its values, shape, type and device."""
    same = (parameter.shape, parameter.dtype, parameter.device.type) == (shape, dtype, ranks.device.type)
    return same and lazy_weight(parameter) is None


def _target(parameter: nn.Parameter, slots: Slots, dtype: torch.dtype) -> tuple[torch.Size, torch.dtype]:
    """Return the shape and type that a parameter is kept in."""
    if any(isinstance(module, Linear4bit) and name == "weight" for module, name in slots):
        return packed_shape(parameter.shape, dtype)
    if not parameter.is_floating_point():
        return parameter.shape, parameter.dtype
    return parameter.shape, torch.float32 if parameter.requires_grad else dtype


def _slots(model: nn.Module) -> list[tuple[nn.Parameter, Slots]]:
    """Return each parameter with its places in the model."""
    slots: dict[int, tuple[nn.Parameter, Slots]] = {}
    for module in model.modules():
        for name, parameter in parameter_table(module).items():
            if parameter is not None:
                slots.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(slots.values())


def _put(slots: Slots, parameter: nn.Parameter) -> None:
    for module, name in slots:
        parameter_table(module)[name] = parameter


def _read_rows(parameter: torch.Tensor, first: int, last: int) -> torch.Tensor:
    source = lazy_weight(parameter)
    return source.rows(first, last) if source is not None else _slice(parameter.detach(), first, last)


def _slice(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return tensor[first:last] if tensor.ndim else tensor


def _fill(parameter: nn.Parameter, read: Callable[[int, int], torch.Tensor]) -> None:
    """Copy into a parameter the rows that this rank owns of it."""
    rows, shard = shard_layout.local_rows(parameter), shard_layout.local_shard(parameter)
    if shard.numel():
        with torch.no_grad():
            shard.copy_(read(rows.start, rows.stop))
