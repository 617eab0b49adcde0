"""Parameters come to where they are trained, one tensor at a time: no rank holds a whole model on the host.

Between engine_builder.py, which builds a model whose parameters are promises, and fsdp.py, which says how they are
laid out:

    model = build(family, recipe.model, seed)             # of a local folder: no value is read yet
    adapters.prepare(model, ...)                          # what it changes in the base is noted on the promise
    place(model, device, torch.bfloat16, shard)           # each rank reads its own rows

A promised parameter looks like any other to PEFT and to the model's code: a float32 tensor of its shape on the CPU,
which takes four bytes, and all of whose values are zero.
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
from torch._subclasses.fake_tensor import FakeTensor

from radhpc.core.errors import UserError
from radhpc.core.recipe import Model
from radhpc.distributed import shard_layout
from radhpc.distributed.ranks import Ranks
from radhpc.models.family import ModelFamily
from radhpc.models.quantization import Linear4bit, packed_shape

log = logging.getLogger("radhpc")

Change = Callable[[torch.Tensor], object]


@dataclass
class Promise:
    """Where a parameter's values will come from."""

    file: Path  # safetensors
    name: str  # in that file
    length: int = 0  # rows that are wanted: those that the file lacks are the mean of those that it has
    changes: list[Change] = field(default_factory=list)  # to be made to the whole tensor, in float32, in this order

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows from `first` up to `last`, on the CPU, in the file's type, or in float32 where the whole is read."""
        with safe_open(self.file, framework="pt") as file:
            shape = file.get_slice(self.name).get_shape()
            if self.changes or shape and shape[0] < min(last, self.length):
                whole: torch.Tensor = file.get_tensor(self.name).float()
                if shape and shape[0] < self.length:
                    whole = torch.cat([whole, whole.mean(dim=0).expand(self.length - len(whole), *shape[1:])])
                for change in self.changes:
                    change(whole)
                return whole[first:last]
            if not shape:
                return file.get_tensor(self.name)  # type: ignore[no-any-return]
            return file.get_slice(self.name)[first:last]  # type: ignore[no-any-return]


def change(parameter: torch.Tensor, how: Change) -> None:
    """Change a base parameter in place: now, or when its values come."""
    promise: Promise | None = getattr(parameter, "promise", None)
    if promise is None:
        with torch.no_grad():
            how(parameter)
    else:
        promise.changes.append(how)


def build(family: ModelFamily, recipe: Model, seed: int, whole: bool = False) -> nn.Module:
    """The base model on the CPU: random values as the family makes them, or the promise of a local folder's.

    `whole`: read the values at once, for adapters that start from them. So is a folder whose tensors the model takes
    apart or puts together anew. Raises UserError where a folder lacks a tensor.
    """
    if recipe.weights is None or whole:
        return family.build(seed)
    if not isinstance(recipe.weights, str):
        return family.build(seed, _promised)
    model = _promised(family.build_empty, recipe.weights, "")
    if model is None:
        return family.build(seed)
    _generation(model, Path(recipe.weights))
    return family.finish(model)


def _promised(make: Callable[[], nn.Module], folder: str, part: str) -> nn.Module | None:
    """What `make` makes, with the promise of a folder's values; None where they have to be read at once."""
    with torch.device("meta"):
        model = make()
    found = _find(model, Path(folder), part)
    if found is None:
        log.info("%s: its tensors are converted while they are read, so each rank reads all of them", folder)
        return None
    _promise(model, found)
    return model.eval() if _fill_buffers(model) else None


def _find(model: nn.Module, folder: Path, part: str) -> dict[str, tuple[Path, str]] | None:
    """The file and the name there of each parameter and persistent buffer; None where names do not map one to one.

    A language model's folder may lack rows for tokens that its tokenizer was given.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if not isinstance(model, PreTrainedModel):
        return None
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters: Any = [step for step in steps if not isinstance(step, WeightRenaming)]
    state = model.state_dict(keep_vars=True)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()] if part == ".text" else []
    growing = {id(table.weight) for table in tables if table is not None}
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
                if converted is not None:
                    return None
                shape = tensors.get_slice(key).get_shape()
                wanted = list(state[name].shape) if name in state else shape
                fewer = name in state and id(state[name]) in growing and shape[0] < wanted[0]
                if wanted != shape and not (fewer and wanted[1:] == shape[1:]):
                    raise UserError(
                        f"model.weights{part}: {file.name}: {key} has shape {shape}, config.json wants {wanted}"
                    )
                found[name] = (file, key)
    tied = {id(state[name]) for name in found if name in state}
    ties = getattr(model, "all_tied_weights_keys", {})
    missing = [name for name in state if name not in found and id(state[name]) not in tied and name not in ties]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model.weights{part}: {folder}: no tensor for {missing[0]}{more} in its .safetensors files")
    return found


def _promise(model: nn.Module, found: dict[str, tuple[Path, str]]) -> None:
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in found and id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(torch.zeros(()).expand(parameter.shape), parameter.requires_grad)
            length = parameter.shape[0] if parameter.ndim else 0
            made[id(parameter)].promise = Promise(*found[name], length)  # type: ignore[attr-defined]
    by_name = dict(model.named_parameters(remove_duplicate=False))
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    keep = list(by_name.values())  # so that no address comes twice
    for name, parameter in by_name.items():
        source = parameter if id(parameter) in made else by_name[ties[name]]
        holder, _, last = name.rpartition(".")
        model.get_submodule(holder)._parameters[last] = made[id(source)]
    del keep
    for name, _ in list(model.named_buffers()):
        if name in found:
            file, key = found[name]
            holder, _, last = name.rpartition(".")
            model.get_submodule(holder)._buffers[last] = Promise(file, key).rows(0, 1 << 62)


def _fill_buffers(model: nn.Module) -> bool:
    """Those that no file holds, such as the frequencies of rotary positions, by the model's own code; whether all
    could be.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            unset = math.nan if buffer.is_floating_point() else -1
            filled = module._buffers[name] = torch.full_like(buffer, unset, device="cpu")
            for parameter in module.parameters():  # some classes set those of their children, too
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            # The innermost model around it knows its configuration.
            *_, owner = (m for m in model.modules() if hasattr(m, "_init_weights") and module in set(m.modules()))
            with torch.no_grad():
                owner._init_weights(module)
            if bool(filled.isnan().any() if buffer.is_floating_point() else (filled == unset).any()):
                return False
    return True


def _generation(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(f"model.weights: {folder}/generation_config.json: {error}") from error


def place(
    model: nn.Module,
    ranks: Ranks,
    dtype: torch.dtype,
    shard: Callable[[nn.Module], None] | None,
    placed: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Bring each parameter to its device, in place: the trained ones in float32, the others in `dtype`.

    `shard` lays the model out over the ranks while it has no values yet; each rank then reads its own rows. `placed` is
    called with each parameter that has its values. Tied parameters stay tied. Fake tensors, which have no values, stay
    where they are.
    """
    slots = _slots(model)
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    fake = any(isinstance(parameter, FakeTensor) for parameter, _ in slots)
    if fake:
        for parameter, places in slots:
            shape, kind = _target(parameter, places, dtype)
            with parameter.fake_mode:  # type: ignore[attr-defined]
                _put(places, nn.Parameter(parameter.new_empty(shape, dtype=kind), parameter.requires_grad))
    elif shard is not None:
        for parameter, places in slots:
            shape, kind = _target(parameter, places, dtype)
            _put(places, nn.Parameter(torch.empty(shape, dtype=kind, device="meta"), parameter.requires_grad))
    if shard is not None:
        shard(model)
    if fake:
        for parameter in list(model.parameters()) if placed is not None else ():
            assert placed is not None
            placed(parameter)
        return
    if shard is not None:
        model.to_empty(device=ranks.device)
    for module, name, buffer in buffers:
        module._buffers[name] = None if buffer is None else buffer.to(ranks.device)
    slots.reverse()
    while slots:  # values that lay on the host leave it one by one
        parameter, places = slots.pop()
        module, name = places[0]
        shape, kind = _target(parameter, places, dtype)
        target = module._parameters[name]
        if shard is None and _stays(parameter, shape, kind, ranks):
            target = parameter
        elif shard is None:
            target = nn.Parameter(torch.empty(shape, dtype=kind, device=ranks.device), parameter.requires_grad)
        assert target is not None
        _put(places, target)
        values = partial(_rows, parameter)
        if isinstance(module, Linear4bit) and name == "weight":
            values = partial(_slice, module.pack(values(0, len(parameter)), ranks.device, kind))
        if target is not parameter:
            _fill(target, values)
        if placed is not None:
            placed(target)


def _stays(parameter: nn.Parameter, shape: torch.Size, kind: torch.dtype, ranks: Ranks) -> bool:
    """Whether a parameter is already as it is wanted."""
    same = (parameter.shape, parameter.dtype, parameter.device.type) == (shape, kind, ranks.device.type)
    return same and not hasattr(parameter, "promise")


def _target(
    parameter: nn.Parameter, places: list[tuple[nn.Module, str]], dtype: torch.dtype
) -> tuple[torch.Size, torch.dtype]:
    """Shape and type that a parameter is kept in."""
    if any(isinstance(module, Linear4bit) and name == "weight" for module, name in places):
        return packed_shape(parameter.shape, dtype)
    if not parameter.is_floating_point():
        return parameter.shape, parameter.dtype
    return parameter.shape, torch.float32 if parameter.requires_grad else dtype


def _slots(model: nn.Module) -> list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Each parameter with the places that it has in the model."""
    slots: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slots.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(slots.values())


def _put(places: list[tuple[nn.Module, str]], parameter: nn.Parameter) -> None:
    for module, name in places:
        module._parameters[name] = parameter


def _rows(parameter: torch.Tensor, first: int, last: int) -> torch.Tensor:
    promise: Promise | None = getattr(parameter, "promise", None)
    return promise.rows(first, last) if promise is not None else _slice(parameter.detach(), first, last)


def _slice(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return tensor[first:last] if tensor.ndim else tensor


def _fill(parameter: nn.Parameter, values: Callable[[int, int], torch.Tensor]) -> None:
    """Copy what this rank holds of a parameter."""
    mine, held = shard_layout.mine(parameter), shard_layout.local(parameter)
    if held.numel():
        with torch.no_grad():
            held.copy_(values(mine.start, mine.stop))
