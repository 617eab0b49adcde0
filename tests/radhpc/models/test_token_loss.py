"""The chunked loss against the plain one: values, gradients, memory; heads that are frozen, trained and adapted."""

from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from radhpc.data.collate import IGNORE
from radhpc.models import token_loss
from radhpc.planning.memory_trace import MemoryTrace


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, **more
    )
    return LlamaForCausalLM(config).double()


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 211, (3, 40))
    labels = ids.clone()
    labels[:, :11], labels[0, 30:], labels[2] = IGNORE, IGNORE, IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def plain(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (loss / 7).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def prepared(head: str) -> Any:
    model = llama(tie_word_embeddings=head == "tied")
    if head == "frozen":
        model.lm_head.requires_grad_(False)
    if head == "adapted":
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=".*(lm_head|q_proj)"), model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("rows", [1, 7, 4096])
@pytest.mark.parametrize("head", ["frozen", "trained", "tied", "adapted"])
def test_loss_and_gradients_are_those_of_all_logits(monkeypatch: pytest.MonkeyPatch, head: str, rows: int) -> None:
    monkeypatch.setattr(token_loss, "CHUNK", rows * 4 * 211)
    inputs, labels = batch()
    model = prepared(head)
    expected = plain(model, inputs, labels)
    theirs = gradients(model, expected)
    result = token_loss.summed_loss(model, inputs, labels)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    ours = gradients(model, result)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= (4 if head == "adapted" else 10)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)
    assert model(**inputs).logits.shape == (3, 40, 211), "without labels the head gives logits"
    with torch.no_grad():
        torch.testing.assert_close(token_loss.summed_loss(model, inputs, labels), expected.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", ["frozen", "adapted"])
def test_losses_are_told_apart_by_what_their_rows_are_of(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    """Also where chunks are computed again in the backward pass, which must not count twice."""
    monkeypatch.setattr(token_loss, "CHUNK", 7 * 4 * 211)
    inputs, labels = batch()
    model = prepared(head)
    grouped = token_loss.GroupedLoss(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))
    gradients(model, token_loss.summed_loss(model, inputs, labels, grouped=grouped))
    rows = [float(plain(model, {name: one[n : n + 1] for name, one in inputs.items()}, labels[n : n + 1]).detach())
            for n in range(2)]  # fmt: skip
    assert grouped.sums.tolist() == pytest.approx([rows[0], rows[1], sum(rows)])
    token_loss.summed_loss(model, inputs, labels)
    assert grouped.sums[2] == pytest.approx(sum(rows)), "the head has forgotten it"


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_nothing_supervised_is_a_zero_with_gradients(head: str) -> None:
    """All ranks must have the same gradients to exchange, also one that was given empty slots alone."""
    inputs, labels = batch()
    model = prepared(head)
    loss = token_loss.summed_loss(model, inputs, torch.full_like(labels, IGNORE))
    assert float(loss.detach()) == 0
    result = gradients(model, loss)
    assert result.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(gradient.any() for gradient in result.values())


def test_bfloat16_is_as_near_as_the_plain_loss() -> None:
    inputs, labels = batch()
    model = prepared("frozen").float()
    exact = gradients(model, plain(model, inputs, labels))
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = plain(model, inputs, labels), token_loss.summed_loss(model, inputs, labels)
    assert result.dtype == torch.float32
    assert float(result.detach()) == pytest.approx(float(expected.detach()), rel=2e-3)
    name = "model.layers.0.mlp.up_proj.weight"
    errors = [(gradients(model, loss)[name] - exact[name]).norm() / exact[name].norm() for loss in (expected, result)]
    assert errors[1] < max(1.5 * errors[0], 0.02), errors


def test_labels_leave_the_head_when_the_model_fails() -> None:
    inputs, labels = batch()
    model = prepared("frozen")
    with pytest.raises(ValueError, match="input_ids"):
        token_loss.summed_loss(model, {"attention_mask": inputs["attention_mask"]}, labels)
    assert model(**inputs).logits.ndim == 3


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_memory_stays_below_that_of_the_logits(head: str) -> None:
    """A vocabulary of 16,384 over 1,024 positions: 67 MB of float32 logits for each copy that the plain way makes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    model.lm_head.requires_grad_(head == "trained")
    ids = torch.randint(0, 16384, (1, 1024))

    def peak(way: Any) -> float:
        model.zero_grad()
        with MemoryTrace([*model.parameters(), *model.buffers(), ids]) as memory:
            way(model, {"input_ids": ids}, ids).backward()
        return memory.peak / 1e6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_loss, "CHUNK", 8 << 20)
        chunked, everything = peak(token_loss.summed_loss), peak(plain)
    print(f"{head}: {chunked:.0f} MB, plain {everything:.0f} MB")
    assert everything > 130
    assert chunked < 0.4 * everything
