"""Attention by segments against upstream's eager masks: in float64, forward and backward, and generated tokens."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama import modeling_mllama as upstream

from radhpc.distributed import host_staging
from radhpc.models import attention
from radhpc.models.attention import Segment
from radhpc.models.families import mllama_attention

PATCHES = 17  # of a tile, padded to 24
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "cross_attention_layers": [1, 3], "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
VISION = {
    "hidden_size": 32, "attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 3, "num_global_layers": 1,
    "image_size": 56, "patch_size": 14, "max_num_tiles": 4, "intermediate_layers_indices": [0, 1],
    "vision_output_dim": 96,
}  # fmt: skip


def mllama(implementation: str, seed: int = 0) -> Any:
    """A tiny model that looks at its images."""
    config = MllamaConfig(text_config=TEXT, vision_config=VISION, image_token_index=97)
    config._attn_implementation = implementation
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name.split(".")[-1]:
            nn.init.constant_(parameter, 0.6)
    mllama_attention.attach(model)
    return model.eval()


def mixed_batch(left: bool = False) -> dict[str, torch.Tensor]:
    """Two images of four and of two tiles, one image of one tile, a text without any; rows of 20, 14, 9 tokens."""
    rng = np.random.default_rng(3)
    lengths, tiles = [20, 14, 9], [[4, 2], [1], []]
    images, longest = 2, max(lengths)
    ids = np.zeros((3, longest), np.int64)
    seen = np.zeros((3, longest), np.int64)
    cross = np.zeros((3, longest, images, 4), np.int64)
    ratios, ratio_mask = np.zeros((3, images), np.int64), np.zeros((3, images, 4), np.int64)
    ratio_mask[:, :, 0] = 1
    for row, length in enumerate(lengths):
        start = longest - length if left else 0
        ids[row, start : start + length] = rng.integers(3, 97, length)
        seen[row, start : start + length] = 1
        for image, count in enumerate(tiles[row]):
            begins = start + 2 + image  # two tokens stand before the first image and see none
            ids[row, begins] = 97
            cross[row, begins:, image, :count] = 1
            ratio_mask[row, image, :count] = 1
            ratios[row, image] = {1: 1, 2: 2, 4: 6}[count]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(seen),
        "pixel_values": torch.randn(3, images, 4, 3, 56, 56, generator=torch.Generator().manual_seed(1)),
        "aspect_ratio_ids": torch.from_numpy(ratios),
        "aspect_ratio_mask": torch.from_numpy(ratio_mask),
        "cross_attention_mask": torch.from_numpy(cross),
    }


@pytest.fixture
def exact_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's eager attention and norms in the model's own type, instead of in float32 here and there."""

    def eager(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any
    ) -> Any:
        k, v = (upstream.repeat_kv(tensor, module.num_key_value_groups) for tensor in (k, v))
        weights = q @ k.transpose(2, 3) * scaling + (0 if mask is None else mask)
        return (weights.softmax(-1) @ v).transpose(1, 2), None

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(upstream, "eager_attention_forward", eager)
    monkeypatch.setattr(upstream.MllamaTextRMSNorm, "forward", norm)


def outcome(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the real tokens, and the gradients of a loss over them."""
    model.zero_grad()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    logits = model(**inputs, use_cache=False).logits[batch["attention_mask"].bool()]
    (
        logits * torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize("left", [False, True])
def test_logits_and_gradients_are_those_of_eager_masks(
    exact_eager: None, monkeypatch: pytest.MonkeyPatch, left: bool, small: int
) -> None:
    monkeypatch.setattr(attention, "SMALL_MASK", small)  # 0: by segments alone, as on a GPU
    batch = mixed_batch(left)
    if left:  # eager attends nowhere in float64 where a row begins with padding, so only causality hides it there
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    theirs, ours = mllama("eager").double(), mllama("segments").double()
    logits, gradients = outcome(theirs, batch)
    mine, my_gradients = outcome(ours, batch)
    torch.testing.assert_close(mine, logits, rtol=0, atol=1e-11)
    assert gradients.keys() == my_gradients.keys()
    assert len(gradients) > 60
    for name, gradient in gradients.items():
        worst = (my_gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)
        assert worst < 1e-10, (name, float(worst))


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_generated_tokens_are_those_of_sdpa(how: dict[str, Any]) -> None:
    batch = mixed_batch(left=True)
    texts = [mllama(name).generate(**batch, max_new_tokens=8, do_sample=False, **how) for name in ("sdpa", "segments")]
    assert torch.equal(*texts)
    assert texts[0].shape[1] > batch["input_ids"].shape[1] + 2


def test_no_mask_is_built_and_upstream_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    before = upstream.scaled_dot_product_attention if hasattr(upstream, "scaled_dot_product_attention") else None
    assert before is None

    def watch(*arguments: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        built.append(attn_mask)
        return nn.functional.scaled_dot_product_attention(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(attention, "SMALL_MASK", 0)
    with torch.no_grad():
        mllama("segments")(**mixed_batch())
    assert len(built) >= 8
    assert all(mask is None for mask in built)
    assert not attention.is_recording()
    mask = upstream._prepare_aspect_ratio_attention_mask(torch.ones(1, 4), PATCHES, 24, torch.float32)
    assert mask.shape == (1, 1, 96, 96)


def test_a_watch_ends_with_its_forward_even_by_an_error() -> None:
    model, batch = mllama("segments"), mixed_batch()
    with pytest.raises(ValueError, match="aspect_ratio_ids"):
        model(**{name: value for name, value in batch.items() if name != "aspect_ratio_ids"})
    assert not attention.is_recording()


def test_a_llama_with_padding_on_either_side_attends_as_with_sdpa() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).double().eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("segments")
    ids, seen = torch.randint(0, 50, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    seen[0, :4], seen[1, 9:] = 0, 0
    for mask in (seen, torch.ones_like(seen), None):
        expected, result = (model(input_ids=ids, attention_mask=mask).logits for model in (theirs, ours))
        where = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(result[where], expected[where], rtol=0, atol=1e-12)


def test_segments_of_one_shape_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count(q: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        calls.append(tuple(q.shape))
        return nn.functional.scaled_dot_product_attention(q, *others, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", count)
    rows = [np.arange(0, 4), np.arange(9, 12), np.arange(4, 8)]  # the last one is padded on the left
    monkeypatch.setattr(attention, "SMALL_MASK", 0)
    mask = attention.Segments([Segment(row, row) for row in rows], (3, 4, 4), torch.device("cpu"), causal=True)
    q, k, v = torch.randn(3, 3, 4, 4, 8, dtype=torch.float64)
    result = attention.attend_segments(q, k[:, :2], v[:, :2], mask, 0.3)
    assert sorted(calls) == [(1, 4, 3, 8), (2, 4, 4, 8)]
    calls.clear()
    monkeypatch.setattr(attention, "SMALL_MASK", 1 << 20)
    mask = attention.Segments([Segment(row, row) for row in rows], (3, 4, 4), torch.device("cpu"), causal=True)
    at_once = attention.attend_segments(q, k[:, :2], v[:, :2], mask, 0.3)
    assert calls == [(3, 4, 4, 8)]
    for row in rows:
        place, start = row[0] // 4, row[0] % 4
        kk, vv = (x[place : place + 1, :2].repeat_interleave(2, 1)[:, :, start:] for x in (k, v))
        part = q[place : place + 1, :, start:]
        expected = nn.functional.scaled_dot_product_attention(part, kk, vv, is_causal=True, scale=0.3).transpose(1, 2)
        torch.testing.assert_close(result[place : place + 1, start:], expected)
        torch.testing.assert_close(at_once[place : place + 1, start:], expected)


def test_the_values_of_a_moved_mask_are_read_where_they_were() -> None:
    here = torch.tensor([[1, 0]])
    moved = host_staging.keep_host_values(torch.empty(1, 2, device="meta"), here)
    assert host_staging.host_values(moved).tolist() == [[1, 0]]


class _Card:
    """What a CUDA device would say of itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], modules: set[str]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        real = attention._function

        def function(module: str, name: str) -> Any:
            if module.startswith("flash_attn"):
                return (lambda *_, **__: None) if module in modules else None
            return real(module, name)

        monkeypatch.setattr(attention, "_function", function)


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "modules", "expected"),
    [
        ((9, 0), torch.bfloat16, 128, {"flash_attn", "flash_attn_interface", "flash_attn.cute"}, "flash-attn 4"),
        ((9, 0), torch.bfloat16, 80, {"flash_attn", "flash_attn_interface", "flash_attn.cute"}, "flash-attn 3"),
        ((8, 0), torch.bfloat16, 128, {"flash_attn", "flash_attn_interface"}, "flash-attn 2"),
        ((9, 0), torch.bfloat16, 128, set(), "torch varlen"),
        ((9, 0), torch.float32, 128, {"flash_attn"}, "SDPA"),
        ((7, 5), torch.float16, 128, {"flash_attn"}, "SDPA"),
    ],
)
def test_the_order_of_kernels(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    size: int,
    modules: set[str],
    expected: str,
) -> None:
    _Card(monkeypatch, capability, modules)
    names = [kernel.name for kernel in attention.usable_kernels(torch.device("cuda"), dtype, size, dropout=False)]
    assert names[0] == expected
    assert names[-1] == "SDPA"


def test_the_kernel_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attention._choose.cache_clear()
    with caplog.at_level(logging.INFO, "radhpc"):
        for _ in range(3):
            attention.fastest_kernel(torch.device("cpu"), torch.float32, 16)
    assert [record.getMessage() for record in caplog.records] == ["attention: SDPA for heads of 16 in float32 on cpu"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
