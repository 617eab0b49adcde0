"""Wrap the private and undocumented names of transformers: no other module may use one.

A release may rename or remove any of these without notice. Each function says which name it wraps and what to do when
it is gone; tests/radhpc/models/test_compat_transformers.py has a test for each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.mllama import modeling_mllama

Expand = Callable[..., tuple[Any, dict[str, Any]]]


def attention_of(config: Any) -> str | None:
    """Return the attention implementation of a configuration: PreTrainedConfig._attn_implementation.

    When it is gone: keep the name that set_attention() was given.
    """
    name: str | None = config._attn_implementation
    return name


def set_attention(config: Any, name: str) -> None:
    """Choose the attention implementation of models that are made from a configuration.

    Sets PreTrainedConfig._attn_implementation, as `attn_implementation` of from_pretrained does. When it is gone: make
    the model with AutoModel.from_config(config, attn_implementation=name), or model.set_attn_implementation(name).
    """
    config._attn_implementation = name


def from_config(kind: Any, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """Make a model of class `kind` with random values: PreTrainedModel._from_config.

    When it is gone: kind(config) under torch.set_default_dtype, after set_attention().
    """
    return kind._from_config(config, dtype=dtype, attn_implementation=attention)


def can_initialize(module: nn.Module) -> bool:
    """Return whether a module has PreTrainedModel._init_weights, which initialize() calls."""
    return hasattr(module, "_init_weights")


def initialize(model: nn.Module, module: nn.Module) -> None:
    """Set a module's own values as the model that contains it does, but none of its parameters.

    Calls PreTrainedModel._init_weights, which leaves out what is marked with `_is_hf_initialized`. When they are gone:
    build the model on the CPU and copy its buffers.
    """
    for parameter in module.parameters():  # some classes set those of their children, too
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    owner: Any = model
    with torch.no_grad():
        owner._init_weights(module)


class Renaming:
    """The names that tensors of a folder get in a model.

    Wraps transformers.conversion_mapping.get_model_conversion_mapping and, of transformers.core_model_loading,
    WeightRenaming and rename_source_key, none of which is documented. When they are gone: return None for every model
    whose key_mapping is not empty, so that its folder is read at once by from_pretrained().
    """

    def __init__(self, model: Any, state: dict[str, torch.Tensor]) -> None:
        """`state`: the model's state_dict(keep_vars=True)."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        steps = get_model_conversion_mapping(model)
        self._renamings: Any = [step for step in steps if isinstance(step, WeightRenaming)]
        self._converters: Any = [step for step in steps if not isinstance(step, WeightRenaming)]
        self._prefix: str = model.base_model_prefix
        self._state = state

    def __call__(self, key: str) -> str | None:
        """Return the name in the model of a tensor in a file; None where it is converted, not only renamed."""
        from transformers.core_model_loading import rename_source_key

        name, converted = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        return None if converted is not None else str(name)


def wrap_generation(model: Any, wrap: Callable[[Expand], Expand]) -> None:
    """Replace the function with which generate() repeats its inputs for beams, and let images reach forward().

    Sets GenerationMixin._expand_inputs_for_generation and, to False, _supports_mm_encoder_outputs. When they are gone:
    repeat the inputs before generate() is called, with num_return_sequences of 1.
    """
    model._expand_inputs_for_generation = wrap(model._expand_inputs_for_generation)
    model._supports_mm_encoder_outputs = lambda: False


class MllamaMasks(NamedTuple):
    """Functions of transformers.models.mllama.modeling_mllama that build its masks."""

    vision: Callable[[torch.Tensor, int, int, torch.dtype], Any]
    cross: Callable[[torch.Tensor, int, torch.dtype], tuple[Any, torch.Tensor]]


def mllama_masks() -> MllamaMasks:
    """Return modeling_mllama._prepare_aspect_ratio_attention_mask and _prepare_cross_attention_mask.

    When they are gone: see replace_mllama_masks().
    """
    upstream: Any = modeling_mllama
    return MllamaMasks(upstream._prepare_aspect_ratio_attention_mask, upstream._prepare_cross_attention_mask)


def replace_mllama_masks(masks: MllamaMasks) -> None:
    """Let every Mllama of this process build its masks by other functions.

    When the functions are gone: subclass MllamaVisionModel and MllamaModel and override where their masks are made, or
    register the mask with AttentionMaskInterface if transformers builds Mllama's masks that way by then.
    """
    upstream: Any = modeling_mllama
    upstream._prepare_aspect_ratio_attention_mask = masks.vision
    upstream._prepare_cross_attention_mask = masks.cross
