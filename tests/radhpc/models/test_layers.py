"""Layers that recompute their activations: the same gradients, less memory, and no graph where all is frozen."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from radhpc.core.errors import UserError
from radhpc.core.recipe import LoraSettings
from radhpc.models import adapters, token_loss
from radhpc.models.families.mllama import MllamaFamily
from radhpc.models.layers import block_kind, leave_casting_to_autocast, prepare_blocks
from tests.radhpc.models.test_attention import mixed_batch, mllama

VISION, TEXT, CROSS = MllamaFamily.blocks


def adapted(targets: str = ".*_proj|.*fc[12]") -> Any:
    """LoRA on all layers that `targets` names, with B that is not zero."""
    model = mllama("segments")
    adapters.attach(model, LoraSettings(rank=2, alpha=4, dropout=0.1, targets=targets), 0)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one step, and the bytes that its forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**mixed_batch(), use_cache=False).logits.square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


def test_gradients_are_equal_bit_for_bit_and_the_vision_tower_keeps_little() -> None:
    plain, all_kept = step(adapted())
    kept = {}
    for kinds in ((), ("text", "cross"), ("vision",), True):
        model = adapted()
        prepare_blocks(model, MllamaFamily.blocks, kinds)
        result, kept[str(kinds)] = step(model)
        assert result.keys() == plain.keys()
        assert all(torch.equal(result[name], plain[name]) for name in plain), kinds
    assert kept["()"] == all_kept
    assert kept["True"] < kept["('vision',)"] < kept["('text', 'cross')"] < all_kept
    assert kept["True"] < 0.3 * all_kept
    print({name: f"{value / 1e6:.2f} MB" for name, value in kept.items()})


def test_a_frozen_tower_builds_no_graph() -> None:
    model = adapted(".*language_model.*_proj")
    prepare_blocks(model, MllamaFamily.blocks, True)
    seen = []
    model.model.vision_model.register_forward_hook(
        lambda _, __, output: seen.append(output.last_hidden_state.requires_grad)
    )
    result, _ = step(model)
    assert seen == [False]
    assert result
    assert not any("vision" in name for name in result)


def test_adapters_take_inputs_as_they_come() -> None:
    model = adapted().bfloat16()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    batch = mixed_batch()
    seen = set()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.eval()
        before = model(**batch, use_cache=False).logits
        assert torch.float32 in seen
        seen.clear()
        leave_casting_to_autocast(model)
        after = model(**batch, use_cache=False).logits
    assert seen == {torch.bfloat16}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_kinds_and_what_a_layer_is_afterwards() -> None:
    model = mllama("segments")
    prepare_blocks(model, MllamaFamily.blocks, ("vision",))
    names = {
        block_kind(name, module) for name, module in model.named_modules() if isinstance(module, MllamaFamily.blocks)
    }
    assert names == {"text", "cross", "vision"}
    layer = model.model.vision_model.transformer.layers[0]
    assert isinstance(layer, VISION)
    assert type(layer).__name__ == VISION.__name__
    assert type(model.model.language_model.layers[0]) is TEXT
    model.eval()
    batch = mixed_batch()
    assert torch.equal(model(**batch).logits, mllama("segments")(**batch).logits)


def test_a_kind_that_the_model_has_not_is_named() -> None:
    model = mllama("segments")
    with pytest.raises(UserError, match="'cross': this model's layers are text"):
        prepare_blocks(model, (TEXT,), ("cross", "text"))


@pytest.mark.timeout(240)
def test_compiled_layers_give_the_same_numbers_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by Dynamo and run as they are: what the compiler behind it makes of them is its own affair."""

    def llama() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            attn_implementation="segments",
        )  # fmt: skip
        return LlamaForCausalLM(config).train()

    traced = []
    original = torch.compile

    def counting(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda call, **options: original(call, backend=counting, **options))
    torch._dynamo.reset()
    compiled, plain = llama(), llama()
    prepare_blocks(compiled, (LlamaDecoderLayer,), True, compiled=True)
    ids = torch.randint(0, 64, (2, 12))
    after = []
    for length in (12, 9, 11):
        for model in (compiled, plain):
            token_loss.summed_loss(model, {"input_ids": ids[:, :length]}, ids[:, :length]).backward()
        after.append(len(traced))
    assert after[0] == after[2] > 0, "another length is not compiled anew"
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
