"""Prepare a model for a stage: choose what is trained, and carry the adapters of one stage to the next.

The model of stage k is built from the base and the last checkpoints of the stages before it, at a start and at a resume
alike: there is no second path. Parameters have canonical names, the base model's own: adapters add `.lora_A.weight`,
`.lora_B.weight` and, with DoRA, `.lora_magnitude_vector.weight` to the name of their layer.

    check(model, recipe.stages)                        # every pattern of every stage, before the first step
    prepare(model, recipe.stages, 2, saved, seed)      # the model that stage 2 starts with
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from torch import nn

from radhpc.core.compat_torch import has_forward_hooks
from radhpc.core.errors import UserError, first_line
from radhpc.core.recipe import LoraSettings, Stage
from radhpc.models.lazy_loading import modify

Tensors = dict[str, torch.Tensor]

_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"


@dataclass(frozen=True)
class Adapter:
    """Trained adapters of an earlier stage."""

    lora: LoraSettings
    tensors: Tensors  # canonical name -> (rank, in) for lora_A, (out, rank) for lora_B, (out,) for DoRA's magnitude

    def layers(self) -> list[str]:
        """Return the names of the adapted layers."""
        return [name.removesuffix(_A) for name in self.tensors if name.endswith(_A)]

    def change(self, layer: str) -> torch.Tensor:
        """Return what the adapter adds to a layer's weight, (out, in): scale * B A, before DoRA's magnitude."""
        a, b = self.tensors[layer + _A], self.tensors[layer + _B]
        return self.lora.scale(len(a)) * (b @ a)


def canonical(name: str) -> str:
    """Return the name of a parameter without what PEFT adds to it."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def is_adapter(name: str) -> bool:
    """Return whether a name is that of an adapter's parameter."""
    return ".lora_" in name


def check(model: nn.Module, stages: Iterable[Stage]) -> None:
    """Check every pattern of every stage against the names of a model that has no adapters yet. Raises UserError."""
    parameters = [name for name, _ in model.named_parameters() if not name.startswith("heads.")]
    modules = dict(model.named_modules())
    before: dict[str, int] = {}
    for stage in stages:
        where = f"stage '{stage.name}'"
        for pattern in stage.train:
            if not any(re.search(pattern, name) for name in parameters):
                raise UserError(f"{where}: train: '{pattern}' matches no parameter")
        if stage.lora is None:
            before = {}
            continue
        lora = stage.lora
        layers = [name for name, module in modules.items() if re.fullmatch(lora.targets, name) and name]
        adaptable = [name for name in layers if isinstance(modules[name], nn.Linear | nn.Embedding | nn.Conv2d)]
        if not adaptable:
            raise UserError(f"{where}: lora.targets: '{lora.targets}' matches no linear layer")
        if len(adaptable) < len(layers):
            other = next(name for name in layers if name not in adaptable)
            raise UserError(
                f"{where}: lora.targets: '{lora.targets}' also matches {other}, a {type(modules[other]).__name__}; "
                "allowed are linear layers"
            )
        for layer in adaptable:
            if has_forward_hooks(modules[layer]):
                raise UserError(
                    f"{where}: lora.targets also matches {layer}, whose output model.fusion or the objective reads; "
                    "name it in 'train' instead"
                )
        for pattern in lora.rank_pattern:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adaptable):
                raise UserError(f"{where}: lora.rank_pattern: '{pattern}' matches none of the targets")
        for pattern in stage.train:
            for layer in adaptable:
                if any(re.search(pattern, f"{layer}.{name}") for name, _ in modules[layer].named_parameters()):
                    raise UserError(
                        f"{where}: {layer} is trained whole by train '{pattern}' and adapted by lora.targets "
                        f"'{lora.targets}'; allowed is one of the two"
                    )
        ranks = {layer: lora.rank_of(layer) for layer in adaptable}
        if stage.adapters in ("grow", "keep"):
            for layer, rank in before.items():
                if layer not in ranks:
                    raise UserError(
                        f"{where}: lora.targets leaves out {layer}, which the stage before adapts; '{stage.adapters}' "
                        "needs its layers, others may be added; or say 'merge'"
                    )
                if ranks[layer] < rank:
                    raise UserError(f"{where}: {layer} has rank {ranks[layer]}, before {rank}; ranks can only grow")
        before = ranks


def prepare(
    model: nn.Module, stages: tuple[Stage, ...], number: int, saved: Callable[[int], Tensors], seed: int
) -> None:
    """Turn the base model into that of stage `number`, ready to train, in place.

    `saved(i)` returns the trained parameters at the end of stage i. Raises UserError where the stage trains nothing, or
    where its model would compute something else than that of the stage before.
    """
    adapter: Adapter | None = None
    for earlier, stage in enumerate(stages[: number + 1]):
        if adapter is not None and stage.adapters in ("merge", "new"):
            if stage.adapters == "merge":
                merge(model, adapter)
            adapter = None
        if earlier == number:
            break
        tensors = saved(earlier)
        lora = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
        _load(model, {name: tensor for name, tensor in tensors.items() if name not in lora})
        if stage.lora is not None:
            adapter = Adapter(stage.lora, lora)
    stage = stages[number]
    if stage.lora is not None:
        attach(model, stage.lora, seed + number)
        if adapter is not None:
            grow(model, stage.lora, adapter)
    choose_trained(model, stage)


def attach(model: nn.Module, lora: LoraSettings, seed: int) -> None:
    """Add new adapters to the layers that the recipe names. A is random by the seed, B zero: the outputs stay equal."""
    config = peft_config(lora)
    torch.manual_seed(seed)
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise UserError(f"lora.targets: '{lora.targets}': {first_line(error)}") from error


def peft_config(lora: LoraSettings) -> peft.LoraConfig:
    """Return PEFT's configuration of a stage's adapters."""
    # PEFT also takes fractions, whatever its annotation says; integers are written as such.
    alpha: Any = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        rank_pattern=dict(lora.rank_pattern),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )


def grow(model: nn.Module, lora: LoraSettings, before: Adapter) -> None:
    """Continue earlier adapters at ranks that are no smaller, and on further layers, without changing the function.

    The old rows of A and columns of B are copied, B times the ratio of the old scale to the new one; new rows of A stay
    random, new columns of B zero. Zeros in both would never get a gradient. With DoRA the magnitudes are copied; where
    the earlier adapters had none, they are the norms of the adapted weights, which changes nothing either. Raises
    UserError where a layer's change differs from that before, beyond float rounding.
    """
    weights = {canonical(name): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for layer in before.layers():
            old_a, old_b = before.tensors[layer + _A], before.tensors[layer + _B]
            if layer + _A not in weights:
                raise UserError(f"lora.targets '{lora.targets}': leaves out {layer}, which the stage before adapts")
            a, b = weights[layer + _A], weights[layer + _B]
            if len(a) < len(old_a):
                raise UserError(f"{layer} has rank {len(a)}, before {len(old_a)}; ranks can only grow")
            a[: len(old_a)] = old_a
            b[:, : len(old_a)] = old_b * (before.lora.scale(len(old_a)) / lora.scale(len(a)))
            expected, grown = before.change(layer), lora.scale(len(a)) * (b @ a)
            _check_change(layer, grown, expected, "growing")
            if lora.dora:
                magnitude = before.tensors.get(layer + _MAGNITUDE)
                if magnitude is None:
                    magnitude = torch.linalg.norm(weights[f"{layer}.weight"] + expected, dim=1)
                weights[layer + _MAGNITUDE].copy_(magnitude)


def merge(model: nn.Module, adapter: Adapter) -> None:
    """Add the adapters to the base weights, in place. Raises UserError where their type cannot represent the change;
    recipes with weights of four bits cannot ask for it.
    """
    weights = dict(model.named_parameters())
    for layer in adapter.layers():
        modify(weights[f"{layer}.weight"], partial(_merged, adapter, layer))


def choose_trained(model: nn.Module, stage: Stage) -> None:
    """Freeze everything but the stage's adapters, the base parameters that it trains whole, and the heads of the terms
    of its objective.
    """
    matched = dict.fromkeys(stage.train, 0)
    for name, parameter in model.named_parameters():
        if name.startswith("heads."):
            term = stage.objective.clinical if name.startswith("heads.findings.") else stage.objective.contrastive
            parameter.requires_grad_(bool(term))
            continue
        parameter.requires_grad_(is_adapter(name))
        for pattern in stage.train:
            if not is_adapter(name) and re.search(pattern, canonical(name)):
                matched[pattern] += 1
                if ".base_layer." in name:
                    raise UserError(f"stage '{stage.name}': {canonical(name)} is both trained whole and adapted")
                parameter.requires_grad_(True)
    for pattern, count in matched.items():
        if not count:
            raise UserError(f"stage '{stage.name}': train: '{pattern}' matches no parameter")


def _merged(adapter: Adapter, layer: str, weight: torch.Tensor) -> None:
    before = weight.float()
    merged = before + adapter.change(layer)
    magnitude = adapter.tensors.get(layer + _MAGNITUDE)
    if magnitude is not None:
        merged *= (magnitude / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
    weight.copy_(merged)
    rounding = torch.finfo(weight.dtype).eps
    _check_change(layer, weight.float() - before, merged - before, "merging", rounding, before)


def _check_change(
    layer: str,
    change: torch.Tensor,
    expected: torch.Tensor,
    operation: str,
    rounding: float = 1e-6,
    base: torch.Tensor | None = None,
) -> None:
    """Raise UserError where a weight's change is not the expected one, up to rounding of it and of the base weight.

    A linear layer computes the same if its weight is the same: compared without a forward pass, on every start.
    """
    difference = float((change - expected).abs().max())
    size = float(expected.abs().max()) + (0.0 if base is None else float(base.abs().max()))
    if not difference <= 10 * rounding * size + 1e-7:
        raise UserError(
            f"{layer}: {operation} the adapters would change the model: by {difference:.1e} where its weights change "
            f"by {size:.1e}"
        )


def _load(model: nn.Module, tensors: Tensors) -> None:
    parameters = {canonical(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        modify(parameters[name], partial(_copy, tensor))


def _copy(value: torch.Tensor, weight: torch.Tensor) -> None:
    weight.copy_(value)
