"""Stages on one model: what is trained in each, and how the adapters of one stage pass to the next.

The model of stage k is made anew from the base and the last checkpoints of the stages before it, in a start and in a
resume alike: there is no second path. Parameters have canonical names, the base model's own: adapters add
`.lora_A.weight` and `.lora_B.weight` to the name of their layer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peft
import torch
from torch import nn

from radhpc.errors import UserError, first_line
from radhpc.placing import change
from radhpc.recipe import Lora, Stage

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """Trained adapters of an earlier stage."""

    lora: Lora
    tensors: Tensors  # canonical name -> (rank, in) for lora_A, (out, rank) for lora_B


def canonical(name: str) -> str:
    """The name of a parameter without what PEFT adds to it."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def prepare(
    model: nn.Module, stages: tuple[Stage, ...], number: int, saved: Callable[[int], Tensors], seed: int
) -> None:
    """Turn the base model into that of stage `number`, ready to train, in place.

    `saved(i)` gives the trained parameters at the end of stage i. Raises UserError where the stage trains nothing.
    """
    adapter: Adapter | None = None
    for earlier, stage in enumerate(stages[: number + 1]):
        if adapter is not None and stage.adapters == "merge":
            merge(model, adapter)
            adapter = None
        if earlier == number:
            break
        tensors = saved(earlier)
        lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
        _load(model, {name: tensor for name, tensor in tensors.items() if name not in lora})
        if stage.lora is not None:
            adapter = Adapter(stage.lora, lora)
    stage = stages[number]
    if stage.lora is not None:
        attach(model, stage.lora, seed + number)
        if adapter is not None:
            grow(model, stage.lora, adapter)
    choose_trained(model, stage)


def attach(model: nn.Module, lora: Lora, seed: int) -> None:
    """Put fresh adapters on the layers that the recipe names. A is random by the seed, B zero: nothing changes yet."""
    config = peft_config(lora)
    torch.manual_seed(seed)
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise UserError(f"lora.targets: '{lora.targets}': {first_line(error)}") from error


def peft_config(lora: Lora) -> peft.LoraConfig:
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return peft.LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=lora.targets)


def grow(model: nn.Module, lora: Lora, before: Adapter) -> None:
    """Continue earlier adapters at a rank that is no smaller, without changing the function.

    The old rows of A and columns of B are copied, B times the ratio of the old scale alpha / rank to the new one; new
    rows of A stay random, new columns of B zero. Zeros in both would never get a gradient.
    """
    scale, old_scale = lora.alpha / lora.rank, before.lora.alpha / before.lora.rank
    fresh = {canonical(name): parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    assert fresh.keys() == before.tensors.keys(), "the adapters of two stages must be on the same layers"
    with torch.no_grad():
        for name, old_a in before.tensors.items():
            if ".lora_A." not in name:
                continue
            old_b = before.tensors[name.replace(".lora_A.", ".lora_B.")]
            a, b = fresh[name], fresh[name.replace(".lora_A.", ".lora_B.")]
            a[: before.lora.rank] = old_a
            b[:, : before.lora.rank] = old_b * (old_scale / scale)
            difference = (scale * b @ a - old_scale * old_b @ old_a).abs().max()
            size = (old_scale * old_b @ old_a).abs().max()
            assert difference <= 1e-5 * size + 1e-7, f"{name}: growing changed the function by {difference}"


def merge(model: nn.Module, adapter: Adapter) -> None:
    """Add alpha / rank * B A to the base weights, in place."""
    weights = dict(model.named_parameters())
    scale = adapter.lora.alpha / adapter.lora.rank
    for name, a in adapter.tensors.items():
        if ".lora_A." in name:
            b = adapter.tensors[name.replace(".lora_A.", ".lora_B.")]
            change(weights[name.replace(".lora_A.weight", ".weight")], partial(_add, scale, b, a))


def choose_trained(model: nn.Module, stage: Stage) -> None:
    """Freeze everything but the stage's adapters and the base parameters that it trains whole."""
    matched = dict.fromkeys(stage.train, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        for pattern in stage.train:
            if ".lora_" not in name and re.search(pattern, canonical(name)):
                matched[pattern] += 1
                parameter.requires_grad_(True)
    for pattern, count in matched.items():
        if not count:
            raise UserError(f"stage '{stage.name}': train: '{pattern}' matches no parameter")


def _load(model: nn.Module, tensors: Tensors) -> None:
    parameters = {canonical(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        change(parameters[name], partial(_copy, tensor))


def _add(scale: float, b: torch.Tensor, a: torch.Tensor, weight: torch.Tensor) -> None:
    weight += scale * b @ a


def _copy(value: torch.Tensor, weight: torch.Tensor) -> None:
    weight.copy_(value)
