"""Each private name of transformers that radhpc uses is still there, and does what radhpc expects of it."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers.models.mllama import modeling_mllama

from radhpc.models import compat_transformers as compat

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0,
}  # fmt: skip


def test_a_configuration_carries_its_attention_to_the_model() -> None:
    config = LlamaConfig(**SMALL)
    compat.set_attention(config, "eager")
    assert compat.attention_of(config) == "eager"
    assert compat.attention_of(LlamaForCausalLM(config).config) == "eager"


def test_a_class_makes_a_model_with_a_type_and_an_attention() -> None:
    model = compat.from_config(LlamaForCausalLM, LlamaConfig(**SMALL), torch.float32, "eager")
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.float32
    assert compat.attention_of(model.config) == "eager"


def test_a_model_fills_a_modules_buffers_and_leaves_its_parameters() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert compat.can_initialize(model)
    assert not compat.can_initialize(nn.Linear(2, 2))
    rotary = model.model.rotary_emb
    expected, before = rotary.inv_freq.clone(), model.lm_head.weight.clone()
    rotary.inv_freq.fill_(torch.nan)
    compat.initialize(model, rotary)
    torch.testing.assert_close(rotary.inv_freq, expected)
    compat.initialize(model, model.lm_head)
    assert torch.equal(model.lm_head.weight, before)


def test_tensors_of_a_folder_are_renamed() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    state = model.state_dict(keep_vars=True)
    rename = compat.Renaming(model, state)
    for name in state:
        assert rename(name) == name


def test_generation_expands_inputs_by_the_wrapped_function() -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    calls = []

    def wrap(usual: compat.Expand) -> compat.Expand:
        def expand(*arguments: Any, **inputs: Any) -> tuple[Any, dict[str, Any]]:
            calls.append(inputs)
            return usual(*arguments, **inputs)

        return expand

    compat.wrap_generation(model, wrap)
    model.generate(torch.ones(1, 3, dtype=torch.long), num_beams=2, max_new_tokens=1)
    assert calls, "generate() no longer calls _expand_inputs_for_generation"


def test_generation_asks_whether_images_are_encoded_before() -> None:
    assert hasattr(LlavaForConditionalGeneration, "_supports_mm_encoder_outputs"), "see encode_inside_forward()"


def test_mllama_builds_its_masks_by_functions_of_its_module() -> None:
    masks = compat.mllama_masks()
    try:
        compat.replace_mllama_masks(compat.MllamaMasks(lambda *_: "vision", lambda *_: ("cross", torch.ones(1))))
        upstream: Any = modeling_mllama
        assert upstream._prepare_aspect_ratio_attention_mask(None, 0, 0, torch.float32) == "vision"
        assert upstream._prepare_cross_attention_mask(None, 0, torch.float32)[0] == "cross"
    finally:
        compat.replace_mllama_masks(masks)
    for kind, name in (
        (modeling_mllama.MllamaVisionModel, "_prepare_aspect_ratio_attention_mask"),
        (modeling_mllama.MllamaModel, "_prepare_cross_attention_mask"),
    ):
        assert name in inspect.unwrap(kind.forward).__code__.co_names
